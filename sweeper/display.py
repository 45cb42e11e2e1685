"""What people see while runs train: a live table in a terminal, plain lines anywhere else."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeper import naming
from sweeper.engine.events import Evaluated, Event, RunFinished, RunQueued, RunStarted, Stage, Step, TrialEnded
from sweeper.plan import Plan
from sweeper.record import Record
from sweeper.spec import RunSpec, to_mapping

Clock = Callable[[], float]
SMOOTHING = 0.9


def make_console() -> Console:
    """Standard output; wide where it is no terminal, so that tables in logs are whole."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=200)
    return console


@dataclass(kw_only=True)
class RunView:
    """What is known of one run while it trains.

    `speed` is tokens per second, smoothed over steps. `seen` counts the steps of this command: a run that goes on from
    a checkpoint has done more.
    """

    label: str
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    seen: int = 0
    loss: float | None = None
    speed: float | None = None
    first_step: float | None = None
    last_step: float = 0.0
    said: float = 0.0
    before: float | None = None
    after: float | None = None
    error: str | None = None

    def eta(self) -> float | None:
        """Seconds to the last step at the pace so far; None before there is a pace."""
        if self.first_step is None or self.seen < 2 or self.state != "training":
            return None
        return (self.steps - self.step) * (self.last_step - self.first_step) / (self.seen - 1)


@dataclass(kw_only=True)
class ArmView:
    """What is known of the search in one arm."""

    label: str
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
    """The state of a sweep, fed with events; `views` are in the plan's order."""

    views: dict[str, RunView]
    arms: dict[str, "ArmView"] = field(default_factory=dict)
    fields: Sequence[str] = ()
    clock: Clock = time.monotonic
    begun: float = 0.0
    stage: str = ""
    tokens: int = 0
    training_since: float | None = None
    finished: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan, clock: Clock = time.monotonic, *, wanted: int | None = None) -> "Board":
        board = cls(views={}, fields=plan.fields, clock=clock, begun=clock())
        for run in plan.todo:
            board.add(run.run_id, run.spec)
        arms = [to_mapping(arm.default) for arm in plan.arms]
        fields = naming.varying(arms)
        for arm, spec in zip(plan.arms, arms, strict=True):
            if arm.space:
                label, steps = naming.label(spec, fields), arm.default.trainer.max_steps
                board.arms[arm.key] = ArmView(label=label, wanted=wanted, seeds=len(arm.seeds), steps=steps)
        return board

    def add(self, run_id: str, spec: RunSpec) -> None:
        """Another run to show, or one that is trained again."""
        label = naming.label(to_mapping(spec), self.fields)
        self.views.setdefault(run_id, RunView(label=label, steps=spec.trainer.max_steps))

    def take(self, event: Event) -> None:
        match event:
            case Stage(message=message):
                self.stage = message
            case RunQueued(run_id=run_id, spec=spec):
                self.add(run_id, spec)
                if event.arm in self.arms:
                    self.arms[event.arm].queued += 1
            case TrialEnded():
                self.arms[event.arm].take(event)
            case RunStarted(run_id=run_id, steps=steps):
                self.views[run_id].state, self.views[run_id].steps = "training", steps
            case Step():
                self._step(event)
            case Evaluated(run_id=run_id, split="validation", moment="before", score=score):
                self.views[run_id].before = score.nll
            case Evaluated(run_id=run_id, split="validation", moment="after", score=score):
                self.views[run_id].after = score.nll
            case RunFinished(record=record):
                self._finish(record)

    def _step(self, event: Step) -> None:
        view, now = self.views[event.run_id], self.clock()
        view.step, view.loss, view.last_step = event.step, event.loss, now
        view.seen += 1
        view.first_step = now if view.first_step is None else view.first_step
        if event.seconds > 0:
            speed = event.tokens / event.seconds
            view.speed = speed if view.speed is None else SMOOTHING * view.speed + (1 - SMOOTHING) * speed
        if self.training_since is None:
            self.training_since = now
        else:
            self.tokens += event.tokens
        self.stage = ""

    def _finish(self, record: Record) -> None:
        view = self.views[record.run_id]
        view.state = record.status
        view.error = None if record.error is None else f"{record.error.get('class')}: {record.error.get('message')}"
        self.finished.append(record.run_id)

    def counts(self) -> dict[str, int]:
        order = ("completed", "pruned", "diverged", "failed", "training", "waiting")
        found = {state: sum(view.state == state for view in self.views.values()) for state in order}
        return {state: count for state, count in found.items() if count}

    def speed(self) -> float | None:
        """Tokens per second of the whole sweep since its first step."""
        if self.training_since is None or not self.tokens:
            return None
        return self.tokens / max(self.clock() - self.training_since, 1e-9)

    def eta(self) -> float | None:
        """Seconds left if the rest goes at the pace of all steps so far."""
        done = sum(view.seen for view in self.views.values())
        left = sum(view.steps - view.step for view in self.views.values() if view.state in ("training", "waiting"))
        left += sum(arm.steps_to_come() for arm in self.arms.values())
        if self.training_since is None or done < 2:
            return None
        return left * (self.clock() - self.training_since) / done

    def headline(self) -> str:
        parts = [", ".join(f"{count} {state}" for state, count in self.counts().items())]
        speed, eta = self.speed(), self.eta()
        if speed is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        parts.append(f"{clock_time(self.clock() - self.begun)} so far")
        if eta is not None and eta >= 0.5:
            parts.append(f"{clock_time(eta)} to go")
        return " · ".join(parts)


