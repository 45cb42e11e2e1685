"""Where studies are kept, and which driver of several works on a trial."""

import functools
import hashlib
import inspect
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import optuna
import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from sweeper.errors import SpecError, first_line
from sweeper.study.search_settings import SearchSettings

JOURNAL = "search.journal"
DIGEST = "digest"  # of a line of it
GRACE_SECONDS = 600.0  # a trial of a driver on another machine is given up after this long without a sign of life
PATIENCE_SECONDS = 60.0  # for a database that is restarted
SIGNING_SECONDS = 5.0  # between asking for a trial and signing it, on a busy machine

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_storage(settings: SearchSettings, study: Path) -> BaseStorage:
    """The storage of a study's searches: the URL that was given, or a journal file in the study folder.

    Raises:
        SpecError: the journal is damaged, or the database cannot be reached, its driver is not installed or its tables
            are of another Optuna.
    """
    if settings.storage is None:
        study.mkdir(parents=True, exist_ok=True)
        path = str(study / JOURNAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                journal = _Journal(path, lock_obj=_KernelLock(path))  # type: ignore[arg-type]
                journal.check()
                return JournalStorage(journal)
            except (ValueError, KeyError) as error:  # what is in it is not JSON, or not what Optuna writes
                raise SpecError(f"{path} cannot be read ({error}): move it away; what is recorded stays") from None
    import sqlalchemy.exc

    for last in (False, False, True):
        try:
            opened: BaseStorage = _patient()(settings.storage, engine_kwargs={"pool_pre_ping": True})
            return opened
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            if last:
                raise _unusable(error) from None
            time.sleep(1)  # another driver is making the tables at this moment
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError) as error:  # the last: of another Optuna
            raise _unusable(error) from None
    raise AssertionError


def reach(url: str) -> None:
    """Looks whether the database of a search is there and writes nothing: its tables are made when the search begins.

    Raises:
        SpecError: the database cannot be reached or its driver is not installed.
    """
    import sqlalchemy

    try:
        given = sqlalchemy.make_url(url)
        if given.get_backend_name() == "sqlite" and not (file := Path(given.database or "").absolute()).is_file():
            if not os.access(file.parent, os.W_OK):  # to look into a file that is not there would make it
                raise _unusable(OSError(f"{file.parent} is no folder that can be written"))
            return
        engine = sqlalchemy.create_engine(given)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise _unusable(error) from None


def _unusable(error: Exception) -> SpecError:
    reason = first_line(error)
    return SpecError(f"hydra.sweeper.storage: the database cannot be used ({reason})")


class _Journal(JournalFileBackend):
    """A journal that goes on after a crash or a full disk in the middle of a line, and knows a line that was changed.

    Such a half line was never read by anyone. The library would glue the next one to it, and then read no line any
    more. Each line has a digest of itself; those of earlier versions and of other programs have none.
    """

    def check(self) -> None:
        """Raises ValueError where the last whole line is not JSON, which the library finds out a line later."""
        lines = Path(self._file_path).read_bytes().rsplit(b"\n", 2)
        if len(lines) > 1 and lines[-2]:
            json.loads(lines[-2])

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for log in super().read_logs(log_number_from):
            found = log.pop(DIGEST, None)
            if found is not None and found != _digest(log):
                raise ValueError("a line of it was edited or damaged")
            yield log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        logs = [{**log, DIGEST: _digest(log)} for log in logs]
        self._lock.acquire()  # again inside, which it allows
        try:
            with open(self._file_path, "r+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read() not in (b"", b"\n"):
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)
        finally:
            self._lock.release()


def _digest(log: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(log))
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


@cache
def _patient() -> type[Any]:
    """Optuna's database storage, each call of which is made again while the database does not answer."""
    from optuna.storages import RDBStorage

    calls = {
        name: _again(call)
        for name, call in vars(RDBStorage).items()
        if inspect.isfunction(call) and not name.startswith("__")
    }
    return type("Patient", (RDBStorage,), calls)


def _again(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def patiently(*args: Any, **kwargs: Any) -> Any:
        from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError
        from sqlalchemy.exc import TimeoutError as PoolTimeout

        until, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                return call(*args, **kwargs)
            except (DBAPIError, PendingRollbackError, PoolTimeout, StorageInternalError) as error:
                cause = error.__cause__ or error if isinstance(error, StorageInternalError) else error
                lost = isinstance(cause, InterfaceError | OperationalError | PendingRollbackError | PoolTimeout)
                if not (lost or getattr(cause, "connection_invalidated", False)):
                    raise
                if args and hasattr(args[0], "scoped_session"):
                    args[0].scoped_session.remove()  # its transaction ended with the connection
                if time.monotonic() > until:
                    raise SpecError(
                        f"hydra.sweeper.storage: the database has not answered for {PATIENCE_SECONDS:g} s "
                        f"({first_line(cause)}); when it does, the same command goes on from what is saved"
                    ) from None
                if not told:
                    told = True
                    print(
                        f"hydra.sweeper.storage: the database does not answer ({first_line(cause)}); trying for "
                        f"{PATIENCE_SECONDS:g} s",
                        file=sys.stderr,
                    )
                time.sleep(0.5)

    return patiently


class _KernelLock:
    """Lets go when its process dies, however it dies; the library's own lock file stays behind after kill -9."""

    def __init__(self, path: str) -> None:
        self.lock = filelock.FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


@cache
def this_driver() -> dict[str, Any]:
    """This driver: machine, process and when it began, for a process number is used again."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def alive(trial: FrozenTrial) -> bool:
    """Whether the driver that a running trial belongs to still works on it."""
    driver = trial.user_attrs.get("driver")
    if not driver:
        return False
    if driver["host"] != socket.gethostname():
        return bool(time.time() - driver["seen"] < GRACE_SECONDS)
    try:
        process = psutil.Process(driver["pid"])
        return bool(abs(process.create_time() - driver["began"]) < 1 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def being_signed(trial: FrozenTrial) -> bool:
    """Whether a driver has asked for a trial and may be about to sign it, which are two writes."""
    if trial.state != TrialState.RUNNING or "driver" in trial.user_attrs or trial.datetime_start is None:
        return False
    return abs(time.time() - trial.datetime_start.timestamp()) < SIGNING_SECONDS
