"""The live view and the lines: what they say about a sweep, and that they never stop it."""

import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sweeper.arms import Dimension, grouped
from sweeper.record import Record
from sweeper.reporting import display
from sweeper.reporting.board import Board
from sweeper.run import Run
from sweeper.spec import RunSpec
from sweeper.study.plan import Plan
from sweeper.training.events import (
    Evaluated,
    Remark,
    RunFinished,
    RunQueued,
    RunResumed,
    RunStarted,
    Stage,
    Step,
    TrialEnded,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plan(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Plan:
    specs = [make_spec(rank=rank, trainer={"max_steps": 8}) for rank in (4, 8, 16)]
    runs = [Run.of(s, tmp_path) for s in specs]
    return Plan(
        study=tmp_path, runs=tuple(runs), arms=tuple(grouped(specs)), statuses={run.run_id: None for run in runs}
    )


def step(run_id: str, number: int, **changes: Any) -> Step:
    values: dict[str, Any] = {
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100,
        "answer_tokens": 30,
        "seconds": 0.5,
    }
    return Step(run_id=run_id, step=number, **(values | changes))


def stepped(plan: Plan, numbers: Sequence[int], *, pace: float) -> Board:
    """The first run of eight steps, a step every `pace` seconds."""
    clock = Clock()
    board = Board.of(plan, clock)
    board.take(RunStarted(run_id=plan.runs[0].run_id, steps=8))
    for number in numbers:
        clock.now += pace
        board.take(step(plan.runs[0].run_id, number))
    return board


def test_pace_gives_speed_and_eta(plan: Plan) -> None:
    board = stepped(plan, (1, 2, 3), pace=2.0)
    view = board.views[plan.runs[0].run_id]
    assert (view.speed(), view.answer_speed()) == (50, 15)  # of the clock, whatever the run's share of its pack
    assert view.eta() == pytest.approx(5 * 2.0)
    assert board.speed() == "50 tokens/s, 15 of answers"
    assert board.counts() == {"training": 1, "waiting": 2}
    assert "1 training, 2 waiting" in board.headline()
    assert board.eta() is not None


def test_steps_of_a_former_command_are_no_pace(plan: Plan) -> None:
    board = stepped(plan, (5, 6), pace=3.0)
    assert board.views[plan.runs[0].run_id].eta() == pytest.approx(2 * 3.0)


def test_nothing_is_known_before_the_first_step(plan: Plan) -> None:
    board = Board.of(plan, Clock())
    assert board.eta() is None
    assert not board.speed()
    assert board.headline() == "3 waiting · 0:00 so far"


def logged(plan: Plan, *, wanted: int | None = None) -> tuple[display.LineDisplay, Clock, Callable[[], list[str]]]:
    out, clock = io.StringIO(), Clock()
    view = display.LineDisplay(Board.of(plan, clock, wanted=wanted), Console(file=out, width=200))
    return view, clock, lambda: out.getvalue().splitlines()


def test_a_log_has_a_line_a_minute_and_one_at_each_end(plan: Plan, make_record: Callable[..., Record]) -> None:
    view, clock, lines = logged(plan)
    first, second, _ = plan.runs
    with view:
        view(Stage(message="loading [tiny]"))
        for run in (first, second):
            view(RunStarted(run_id=run.run_id, steps=8))
        for number in range(1, 9):
            clock.now += 20
            for run in (first, second):
                view(Stage(message="evaluating"))
                view(step(run.run_id, number))
        view(RunFinished(record=make_record(first.spec)))
        view(RunFinished(record=make_record(second.spec, status="failed", error={"class": "E", "message": "why"})))
    assert lines() == [
        "[0:00] loading [tiny]",
        "[1:00] evaluating",
        "[2:00] evaluating",
        "[2:40] run 1/3 attn r4: completed, 1:10 to go",
        "[2:40] run 2/3 attn r8: failed, E: why, 1:10 to go",
    ]


def test_the_line_of_a_minute_says_how_far_it_is(plan: Plan, make_record: Callable[..., Record]) -> None:
    view, clock, lines = logged(plan)
    first, second, _ = plan.runs
    for run in (first, second):
        view(RunStarted(run_id=run.run_id, steps=8))
        view(step(run.run_id, 1))
    clock.now = 60
    view(step(first.run_id, 2, loss=1.5))
    clock.now = 120
    view(RunFinished(record=make_record(second.spec)))
    clock.now = 180
    view(step(first.run_id, 3, loss=1.25))
    assert lines()[1] == (
        "[1:00] step 3 of 24 · 2 training, 1 waiting · 3 tokens/s, 1 of answers · 1:00 so far · 7:00 to go"
    )
    assert lines()[3].startswith("[3:00] attn r4: step 3 of 8, loss 1.250 · 1 completed, 1 training, 1 waiting · ")


def test_a_log_has_neither_colours_nor_carriage_returns(plan: Plan, make_record: Callable[..., Record]) -> None:
    out = io.StringIO()
    with display.make_display(plan, Console(file=out, width=40)) as view:
        view(Stage(message="loading"))
        view(RunResumed(run_id=plan.runs[0].run_id, step=3, steps=8))
        view(step(plan.runs[0].run_id, 4))
        view(RunFinished(record=make_record(plan.runs[0].spec)))
    assert isinstance(view, display.LineDisplay)
    assert not set("\x1b\r\b") & set(out.getvalue())
    assert out.getvalue().count("\n") == 3


def test_the_live_table_has_a_line_a_run(plan: Plan, make_record: Callable[..., Record]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30, record=True)
    live = display.LiveDisplay(Board.of(plan), console)
    first, second, _ = plan.runs
    with live:
        live(RunStarted(run_id=first.run_id, steps=8))
        live(step(first.run_id, 1))
        live(step(first.run_id, 2))
        live(RunFinished(record=make_record(second.spec, status="failed", error={"class": "E", "message": "why"})))
        console.print(live.render())
    text = console.export_text()
    assert "attn r4" in text
    assert "2/8" in text
    assert "E: why" in text
    assert "1 failed, 1 training, 1 waiting" in text


def test_more_runs_than_lines_shows_those_that_train(plan: Plan) -> None:
    board = Board.of(plan)
    views = list(board.views.values())
    views[2].state = "training"
    assert display._visible(views, 2) == [views[0], views[2]]


@pytest.fixture
def searched(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Plan:
    """Two arms whose learning rate is tuned."""
    space = (Dimension(key="optim.lr", kind="float", low=1e-5, high=1e-2, log=True),)
    arms = [dataclasses.replace(arm, space=space) for arm in grouped([make_spec(rank=rank) for rank in (4, 8)])]
    return Plan(study=tmp_path, runs=(), arms=tuple(arms), statuses={})


def ended(plan: Plan, number: int, state: str, value: float | None) -> TrialEnded:
    return TrialEnded(
        arm=plan.arms[0].key, number=number, state=state, params={"optim.lr": 0.00123}, value=value, best=0.5,
        best_params={"optim.lr": 0.001}, ended=number + 1, wanted=8,
    )  # fmt: skip


def test_of_a_search_the_lines_tell_trials_and_failures(searched: Plan, make_record: Callable[..., Record]) -> None:
    view, clock, lines = logged(searched, wanted=8)
    spec = searched.arms[0].default
    view(RunQueued(run_id=spec.run_id, spec=spec, arm=searched.arms[0].key))
    view(RunStarted(run_id=spec.run_id, steps=4))
    view(step(spec.run_id, 1))
    view(ended(searched, 0, "completed", 0.75))
    view(ended(searched, 1, "pruned", None))
    view(RunFinished(record=make_record(spec, status="failed", error={"class": "E", "message": "why"})))
    clock.now = 61
    view(step(spec.run_id, 2))
    assert [line.partition("] ")[2] for line in lines()[1:]] == [
        "attn r4 trial 1/8 (optim.lr=0.00123): completed 0.7500; best 0.5000 with optim.lr=0.001",
        "attn r4 trial 2/8 (optim.lr=0.00123): pruned; best 0.5000 with optim.lr=0.001",
        "attn r4 lr=0.001: failed, E: why",
        "step 2 of 4 · 1 failed · 2 tokens/s, 0 of answers · 1:01 so far · 30:30 to go",
    ]


def test_the_live_view_of_a_search_has_a_line_an_arm_and_one_a_running_trial(searched: Plan) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30, record=True)
    live = display.LiveDisplay(Board.of(searched, wanted=8), console)
    spec = searched.arms[0].default
    with live:
        live(RunQueued(run_id=spec.run_id, spec=spec, arm=searched.arms[0].key))
        live(RunStarted(run_id=spec.run_id, steps=4))
        live(step(spec.run_id, 1))
        live(ended(searched, 0, "pruned", None))
        console.print(live.render())
    text = console.export_text()
    arm = [line for line in text.splitlines() if "1/8" in line][-1]
    assert arm.split()[-3:] == ["0", "0.5000", "optim.lr=0.001"]
    assert "lr=0.001" in text
    assert "1/4" in text


def test_arms_that_a_small_terminal_has_no_room_for_are_counted(
    make_spec: Callable[..., RunSpec], searched: Plan
) -> None:
    space = searched.arms[0].space
    arms = [dataclasses.replace(arm, space=space) for arm in grouped([make_spec(rank=rank) for rank in range(1, 8)])]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=8, record=True)
    console.print(display.LiveDisplay(Board.of(dataclasses.replace(searched, arms=tuple(arms))), console).render())
    text = console.export_text()
    assert [f"r{rank} " in text for rank in range(1, 8)] == [True] * 4 + [False] * 3
    assert "and 3 more arms" in text


def test_trials_not_asked_for_yet_count_in_the_time_to_go(searched: Plan) -> None:
    clock = Clock()
    board = Board.of(searched, clock, wanted=8)
    spec = searched.arms[0].default
    board.take(RunQueued(run_id=spec.run_id, spec=spec, arm=searched.arms[0].key))
    board.take(RunStarted(run_id=spec.run_id, steps=4))
    for number in (1, 2):
        clock.now += 1
        board.take(step(spec.run_id, number))
    # left are 2 steps of this trial, 7 trials of its arm and 8 of the other, of 4 steps each
    assert board.eta() == pytest.approx((2 + 28 + 32) * 1 / 2)


def test_runs_that_resume_are_told_in_one_line_before_their_first_step(plan: Plan) -> None:
    view, _, lines = logged(plan)
    first, second, third = plan.runs
    for run, done in ((first, 3), (second, 3), (third, 5)):
        view(RunResumed(run_id=run.run_id, step=done, steps=8))
    assert not lines()
    view(step(first.run_id, 4))
    assert lines()[0] == "[0:00] resuming from step 3 of 8: attn r4, attn r8; resuming from step 5 of 8: attn r16"
    view(step(second.run_id, 4))
    assert sum("resuming" in line for line in lines()) == 1
    assert [one.step for one in view.board.views.values()] == [4, 4, 5]


def scored(spec: RunSpec, make_record: Callable[..., Record], phase: str) -> Evaluated:
    score = make_record(spec).scores["validation"][phase]
    return Evaluated(run_id=spec.run_id, split="validation", phase=phase, score=score)


@pytest.fixture
def midway(plan: Plan, make_record: Callable[..., Record]) -> Board:
    """A run that has ended, one that trains and one that has failed."""
    clock = Clock()
    board = Board.of(plan, clock)
    first, second, third = plan.runs
    for run in (first, second):
        board.take(RunStarted(run_id=run.run_id, steps=8))
        board.take(scored(run.spec, make_record, "before"))
    for number in range(1, 9):
        clock.now += 1
        board.take(step(first.run_id, number))
        if number < 4:
            board.take(step(second.run_id, number))
    board.take(scored(first.spec, make_record, "after"))
    board.take(RunFinished(record=make_record(first.spec)))
    why = "no room for 16 ranks of 512 values on this device"
    board.take(RunFinished(record=make_record(third.spec, status="failed", error={"class": "E", "message": why})))
    return board


SCREENS = {
    40: """\
                              NLL before
run         step   loss          → after
attn r4      8/8  2.000    5.000 → 0.250
attn r8      3/8  2.000    5.000 →     -
attn r16  failed      -
  E: no room for 16 ranks of 512 values…
1 completed, 1 failed, 1 training
143 tokens/s, 43 of answers
0:08 so far · 0:03 to go""",
    80: """\
run         step   loss  NLL before → after   ETA  tokens/s
attn r4      8/8  2.000       5.000 → 0.250             100
attn r8      3/8  2.000       5.000 →     -  0:05       100
attn r16  failed      -
  E: no room for 16 ranks of 512 values on this device
1 completed, 1 failed, 1 training · 143 tokens/s, 43 of answers · 0:08 so far
0:03 to go""",
    120: """\
run         step   loss  NLL before → after   ETA  tokens/s
attn r4      8/8  2.000       5.000 → 0.250             100
attn r8      3/8  2.000       5.000 →     -  0:05       100
attn r16  failed      -
  E: no room for 16 ranks of 512 values on this device
1 completed, 1 failed, 1 training · 143 tokens/s, 43 of answers · 0:08 so far · 0:03 to go""",
}


@pytest.mark.parametrize("width", SCREENS)
def test_step_loss_and_both_scores_are_there_at_every_width(width: int, midway: Board) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=24, record=True)
    console.print(display.LiveDisplay(midway, console).render())
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert "\n".join(lines) == SCREENS[width]
    assert max(map(len, lines)) <= width


