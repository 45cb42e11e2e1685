"""Trackers get configuration, curves and summary of every run, several at once, without a network."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeper.arms import grouped
from sweeper.errors import SpecError
from sweeper.record import WANDB_ID, Record
from sweeper.reporting import tracking
from sweeper.reporting.trackers import wandb_log
from sweeper.reporting.trackers.log import Begun
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings
from sweeper.study.plan import Plan
from sweeper.training.events import Evaluated, RunFinished, RunQueued, RunStarted, Step


@pytest.fixture
def plan(make_spec: Callable[..., RunSpec], study: Settings) -> Plan:
    specs = [make_spec(rank=rank) for rank in (4, 8)]
    runs = [Run.of(s, study.folder) for s in specs]
    return Plan(
        study=study.folder, runs=tuple(runs), arms=tuple(grouped(specs)), statuses={run.run_id: None for run in runs}
    )


def play(tracker: tracking.Tracker, plan: Plan, make_record: Callable[..., Record]) -> None:
    """Two runs in step, as in a pack; the second one is stopped."""
    first, _ = plan.runs
    for run in plan.runs:
        tracker(RunQueued(run_id=run.run_id, spec=run.spec, arm=""))
        tracker(RunStarted(run_id=run.run_id, steps=2))
    for number in (1, 2):
        for run in plan.runs:
            loss = 5.0 / number
            tracker(
                Step(
                    run_id=run.run_id,
                    step=number,
                    loss=loss,
                    lr=0.1,
                    grad_norm=1.0,
                    tokens=10,
                    answer_tokens=4,
                    seconds=0.5,
                )
            )
    done = make_record(first.spec)
    score = done.scores["validation"]["after"]
    tracker(Evaluated(run_id=first.run_id, split="validation", phase="after", score=score))
    tracker(RunFinished(record=done))
    tracker.close()
    assert not tracker.logs


class MemoryLog:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, float] | None = None
        self.failed: bool | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self.summary, self.failed = dict(summary), failed


def track(plan: Plan, settings: Settings, make_record: Callable[..., Record]) -> None:
    tracker = tracking.make(plan.fields, settings)
    assert tracker is not None
    play(tracker, plan, make_record)


def test_each_run_has_its_own_log(plan: Plan, make_record: Callable[..., Record]) -> None:
    logs: dict[str, MemoryLog] = {}

    def open_log(run: Begun) -> MemoryLog:
        assert run.config["rank"] in (4, 8)
        assert run.label == run.arm == f"attn r{run.config['rank']}"
        return logs.setdefault(run.run_id, MemoryLog())

    play(tracking.Tracker(plan.fields, open_log), plan, make_record)
    first, second = (logs[run.run_id] for run in plan.runs)
    assert [step for step, _ in first.rows] == [1, 2, 2]
    assert first.rows[0][1] == {
        "train/loss": 5.0,
        "train/lr": 0.1,
        "train/grad_norm": 1.0,
        "train/tokens_per_second": 20.0,
        "train/answer_tokens_per_second": 8.0,
    }
    assert first.rows[2][1]["validation/nll"] == 0.25
    assert first.summary is not None
    assert first.summary["validation/nll_after"] == 0.25
    assert (first.failed, second.failed) == (False, True)


def test_tensorboard_files_hold_curves_and_summary(
    plan: Plan, study: Settings, make_record: Callable[..., Record]
) -> None:
    settings = replace(study, tracking="tensorboard", tracking_options={"every_steps": 1})
    tracking.check(settings)
    track(plan, settings, make_record)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted((plan.study / "tensorboard").iterdir())
    assert [folder.name.split("-")[0] for folder in folders] == ["attn_r4", "attn_r8"]
    read = EventAccumulator(str(folders[0])).Reload()
    assert [event.value for event in read.Scalars("train/loss")] == [5.0, 2.5]
    assert read.Scalars("summary/validation/nll_after")[0].value == 0.25


@pytest.mark.slow
def test_wandb_offline_runs_live_side_by_side(
    plan: Plan, study: Settings, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    options = {"mode": "offline", "project": "p", "entity": None, "every_steps": 1}
    settings = replace(study, tracking="wandb", tracking_options=options)
    tracking.check(settings)
    track(plan, settings, make_record)
    runs = sorted((plan.study / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(list(run.glob("*.wandb")) for run in runs)
    ids = {json.loads((run.folder / WANDB_ID).read_text())["id"] for run in plan.runs}
    assert {run.name.rsplit("-", 1)[1] for run in runs} == ids


def test_a_resumed_run_goes_on_in_its_wandb_run(
    plan: Plan, study: Settings, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, which lies in the run's folder; a run in another study is another one."""
    import wandb

    begun: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        begun.append(arguments)
        return SimpleNamespace(log=lambda *_, **__: None, summary={}, finish=lambda **_: None)

    monkeypatch.setattr(wandb, "init", init)
    for settings in (study, study, replace(study, study="other")):
        track(plan, replace(settings, tracking="wandb"), make_record)
    first, again, other = ([one["id"] for one in begun[place : place + 2]] for place in (0, 2, 4))
    assert first == again
    assert len({*first, *other}) == 4
    assert {one["resume"] for one in begun} == {"allow"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 3}'])
