"""What people see while runs train: a live table in a terminal or notebook, plain lines anywhere else."""

import html
import io
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeper.reporting.board import ArmView, Board, Planned, RunView
from sweeper.reporting.text import clock_time, number, point
from sweeper.training.events import Event, Remark, RunFinished, RunStarted, Stage, Step, TrialEnded


class Display(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, event: Event) -> None: ...


def make_display(plan: Planned, console: Console, *, trials: int | None = None) -> Display:
    """`trials` is how many each tuned arm shall have."""
    board = Board.of(plan, wanted=trials)
    if console.is_jupyter:
        return NotebookDisplay(board, console)
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
        if isinstance(event, Remark) and self.board.is_new(event):
            self.console.print(event.message, markup=False, highlight=False, soft_wrap=True)  # above the table

    def render(self) -> Group:
        parts: list[Table | Text] = []
        arms = list(self.board.arms.values())[: max(self.console.height // 2, 3)]
        if arms:
            more = len(self.board.arms) - len(arms)
            parts += [self._arms(arms), Text(f"and {more} more arms" if more else "", style="dim")]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("run", no_wrap=True)
        for name in ("step", "loss", "tokens/s", "ETA", "validation NLL"):
            table.add_column(name, justify="right", no_wrap=True)
        views = list(self.board.views.values())
        if self.board.arms:  # of hundreds of trials, those that train
            views = [view for view in views if view.state in ("training", "failed")]
        shown = _visible(views, max(self.console.height - 5 - len(arms), 3))
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

    def _arms(self, arms: Sequence[ArmView]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("arm", no_wrap=True)
        for name in ("trials", "pruned", "failed", "best"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("with", no_wrap=True)
        for arm in arms:
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


class NotebookDisplay:
    """The live table with a progress bar in a notebook's output, drawn again at most twice a second."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board, self.live = board, LiveDisplay(board, console)
        self.drawn = 0.0
        self.output: Any = None

    def __enter__(self) -> Self:
        import IPython.display

        self.output = IPython.display.display(self._page(), raw=True, display_id=True)
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
        if isinstance(event, Remark):
            if self.board.is_new(event):
                self._say(event.message)
            return
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
