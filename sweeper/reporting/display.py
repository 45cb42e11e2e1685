"""What people see while runs train: a live table in a terminal or notebook, plain lines anywhere else."""

import html
import io
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from sweeper.reporting.board import ArmView, Board, Planned, RunView
from sweeper.reporting.table import TIE, Column, cropped, fit, flow
from sweeper.reporting.text import clock_time, number, point
from sweeper.training.events import (
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


class Display(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, event: Event) -> None: ...


def make_display(
    plan: Planned, console: Console, *, trials: int | None = None, costs: Mapping[str, float] | None = None
) -> Display:
    """`trials` is how many each tuned arm shall have; `costs` what a step of each arm costs, as `Board` has it."""
    board = Board.of(plan, wanted=trials, costs=costs)
    if console.is_jupyter:
        return NotebookDisplay(board, console)
    return LiveDisplay(board, console) if console.is_terminal else LineDisplay(board, console)


class LiveDisplay:
    """A table that is drawn again twice a second, as many runs of it as the terminal has room for.

    It goes when all runs have ended, and the final table follows; of a sweep that was stopped it stays.
    """

    def __init__(self, board: Board, console: Console) -> None:
        self.board, self.console = board, console
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.transient = not self.board.open
        self.board.stop()
        self.live.stop()

    def __call__(self, event: Event) -> None:
        self.board.take(event)
        if isinstance(event, Remark) and self.board.is_new(event):
            self._say(event.message)
        elif not isinstance(event, _BEFORE_THE_FIRST_STEP) and (line := self.board.resumption()):
            self._say(line)

    def _say(self, line: str) -> None:
        """Prints above the table."""
        self.console.print(line, markup=False, highlight=False)

    def render(self) -> Group:
        width, height = self.console.width, max(self.console.height, 8)
        parts: list[Text] = []
        arms = list(self.board.arms.values())[: max(height // 2, 3)]
        if arms:
            parts += map(Text, fit(_arm_columns(arms), width).lines)
            more = len(self.board.arms) - len(arms)
            parts += [Text(f"and {more} more arms", style="dim")] if more else []
        below = [Text(line) for line in flow(self.board.facts(), width)]
        if self.board.stage:
            below.append(Text(cropped(self.board.stage, width), style="dim"))
        views = list(self.board.views.values())
        if self.board.arms:  # of hundreds of trials, those that train
            views = [view for view in views if view.state in ("training", "failed", "stopped")]
        rows = _runs(views, width, max(height - len(parts) - len(below) - 1, 4))
        return Group(*parts, *rows, *below)


_BEFORE_THE_FIRST_STEP = (RunResumed, RunQueued, RunStarted, Stage, Remark)


def _runs(views: Sequence[RunView], width: int, height: int) -> list[Text]:
    """Titles and a row for each run, or for as many runs as there is room for."""
    for count in range(min(len(views), height), 0, -1):
        shown = _visible(views, count)
        fitted = fit(_run_columns(shown), width)
        lines = [Text(line) for line in fitted.header]
        for view, row in zip(shown, fitted.rows, strict=True):
            lines += [Text(line, style=_STYLES.get(view.state, "")) for line in row]
            lines += [Text(cropped(f"  {view.error}", width), style="red")] if view.error else []
        if count < len(views):
            lines.append(Text(f"and {len(views) - count} more", style="dim"))
        if len(lines) <= height or count == 1:
            return lines
    return []


def _run_columns(views: Sequence[RunView]) -> list[Column]:
    return [
        Column(title="run", cells=[view.label for view in views]),
        Column(title="step", cells=[_step(view) for view in views], right=True),
        Column(title="loss", cells=[number(view.loss) for view in views]),
        Column(title=f"NLL before →{TIE}after", cells=[_change(view) for view in views]),
        Column(title="ETA", cells=["" if (eta := view.eta()) is None else clock_time(eta) for view in views], spare=1),
        Column(
            title="tokens/s", cells=["" if (pace := view.speed()) is None else f"{pace:,.0f}" for view in views],
            spare=2,
        ),
    ]  # fmt: skip


def _arm_columns(arms: Sequence[ArmView]) -> list[Column]:
    return [
        Column(title="arm", cells=[arm.label for arm in arms]),
        Column(title="trials", cells=[arm.trials() for arm in arms]),
        Column(title="pruned", cells=[str(arm.pruned) for arm in arms], spare=1),
        Column(title="failed", cells=[str(arm.failed) for arm in arms], spare=2),
        Column(title="best", cells=[number(arm.best, 4) for arm in arms]),
        Column(title="with", cells=[arm.params() or "-" for arm in arms], spare=3),
    ]


def _step(view: RunView) -> str:
    """Steps done of all; of a run that ended otherwise than by its last step, how."""
    if view.state in ("failed", "diverged", "pruned") or (view.state == "waiting" and not view.step):
        return view.state
    return f"{view.step}/{view.steps}"


class NotebookDisplay:
    """The live table with a progress bar in a notebook's output, drawn again at most twice a second."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board, self.live = board, LiveDisplay(board, console)
        self.drawn = 0.0
        self.output: Any = None

    def __enter__(self) -> Self:
        import IPython.display

        show: Any = IPython.display.display
        self.output = show(self._page(), raw=True, display_id=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.output.update(self._page(), raw=True)

    def __call__(self, event: Event) -> None:
        self.live(event)
        if self.board.clock() - self.drawn >= 0.5:
            self.drawn = self.board.clock()
            self.output.update(self._page(), raw=True)

    def _page(self) -> dict[str, str]:
        views = self.board.views.values()
        bar = ProgressBar(total=sum(view.steps for view in views), completed=sum(view.step for view in views), width=60)
        page = Console(file=io.StringIO(), width=115)
        page.print(bar)
        page.print()
        page.print(self.live.render())
        text = page.file.getvalue()  # type: ignore[attr-defined]
        return {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}


class LineDisplay:
    """For logs: a line when a run or a trial ends, and, where nothing else was said for a minute, one on how it goes.

    What a reader must know is said as well, and which runs resume.
    """

    def __init__(self, board: Board, console: Console, *, quiet_seconds: float = 60.0) -> None:
        self.board, self.console, self.quiet_seconds = board, console, quiet_seconds
        self.said: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        self.board.take(event)
        if not isinstance(event, _BEFORE_THE_FIRST_STEP) and (line := self.board.resumption()):
            self._say(line)
        match event:
            case Remark(message=message):
                if self.board.is_new(event):
                    self._say(message)
            case TrialEnded():
                self._say(_trial(event, self.board.arms[event.arm]))
            case RunFinished(record=record) if not self.board.arms or record.status == "failed":
                self._say(self._end(record.run_id))
            case Stage() | Step() if self.said is None or self.board.clock() - self.said >= self.quiet_seconds:
                self._say(" · ".join(self._progress()))

    def _end(self, run_id: str) -> str:
        """How a run ended."""
        view, eta = self.board.views[run_id], self.board.eta()
        parts = [view.state, view.error or (f"validation NLL {_change(view)}" if _change(view) else "")]
        if self.board.open and eta is not None and eta >= 0.5 and not self.board.arms:
            parts.append(f"{clock_time(eta)} to go")
        return f"{self._where(run_id)}: {', '.join(filter(None, parts))}"

    def _progress(self) -> list[str]:
        """What is being done, before the first step; then of one run its step and loss, of several their steps."""
        if self.board.stage:
            return [self.board.stage]
        training = [view for view in self.board.views.values() if view.state == "training"]
        done, steps = (sum(getattr(view, name) for view in self.board.views.values()) for name in ("step", "steps"))
        if len(training) == 1:
            (one,) = training
            return [f"{one.label}: step {one.step} of {one.steps}, loss {number(one.loss)}", *self.board.facts()]
        return [f"step {done:,} of {steps:,}", *self.board.facts()]

    def _where(self, run_id: str) -> str:
        view = self.board.views[run_id]
        if self.board.arms:
            return view.label
        return f"run {list(self.board.views).index(run_id) + 1}/{len(self.board.views)} {view.label}"

    def _say(self, text: str) -> None:
        self.said = self.board.clock()
        stamp = clock_time(self.said - self.board.begun)
        self.console.print(f"[{stamp}] {text}", markup=False, soft_wrap=True)


def _trial(event: TrialEnded, arm: ArmView) -> str:
    value = "" if event.value is None else f" {number(event.value, 4)}"
    best = "" if arm.best is None else f"; best {number(arm.best, 4)} with {arm.params()}"
    return f"{arm.label} trial {arm.trials()} ({point(event.params)}): {event.state}{value}{best}"


_STYLES = {
    "waiting": "dim", "completed": "green", "failed": "red", "diverged": "yellow", "pruned": "dim", "stopped": "yellow",
}  # fmt: skip
_URGENCY = {"training": 0, "stopped": 0, "failed": 1, "diverged": 2, "completed": 3, "pruned": 4, "waiting": 5}


def _visible(views: Sequence[RunView], room: int) -> list[RunView]:
    """As many views as there is room for, those that train first, in plan order."""
    if len(views) <= room:
        return list(views)
    order = sorted(range(len(views)), key=lambda place: (_URGENCY.get(views[place].state, 6), place))
    return [views[place] for place in sorted(order[:room])]


def _change(view: RunView) -> str:
    if view.before is None and view.after is None:
        return ""
    if view.before is None:
        return number(view.after)
    before = number(view.before)
    return f"{before} → {number(view.after).rjust(len(before))}"
