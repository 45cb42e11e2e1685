"""What need not hold up training, done in order: events reach whoever listens, records reach the disk."""

import queue
import threading
from collections.abc import Callable

from sweeper.training.events import Event

WAITING = 10_000  # events that may wait to be seen to; a step of a pack of 64 makes 64
Work = Callable[[], Event | None]


class ListenerFailed(BaseException):
    """What listens or writes has raised `cause`: the end of training, and no fault of a run."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Writer:
    """Hands events to a listener, and what has to be written to the disk.

    Args:
        listen: is given every event, in order.
        background: do so in a thread, so that a GPU need not wait meanwhile. On a CPU a thread would only compete with
            training, so everything is done at once.

    Every method raises `ListenerFailed` after the listener or a write has failed.
    """

    def __init__(self, listen: Callable[[Event], None], *, background: bool) -> None:
        self.listen = listen
        self.waiting: queue.Queue[Work | None] = queue.Queue(maxsize=WAITING)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="writer", daemon=True) if background else None
        if self.thread is not None:
            self.thread.start()

    def emit(self, event: Event) -> None:
        """Has an event heard."""
        self.write(lambda: event)

    def write(self, work: Work) -> None:
        """Has something done, and the event that comes of it heard."""
        if self.thread is None:
            self._do(work)
        else:
            self._put(work)
        self.check()

    def mark(self) -> threading.Event:
        """Is set when all that was given before has been done."""
        done = threading.Event()
        self.write(done.set)
        return done

    def check(self) -> None:
        """Raises `ListenerFailed` if the listener or a write has failed."""
        if self.error is not None:
            raise ListenerFailed(self.error)

    def close(self) -> None:
        """Waits until all is done."""
        if self.thread is not None and self.thread.is_alive():
            while self.error is None:
                try:
                    self.waiting.put(None, timeout=0.1)
                    break
                except queue.Full:
                    continue
            self.thread.join()
        self.check()

    def _put(self, work: Work) -> None:
        while self.error is None:
            try:
                self.waiting.put(work, timeout=0.1)
                return
            except queue.Full:
                continue

    def _do(self, work: Work) -> None:
        try:
            if (event := work()) is not None:
                self.listen(event)
        except Exception as error:
            self.error = error

    def _work(self) -> None:
        while self.error is None and (work := self.waiting.get()) is not None:
            self._do(work)