class Display(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, event: Event) -> None: ...


def make_display(plan: Plan, console: Console, *, trials: int | None = None) -> Display:
    """`trials` is how many each tuned arm shall have."""
    board = Board.of(plan, wanted=trials)
    return LiveDisplay(board, console) if console.is_terminal else LineDisplay(board, console)


class LiveDisplay:
    """A table that is drawn again twice a second: one line a run, as many as the terminal has room for."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board, self.console = board, console
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def __call__(self, event: Event) -> None:
        self.board.take(event)

    def render(self) -> Group:
        parts: list[Table | Text] = []
        if self.board.arms:
            parts += [self._arms(), Text("")]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("run", no_wrap=True)
        for name in ("step", "loss", "tokens/s", "ETA", "validation NLL"):
            table.add_column(name, justify="right", no_wrap=True)
        views = list(self.board.views.values())
        if self.board.arms:  # of hundreds of trials, those that train
            views = [view for view in views if view.state in ("training", "failed")]
        shown = _visible(views, max(self.console.height - 5 - len(self.board.arms), 3))
        for view in shown:
            table.add_row(*self._row(view), style=_STYLES.get(view.state, ""))
        hidden = len(views) - len(shown)
        parts.append(table)
        if hidden:
            parts.append(Text(f"and {hidden} more", style="dim"))
        parts.append(Text(self.board.headline()))
        if self.board.stage:
            parts.append(Text(self.board.stage, style="dim"))
        return Group(*parts)

    def _arms(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("arm", no_wrap=True)
        for name in ("trials", "pruned", "failed", "best"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("with", no_wrap=True)
        room = max(self.console.height // 2, 3)
        for arm in list(self.board.arms.values())[:room]:
            table.add_row(arm.label, arm.trials(), str(arm.pruned), str(arm.failed), number(arm.best, 4), arm.params())
        return table

    def _row(self, view: RunView) -> list[str]:
        training = view.state == "training"
        return [
            view.label,
            f"{view.step}/{view.steps}" if view.step or training else view.state,
            number(view.loss),
            f"{view.speed:,.0f}" if view.speed is not None and training else "",
            clock_time(view.eta()) if training else ("" if view.state == "waiting" else view.state),
            view.error or _change(view),
        ]


class LineDisplay:
    """One line when a run starts, at each quarter, when it is slow, and when it ends."""

    def __init__(self, board: Board, console: Console, *, quiet_seconds: float = 30.0) -> None:
        self.board, self.console, self.quiet_seconds = board, console, quiet_seconds
        self.said = board.clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        self.board.take(event)
        if self.board.arms:
            self._search(event)
            return
        match event:
            case Stage(message=message):
                self._say(message)
            case RunStarted(run_id=run_id, steps=steps):
                self._say(f"{self._where(run_id)}: {steps} steps")
            case Step(run_id=run_id) if self._due(self.board.views[run_id]):
                self._say(f"{self._where(run_id)}: {_progress(self.board.views[run_id])}")
            case RunFinished(record=record):
                view = self.board.views[record.run_id]
                after = view.error or (f"validation NLL {_change(view)}" if _change(view) else "")
                self._say(f"{self._where(record.run_id)}: {record.status}{', ' + after if after else ''}")
                self._say(self.board.headline())

    def _search(self, event: Event) -> None:
        """Of a search, the trials and what failed; the steps of each run would be too much."""
        match event:
            case Stage(message=message):
                self._say(message)
            case TrialEnded():
                arm = self.board.arms[event.arm]
                value = "" if event.value is None else f" {number(event.value, 4)}"
                best = "" if arm.best is None else f"; best {number(arm.best, 4)} with {arm.params()}"
                self._say(f"{arm.label} trial {arm.trials()} ({point(event.params)}): {event.state}{value}{best}")
            case RunFinished(record=record) if record.status == "failed":
                view = self.board.views[record.run_id]
                self._say(f"{view.label}: failed, {view.error}")
        now = self.board.clock()
        if now - self.said > self.quiet_seconds:
            self.said = now
            self._say(self.board.headline())

    def _due(self, view: RunView) -> bool:
        now = self.board.clock()
        silent = now - max(view.said, now if view.first_step is None else view.first_step)
        due = view.step % max(view.steps // 4, 1) == 0 or silent >= self.quiet_seconds
        if due:
            view.said = now
        return due

    def _where(self, run_id: str) -> str:
        place = list(self.board.views).index(run_id) + 1
        return f"run {place}/{len(self.board.views)} {self.board.views[run_id].label}"

    def _say(self, text: str) -> None:
        stamp = clock_time(self.board.clock() - self.board.begun)
        self.console.print(f"[{stamp}] {text}", markup=False, soft_wrap=True)


_STYLES = {"waiting": "dim", "completed": "green", "failed": "red", "diverged": "yellow", "pruned": "dim"}
_URGENCY = {"training": 0, "failed": 1, "diverged": 2, "completed": 3, "pruned": 4, "waiting": 5}


def _visible(views: Sequence[RunView], room: int) -> list[RunView]:
    """As many views as there is room for, those that train first, in plan order."""
    if len(views) <= room:
        return list(views)
    order = sorted(range(len(views)), key=lambda place: (_URGENCY.get(views[place].state, 6), place))
    return [views[place] for place in sorted(order[:room])]


def _progress(view: RunView) -> str:
    parts = [f"step {view.step}/{view.steps}", f"loss {number(view.loss)}"]
    if view.speed is not None:
        parts.append(f"{view.speed:,.0f} tokens/s")
    eta = view.eta()
    if eta is not None and view.step < view.steps:
        parts.append(f"ETA {clock_time(eta)}")
    return ", ".join(parts)


def _change(view: RunView) -> str:
    if view.before is None and view.after is None:
        return ""
    return f"{number(view.before)} → {number(view.after)}" if view.before is not None else number(view.after)


def number(value: float | None, digits: int = 3) -> str:
    """A score for people: three decimals, "-" where there is none, "nan" and "inf" as they are."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:.3g}"


def point(params: Mapping[str, Any]) -> str:
    """Tuned values for people: "optim.lr=0.00123, rank=8"."""
    shown = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in params.values())
    return ", ".join(f"{key}={text}" for key, text in zip(params, shown, strict=True))


def clock_time(seconds: float | None) -> str:
    """m:ss or h:mm:ss."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
