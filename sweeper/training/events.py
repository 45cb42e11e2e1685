"""What trainer and scheduler say while they work, as plain data. Display and trackers listen; the scheduler prunes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sweeper.record import Record, Score
from sweeper.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The engine has begun something that takes a while and belongs to no single run, such as loading a model."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """What a reader must know, of the results or of how they came about; each is shown once, and stays.

    `by_worker`: it is of whoever trains, such as where its time went, and not of the study.
    """

    message: str
    by_worker: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    run_id: str
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResumed:
    """A run goes on from a checkpoint that had made `step` of its `steps`."""

    run_id: str
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimiser step of one run. `step` counts from 1; `loss` is what the run minimises: of nll, nats a token.

    `tokens` are all that the step computed of the run's rows, prompts and answers; padding is not counted.
    `answer_tokens` are those of them that the loss is taken on. `seconds` are the run's share of its pack's.
    """

    run_id: str
    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    answer_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Scores of a split; `phase` is "before", "after" or the number of steps done, as text."""

    run_id: str
    split: str
    phase: str
    score: Score


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFinished:
    """A run has ended, whatever its status, and its folder is complete on disk."""

    record: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class RunQueued:
    """The scheduler has handed out a run. `arm` is the key of its arm."""

    run_id: str
    spec: RunSpec
    arm: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnded:
    """A trial of an arm was told its value: "completed", "pruned" or "failed"; `value` None where it has none.

    `best` and `best_params` are the arm's best so far; `ended` of `wanted` trials have ended (None: no number is set).
    """

    arm: str
    number: int
    state: str
    params: Mapping[str, Any]
    value: float | None
    best: float | None
    best_params: Mapping[str, Any]
    ended: int
    wanted: int | None


Event = Stage | Remark | RunQueued | RunStarted | RunResumed | Step | Evaluated | RunFinished | TrialEnded
