"""What need not hold up training is done in order, in the background or at once, and fails no run."""

import contextlib
import threading

import pytest

from sweeper.training.events import Event, Stage
from sweeper.training.writer import ListenerFailed, Writer

BOTH = pytest.mark.parametrize("background", [False, True])


@BOTH
def test_events_and_writes_are_done_in_order(background: bool) -> None:
    heard: list[Event] = []
    writer = Writer(heard.append, background=background)
    for i in range(100):
        writer.emit(Stage(message=f"event {i}"))
        writer.write(lambda i=i: Stage(message=f"write {i}"))  # type: ignore[misc]
        writer.write(lambda: None)
    writer.close()
    assert heard == [Stage(message=f"{what} {i}") for i in range(100) for what in ("event", "write")]


@BOTH
def test_a_mark_is_set_when_all_before_it_is_done(background: bool) -> None:
    heard: list[Event] = []
    writer = Writer(heard.append, background=background)
    writer.emit(Stage(message="before"))
    assert writer.mark().wait(10)
    assert heard == [Stage(message="before")]
    writer.close()


def test_nothing_waits_for_what_is_done_in_the_background() -> None:
    go, heard = threading.Event(), list[Event]()
    writer = Writer(heard.append, background=True)
    writer.write(lambda: go.wait(10) and None)
    writer.emit(Stage(message="later"))
    assert not writer.mark().is_set()
    assert not heard
    go.set()
    writer.close()
    assert heard == [Stage(message="later")]


@BOTH
def test_what_a_listener_raises_ends_training_and_is_no_error_of_a_run(background: bool) -> None:
    def listen(event: Event) -> None:
        raise OSError("No space left on device")

    writer = Writer(listen, background=background)
    with contextlib.suppress(ListenerFailed):
        writer.emit(Stage(message="first"))
    with pytest.raises(ListenerFailed, match="No space left") as found:
        writer.close()
    assert isinstance(found.value.cause, OSError)
    assert not isinstance(found.value, Exception)  # which a pack would take for its own
    with pytest.raises(ListenerFailed):
        writer.emit(Stage(message="second"))
