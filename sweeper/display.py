"""What people see while runs train: a live table in a terminal, plain lines anywhere else."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeper import naming
from sweeper.engine.events import Evaluated, Event, RunFinished, RunStarted, Stage, Step
from sweeper.plan import Plan
from sweeper.record import Record
from sweeper.spec import to_mapping

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
class Board:
    """The state of a sweep, fed with events; `views` are in the plan's order."""

    views: dict[str, RunView]
    clock: Clock = time.monotonic
    begun: float = 0.0
    stage: str = ""
    tokens: int = 0
    training_since: float | None = None
    finished: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan, clock: Clock = time.monotonic) -> "Board":
        specs = [to_mapping(run.spec) for run in plan.todo]
        fields = naming.varying(specs)
        views = {
            run.run_id: RunView(label=naming.label(spec, fields), steps=run.spec.trainer.max_steps)
            for run, spec in zip(plan.todo, specs, strict=True)
        }
        return cls(views=views, clock=clock, begun=clock())

    def take(self, event: Event) -> None:
        match event:
            case Stage(message=message):
                self.stage = message
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


def make_display(plan: Plan, console: Console) -> Display:
    board = Board.of(plan)
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
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("run", no_wrap=True)
        for name in ("step", "loss", "tokens/s", "ETA", "validation NLL"):
            table.add_column(name, justify="right", no_wrap=True)
        views = list(self.board.views.values())
        shown = _visible(views, max(self.console.height - 5, 3))
        for view in shown:
            table.add_row(*self._row(view), style=_STYLES.get(view.state, ""))
        hidden = len(views) - len(shown)
        parts: list[Table | Text] = [table]
        if hidden:
            parts.append(Text(f"and {hidden} more", style="dim"))
        parts.append(Text(self.board.headline()))
        if self.board.stage:
            parts.append(Text(self.board.stage, style="dim"))
        return Group(*parts)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        self.board.take(event)
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


def clock_time(seconds: float | None) -> str:
    """m:ss or h:mm:ss."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
