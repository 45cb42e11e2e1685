"""What the engine yields while it works. Callers do the display, the tracking and the pruning."""

from dataclasses import dataclass

from sweeper.record import Record, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The engine has begun something that takes a while and belongs to no single run, such as loading a model."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    run_id: str
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimiser step of one run. `step` counts from 1; `loss` is mean NLL (nats) over the response tokens."""

    run_id: str
    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Scores of a split; `moment` is "before", "after" or the number of steps done, as text."""

    run_id: str
    split: str
    moment: str
    score: Score


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFinished:
    """A run has ended, whatever its status, and its folder is complete on disk."""

    record: Record


Event = Stage | RunStarted | Step | Evaluated | RunFinished
