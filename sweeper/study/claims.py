"""Which command trains a run: two that are given the same grid at once share its runs, and train none twice."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = ".claims"  # in a study


class Claims:
    """A lock file for each run that is being trained, which the system lets go of if the process dies."""

    def __init__(self, study: Path) -> None:
        self.folder = study / FOLDER
        self.held: dict[str, FileLock] = {}

    def take(self, run_id: str) -> bool:
        """Claims a run for this command; False if another one has it."""
        if run_id in self.held:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / run_id, thread_local=False)  # taken in one thread, given back in another
        with contextlib.suppress(NotImplementedError):  # a file system without locks, where nothing can be told
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
        self.held[run_id] = lock
        return True

    def give_back(self, run_id: str) -> None:
        lock = self.held.pop(run_id, None)
        if lock is not None:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def close(self) -> None:
        """Gives back all."""
        for run_id in list(self.held):
            self.give_back(run_id)
        with contextlib.suppress(OSError):  # it is not there, or another command's claims are in it
            self.folder.rmdir()
