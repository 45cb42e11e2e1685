"""Hands the runs of a plan to the engine and passes on what it says. The display and the trackers only listen."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from sweeper.engine.events import Event, RunFinished
from sweeper.plan import Plan
from sweeper.record import Record
from sweeper.spec import Settings

Observer = Callable[[Event], None]


class TrainRuns(Protocol):
    """The engine, as the scheduler sees it."""

    def __call__(
        self, requests: Sequence[Any], settings: Settings, *, should_stop: Callable[[], bool]
    ) -> Iterator[Event]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Records of the runs that ended now, by run id, and whether a stop was asked for."""

    records: dict[str, Record]
    interrupted: bool = False


def run(
    plan: Plan, settings: Settings, observers: Sequence[Observer] = (), *, train: TrainRuns | None = None
) -> Outcome:
    """Trains what the plan has left. Ctrl-C once ends after the current step, twice at once."""
    engine = train or _engine()
    records: dict[str, Record] = {}
    with _stop_on_signal() as stop:
        for event in engine(_requests(plan), settings, should_stop=stop.is_set):
            if isinstance(event, RunFinished):
                records[event.record.run_id] = event.record
            for observer in observers:
                observer(event)
    return Outcome(records=records, interrupted=stop.is_set())


def _engine() -> TrainRuns:
    from sweeper import engine

    train: TrainRuns = engine.train_runs
    return train


def _requests(plan: Plan) -> list[Any]:
    from sweeper.engine.requests import RunRequest

    return [RunRequest(run_id=run.run_id, spec=run.spec, folder=run.folder) for run in plan.todo]


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event; the second one raises KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