def test_a_damaged_note_of_the_wandb_run_begins_a_new_one(content: str, tmp_path: Path) -> None:
    (tmp_path / WANDB_ID).write_text(content)
    assert wandb_log.run_id_of(tmp_path) == wandb_log.run_id_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tracking": "wanb"},
            "tracking=wanb: no such tracking. Choose from mlflow, none, tensorboard, trackio, wandb. Did you mean ",
        ),
        ({"tracking": "wandb", "tracking_options": {"projct": 1}}, "tracking.projct: no such field"),
        ({"tracking": "wandb", "tracking_options": {"mode": "onlin"}}, "tracking.mode=onlin: no such mode of wandb."),
        ({"tracking": "tensorboard", "tracking_options": {"every_steps": 0}}, "must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str, study: Settings) -> None:
    with pytest.raises(SpecError, match=message.replace(".", r"\.").replace("?", r"\?")):
        tracking.check(replace(study, **changes))


def test_wandb_without_an_account_is_met_before_work(study: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **_: False)
    online = replace(study, tracking="wandb", tracking_options={"mode": "online"})
    with pytest.raises(SpecError, match="wandb knows no account here: wandb login, or WANDB_MODE=offline"):
        tracking.check(online)


def test_wandb_that_cannot_begin_says_so_in_one_line(
    plan: Plan, study: Settings, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network\nand more")

    monkeypatch.setattr(wandb, "init", refuse)
    said: list[str] = []
    tracker = tracking.make(plan.fields, replace(study, tracking="wandb"), said.append)
    assert tracker is not None
    for run in plan.runs:
        tracker(RunQueued(run_id=run.run_id, spec=run.spec, arm=""))
        tracker(RunStarted(run_id=run.run_id, steps=2))
    tracker.close()
    reason = "tracking=wandb cannot begin a run: no network. WANDB_MODE=offline needs no network."
    assert said == [f"tracking: {run.run_id} is not logged from here on ({reason})" for run in plan.runs]


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_log_that_raises_ends_alone(when: str, plan: Plan, make_record: Callable[..., Record]) -> None:
    logs: dict[str, MemoryLog] = {}
    bad = plan.runs[0].run_id

    class Broken(MemoryLog):
        def log(self, values: Mapping[str, float], step: int) -> None:
            if when == "log" and step == 2:
                raise BrokenPipeError("the service is gone")
            super().log(values, step)

        def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
            raise BrokenPipeError("the service is gone")

    def open_log(run: Begun) -> MemoryLog:
        if when == "open" and run.run_id == bad:
            raise BrokenPipeError("the service is gone")
        return logs.setdefault(run.run_id, Broken() if run.run_id == bad else MemoryLog())

    said: list[str] = []
    play(tracking.Tracker([], open_log, say=said.append), plan, make_record)
    assert said == [f"tracking: {bad} is not logged from here on (BrokenPipeError: the service is gone)"]
    other = logs[plan.runs[1].run_id]
    assert [step for step, _ in other.rows] == [1, 2]
    assert other.failed


def test_a_tracker_that_logs_nothing_is_not_asked_for_ever(make_spec: Callable[..., RunSpec]) -> None:
    """Each try may take a minute of a network that is not there."""
    asked: list[str] = []

    def open_log(run: Begun) -> MemoryLog:
        asked.append(run.run_id)
        raise TimeoutError("no answer")

    said: list[str] = []
    tracker = tracking.Tracker([], open_log, say=said.append)
    for rank in range(1, 9):
        spec = make_spec(rank=rank)
        tracker(RunQueued(run_id=spec.run_id, spec=spec, arm=""))
        tracker(RunStarted(run_id=spec.run_id, steps=2))
    tracker.close()
    assert len(asked) == len(said) == tracking.MOST_LOST
    assert said[-1].endswith("; nor are runs that begin later")


def test_a_tracker_that_cannot_be_used_is_met_before_work(study: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ImportError("libprotobuf is of another version")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", replace(wandb_log.KIND, open=broken))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"^tracking=wandb cannot be used here: libprotobuf is of another version$"):
        tracking.make([], replace(study, tracking="wandb"))


def test_a_tracker_that_is_not_installed_says_how(study: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SpecError,
        match=r"needs the package wandb: \S+ -m pip install -e '\.\[wandb\]' -c constraints\.txt, or tracking=none",
    ):
        tracking.check(replace(study, tracking="wandb"))


def test_summary_is_plain_numbers(make_record: Callable[..., Record]) -> None:
    assert json.loads(json.dumps(tracking.summary(make_record())))["test/exact_match_after"] == 0.75
