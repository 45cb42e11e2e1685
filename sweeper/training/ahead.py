"""An iterator that runs in a thread of its own, so that a GPU need not wait for what is done with its results."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

_END = object()


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items in the same order, made up to `depth` ahead of their reader; what the maker raises, it raises.

    Closing it lets the maker end at its next item.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def make() -> None:
        last: object = _END
        try:
            for item in items:
                while not closed.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if closed.is_set():
                    return
        except BaseException as error:
            last = _Raised(error)
        ready.put(last)

    thread = threading.Thread(target=make, name="engine", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        closed.set()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