def test_names_that_are_too_long_for_a_narrow_terminal_wrap_at_spaces(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    specs = [make_spec(optim={"lr": lr}, seed=seed) for lr in (1e-3, 2e-3) for seed in (0, 1)]
    runs = tuple(Run.of(spec, tmp_path) for spec in specs)
    plan = Plan(study=tmp_path, runs=runs, arms=tuple(grouped(specs)), statuses={run.run_id: None for run in runs})
    board = Board.of(plan, Clock())
    board.take(RunStarted(run_id=runs[0].run_id, steps=4))
    board.take(step(runs[0].run_id, 1))
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=24, record=True)
    console.print(display.LiveDisplay(board, console).render())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 40
    assert any(line.startswith("attn r4 ") for line in lines)
    assert {"lr=0.001", "seed=0", "lr=0.002", "seed=1", "1/4", "2.000"} <= set(" ".join(lines).split())


@pytest.mark.parametrize("height", [8, 10, 24])
def test_the_table_is_no_higher_than_the_terminal(height: int, midway: Board) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=height, record=True)
    console.print(display.LiveDisplay(midway, console).render())
    assert len(console.export_text().splitlines()) <= height


@pytest.mark.parametrize("done", [False, True])
def test_the_table_of_a_sweep_that_was_stopped_stays(
    done: bool, plan: Plan, make_record: Callable[..., Record]
) -> None:
    out = io.StringIO()
    live = display.LiveDisplay(Board.of(plan), Console(file=out, force_terminal=True, width=80, height=24))
    with live:
        for run in plan.runs:
            live(RunStarted(run_id=run.run_id, steps=8))
            live(step(run.run_id, 1))
            if done:
                live(RunFinished(record=make_record(run.spec)))
    assert live.live.transient == done
    text = out.getvalue()
    after = text[text.rindex("\x1b[?25h") :]  # the cursor is back, and what was drawn is taken away or not
    assert ("\x1b[2K" in after) == done
    assert ("3 stopped" in text) != done


