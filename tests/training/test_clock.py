"""How the time of a pack is shared out: what is compiled or captured is no training."""

from types import SimpleNamespace
from typing import Any

import pytest

from sweeper.training import pack_trainer
from sweeper.training.pack_trainer import IN_FLIGHT, MOST_IN_FLIGHT, Clock
from sweeper.training.run_state import StepResult


class Noted:
    """Stands in for a run."""

    def __init__(self) -> None:
        self.train, self.one_off = 0.0, 0.0

    def note_step(self, result: StepResult, seconds: float) -> None:
        self.train += seconds
        self.one_off += result.one_off


class Steps:
    """A pack of two `runs` whose steps, of which `one_off` tells the host's extra seconds, are all on their way."""

    def __init__(self, one_off: list[float], device: str = "cuda") -> None:
        self.device, self.pending = SimpleNamespace(type=device), list(one_off)
        self.runs: dict[str, Any] = {"a": Noted(), "b": Noted()}

    def drain(self, *, but: int = 0) -> Any:
        while len(self.pending) > but:
            extra = self.pending.pop(0)
            for run in self.runs.values():
                yield StepResult(run, 1, 0.0, 0.0, 0.0, 1, 1, extra / 2)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [0.0]
    monkeypatch.setattr(pack_trainer, "time", SimpleNamespace(perf_counter=lambda: at[0]))
    return at


def test_time_is_shared_out_and_one_off_work_is_apart(now: list[float]) -> None:
    pack: Any = Steps([0.0, 3.0, 0.0, 0.0])
    runs, clock = pack.runs, Clock(pack)
    now[0] = 5.0
    assert len(clock.collect(but=1)) == 6
    assert runs["a"].train == runs["b"].train == pytest.approx(1.0)
    assert runs["a"].one_off == runs["b"].one_off == pytest.approx(1.5)
    assert clock.step_seconds == 1.0  # a step that was compiled says nothing of how long one takes
    now[0] = 5.1
    assert len(clock.collect()) == 2
    assert clock.step_seconds == pytest.approx(0.1)
    assert clock.collect() == []


def test_steps_that_were_done_while_another_was_captured_are_not_counted_twice(now: list[float]) -> None:
    pack: Any = Steps([0.0, 2.0])
    runs, clock = pack.runs, Clock(pack)
    now[0] = 1.5
    clock.collect()
    assert (runs["a"].train, runs["a"].one_off) == (0.0, 1.0)


@pytest.mark.parametrize(("step", "flying"), [(2.0, IN_FLIGHT), (0.04, 10), (0.001, MOST_IN_FLIGHT)])
def test_as_many_steps_fly_as_last_while_one_is_captured(step: float, flying: int) -> None:
    pack: Any = Steps([])
    clock = Clock(pack)
    clock.step_seconds = step
    assert clock.in_flight == flying
    pack.device.type = "cpu"
    assert clock.in_flight == 0
