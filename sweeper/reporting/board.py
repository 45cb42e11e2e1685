"""The state of a sweep while it trains: what is known of each run and each search, fed with events."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sweeper import naming
from sweeper.arms import Arm, labels
from sweeper.record import Record
from sweeper.reporting.text import clock_time, point
from sweeper.run import Run
from sweeper.spec import RunSpec, to_mapping
from sweeper.training.events import (
    Evaluated,
    Event,
    Remark,
    RunFinished,
    RunQueued,
    RunResumed,
    RunStarted,
    Stage,
    Step,
    TrialEnded,
)

Clock = Callable[[], float]
NAMED = 12  # runs of a line that resume


class Planned(Protocol):
    """What a command would train."""

    @property
    def todo(self) -> Sequence[Run]: ...

    @property
    def arms(self) -> Sequence[Arm]: ...

    @property
    def fields(self) -> Sequence[str]: ...


@dataclass(kw_only=True)
class RunView:
    """What is known of one run while it trains.

    `cost` is what a step costs beside one of the other runs. `seen` counts the steps of this command: a run that goes
    on from a checkpoint has done more. `tokens` and `answers` are those of its steps but the first, after which the
    clock runs.
    """

    label: str
    cost: float = 1.0
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    seen: int = 0
    loss: float | None = None
    tokens: int = 0
    answers: int = 0
    first_step: float | None = None
    last_step: float = 0.0
    before: float | None = None
    after: float | None = None
    error: str | None = None

    def eta(self) -> float | None:
        """Seconds to the last step at the pace so far; None before there is a pace."""
        if self.state != "training" or (seconds := self._seconds()) is None:
            return None
        return (self.steps - self.step) * seconds / (self.seen - 1)

    def speed(self) -> float | None:
        """Tokens a second of the clock, of prompts and answers: in a pack, the run's part of the pack's."""
        seconds = self._seconds()
        return self.tokens / seconds if seconds else None

    def answer_speed(self) -> float | None:
        """Tokens of answers a second of the clock."""
        seconds = self._seconds()
        return self.answers / seconds if seconds else None

    def _seconds(self) -> float | None:
        """From the end of the first step to the end of the last."""
        return None if self.first_step is None or self.seen < 2 else self.last_step - self.first_step


@dataclass(kw_only=True)
class ArmView:
    """What is known of the search in one arm."""

    label: str
    cost: float = 1.0
    seeds: int = 1
    steps: int = 0
    queued: int = 0
    ended: int = 0
    wanted: int | None = None
    pruned: int = 0
    failed: int = 0
    best: float | None = None
    best_params: Mapping[str, Any] = field(default_factory=dict)

    def take(self, event: TrialEnded) -> None:
        self.ended, self.wanted = event.ended, event.wanted
        self.pruned += event.state == "pruned"
        self.failed += event.state == "failed"
        self.best, self.best_params = event.best, event.best_params

    def steps_to_come(self) -> int:
        """Steps of the trials that are not yet asked for."""
        return max(0, (self.wanted or 0) * self.seeds - self.queued) * self.steps

    def trials(self) -> str:
        return f"{self.ended}" if self.wanted is None else f"{self.ended}/{self.wanted}"

    def params(self) -> str:
        return point(self.best_params)


@dataclass(kw_only=True)
class Board:
    """The state of a sweep, fed with events; `views` are in the plan's order.

    `costs` are of a step of a run, by the key of its arm, where runs differ in that; only their proportions count.
    """

    views: dict[str, RunView]
    costs: Mapping[str, float] = field(default_factory=dict)
    arms: dict[str, "ArmView"] = field(default_factory=dict)
    fields: Sequence[str] = ()
    clock: Clock = time.monotonic
    begun: float = 0.0
    stage: str = ""
    remarks: set[str] = field(default_factory=set)
    tokens: int = 0
    answers: int = 0
    training_since: float | None = None
    finished: list[str] = field(default_factory=list)
    resumed: list[RunResumed] = field(default_factory=list)

    @classmethod
    def of(
        cls, plan: Planned, clock: Clock = time.monotonic, *, wanted: int | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> "Board":  # fmt: skip
        board = cls(views={}, costs=costs or {}, fields=plan.fields, clock=clock, begun=clock())
        for run in plan.todo:
            board.add(run.run_id, run.spec, run.arm)
        names = labels(plan.arms)
        for arm in plan.arms:
            if arm.space:
                label, steps = names[arm.key], arm.default.trainer.max_steps
                board.arms[arm.key] = ArmView(
                    label=label, cost=board.costs.get(arm.key, 1.0), wanted=wanted, seeds=len(arm.seeds), steps=steps
                )  # fmt: skip
        return board

    def add(self, run_id: str, spec: RunSpec, arm: str) -> None:
        """Another run to show, or one that is trained again."""
        label = naming.label(to_mapping(spec), self.fields)
        self.views.setdefault(run_id, RunView(label=label, cost=self.costs.get(arm, 1.0), steps=spec.trainer.max_steps))

    def take(self, event: Event) -> None:
        match event:
            case Stage(message=message):
                self.stage = message
            case RunQueued(run_id=run_id, spec=spec):
                self.add(run_id, spec, event.arm)
                if event.arm in self.arms:
                    self.arms[event.arm].queued += 1
            case TrialEnded():
                self.arms[event.arm].take(event)
            case RunStarted(run_id=run_id, steps=steps):
                self.views[run_id].state, self.views[run_id].steps = "training", steps
            case RunResumed(run_id=run_id, step=step, steps=steps):
                self.views[run_id].step, self.views[run_id].steps = step, steps
                self.resumed.append(event)
            case Step():
                self._step(event)
            case Evaluated(run_id=run_id, split="validation", phase="before", score=score):
                self.views[run_id].before = score.nll
            case Evaluated(run_id=run_id, split="validation", phase="after", score=score):
                self.views[run_id].after = score.nll
            case RunFinished(record=record):
                self._finish(record)

    def is_new(self, remark: Remark) -> bool:
        """Whether a remark was not made before, as by another worker."""
        known = remark.message in self.remarks
        self.remarks.add(remark.message)
        return not known

    def _step(self, event: Step) -> None:
        view, now = self.views[event.run_id], self.clock()
        view.step, view.loss, view.last_step = event.step, event.loss, now
        view.seen += 1
        if view.first_step is None:
            view.first_step = now
        else:
            view.tokens += event.tokens
            view.answers += event.answer_tokens
        if self.training_since is None:
            self.training_since = now
        else:
            self.tokens += event.tokens
            self.answers += event.answer_tokens
        self.stage = ""

    def _finish(self, record: Record) -> None:
        view = self.views[record.run_id]
        view.state = record.status
        view.error = None if record.error is None else f"{record.error.get('class')}: {record.error.get('message')}"
        self.finished.append(record.run_id)

    def counts(self) -> dict[str, int]:
        order = ("completed", "pruned", "diverged", "failed", "training", "stopped", "waiting")
        found = {state: sum(view.state == state for view in self.views.values()) for state in order}
        return {state: count for state, count in found.items() if count}

    def speed(self) -> str:
        """Tokens a second of the whole sweep since its first step; empty before there are any."""
        if self.training_since is None or not self.tokens:
            return ""
        seconds = max(self.clock() - self.training_since, 1e-9)
        return throughput(self.tokens / seconds, self.answers / seconds)

    def resumption(self) -> str:
        """A line for the runs that resume and were not told of yet; empty where there are none."""
        by_step: dict[str, list[str]] = {}
        for one in self.resumed:
            by_step.setdefault(f"step {one.step} of {one.steps}", []).append(self.views[one.run_id].label)
        self.resumed.clear()
        return "; ".join(
            f"resuming from {step}: {', '.join(names[:NAMED])}"
            + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            for step, names in by_step.items()
        )

    @property
    def open(self) -> bool:
        """Whether a run, or a trial that is wanted, has not come to its end."""
        left = any(view.state in ("training", "waiting") for view in self.views.values())
        return left or any(arm.steps_to_come() for arm in self.arms.values())

    def stop(self) -> None:
        """What trains was stopped."""
        self.stage = ""
        for view in self.views.values():
            if view.state == "training":
                view.state = "stopped"

    def eta(self) -> float | None:
        """Seconds left if the rest goes at the pace of all steps so far, each counted by its cost."""
        views = self.views.values()
        done = sum(view.seen * view.cost for view in views)
        left = sum((view.steps - view.step) * view.cost for view in views if view.state in ("training", "waiting"))
        left += sum(arm.steps_to_come() * arm.cost for arm in self.arms.values())
        if self.training_since is None or sum(view.seen for view in views) < 2:
            return None
        return left * (self.clock() - self.training_since) / done

    def facts(self) -> list[str]:
        """How many runs are in which state, the pace, and the time so far and to go."""
        eta = self.eta()
        return [
            ", ".join(f"{count} {state}" for state, count in self.counts().items()),
            *filter(None, [self.speed()]),
            f"{clock_time(self.clock() - self.begun)} so far",
            *([f"{clock_time(eta)} to go"] if eta is not None and eta >= 0.5 else []),
        ]

    def headline(self) -> str:
        return " · ".join(self.facts())


def throughput(tokens: float, answers: float) -> str:
    """Tokens a second, prompts and answers, and how many of them are of answers, which the loss is taken on."""
    return f"{tokens:,.0f} tokens/s, {answers:,.0f} of answers"