def test_the_time_to_go_counts_a_step_by_what_it_costs(plan: Plan) -> None:
    clock = Clock()
    costs = {arm.key: cost for arm, cost in zip(plan.arms, (1.0, 1.0, 10.0), strict=True)}
    runs = [dataclasses.replace(run, arm=arm.key) for run, arm in zip(plan.runs, plan.arms, strict=True)]
    board = Board.of(dataclasses.replace(plan, runs=tuple(runs)), clock, costs=costs)
    board.take(RunStarted(run_id=runs[0].run_id, steps=8))
    for number in range(1, 9):
        board.take(step(runs[0].run_id, number))
        clock.now += 1
    board.take(RunStarted(run_id=runs[1].run_id, steps=8))
    assert board.eta() == pytest.approx(8 + 80)


@pytest.mark.parametrize("live", [False, True])
def test_a_remark_is_made_once_and_stays(live: bool, plan: Plan, searched: Plan) -> None:
    """Of a grid and of a search; workers may each make it."""
    for one in (plan, searched):
        out = io.StringIO()
        console = Console(file=out, width=40, force_terminal=live)
        view = display.LiveDisplay(Board.of(one), console) if live else display.LineDisplay(Board.of(one), console)
        with view:
            for message in ("2 of 9 [examples] are left out", "another", "2 of 9 [examples] are left out"):
                view(Remark(message=message))
        assert out.getvalue().count("2 of 9 [examples] are left out") == 1
        assert out.getvalue().count("another") == 1


def test_a_notebook_has_one_output_that_is_drawn_again(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[dict[str, str]] = []

    class Output:
        def update(self, page: dict[str, str], *, raw: bool) -> None:
            pages.append(page)

    def show(page: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        pages.append(page)
        return Output()

    module = SimpleNamespace(display=show)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    console = Console(file=io.StringIO(), force_jupyter=True)
    with display.make_display(plan, console) as view:
        assert isinstance(view, display.NotebookDisplay)
        view.drawn, view.board.clock = 0.0, (clock := Clock())
        run_id = plan.runs[0].run_id
        view(RunStarted(run_id=run_id, steps=8))
        for number in range(1, 5):
            clock.now += 0.25
            view(step(run_id, number, loss=1.5))
    assert len(pages) == 4  # first, at 0.5 and 1.0 seconds, last
    assert "attn r4" in pages[-1]["text/plain"]
    assert "4/8" in pages[-1]["text/plain"]
    assert pages[0]["text/plain"].splitlines()[0].strip() != pages[-1]["text/plain"].splitlines()[0].strip()
    assert pages[-1]["text/html"].startswith("<pre>")
