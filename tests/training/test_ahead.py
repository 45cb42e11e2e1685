"""An iterator ahead of its reader: the same items in order, and the same end."""

import threading
import time
from collections.abc import Iterator

import pytest

from sweeper.training.ahead import ahead


def test_items_come_in_order_from_another_thread() -> None:
    threads = set()

    def numbers() -> Iterator[int]:
        for number in range(100):
            threads.add(threading.current_thread())
            yield number

    assert list(ahead(numbers(), 3)) == list(range(100))
    assert threading.current_thread() not in threads


def test_what_the_maker_raises_comes_after_what_it_made() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = ahead(broken(), 10)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_the_maker_is_no_further_ahead_than_allowed_and_ends_with_its_reader() -> None:
    made: list[int] = []
    ended = threading.Event()

    def endless() -> Iterator[int]:
        try:
            for number in range(10**9):
                made.append(number)
                yield number
        finally:
            ended.set()

    items = ahead(endless(), 5)
    next(items)
    time.sleep(0.2)
    assert len(made) <= 7
    items.close()  # type: ignore[attr-defined]
    assert ended.wait(5)
