"""The engine asks for runs as slots fall free, prunes when told, and puts off what cannot join the pack."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from sweeper import record, tasks
from sweeper.arms import Arm, Dimension
from sweeper.errors import DataError, RunsFailed
from sweeper.run import Run
from sweeper.spec import DatasetSpec, RunSpec, Settings
from sweeper.study import launch
from sweeper.study.search_settings import SearchSettings
from sweeper.training import train_runs, trainer
from sweeper.training.events import Evaluated, Event, RunFinished, RunStarted, Stage
from sweeper.training.source import PendingGroup, Pulled


class Script:
    """Hands out runs in order, at most `at_once` unfinished ones, all of one kind; prunes what it is told to."""

    def __init__(self, specs: Sequence[RunSpec], folder: Path, at_once: int, prune: Collection[str]) -> None:
        self.runs = [Run.of(s, folder, arm="all") for s in specs]
        self.spec, self.at_once, self.out, self.prune = specs[0], at_once, 0, set[str]()
        self.to_be_pruned = set(prune)
        self.events: list[Event] = []

    def pending(self) -> list[PendingGroup]:
        return [PendingGroup(key="all", spec=self.spec, most=self.at_once)] if self.runs else []

    def pull(self, count: int, kinds: Collection[str]) -> Pulled:
        count = max(0, min(count, self.at_once - self.out))
        given, self.runs = self.runs[:count], self.runs[count:]
        self.out += len(given)
        return Pulled(runs=tuple(given), more=bool(self.runs))

    def to_prune(self) -> Collection[str]:
        return self.prune

    def report(self, event: Event) -> None:
        self.events.append(event)
        self.out -= isinstance(event, RunFinished)
        if isinstance(event, Evaluated) and event.phase.isdigit() and event.run_id in self.to_be_pruned:
            self.prune.add(event.run_id)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Event]]:
    """Trains a script's runs; `prune` are ids that are pruned after their first score midway."""
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))

    def go(specs: Sequence[RunSpec], study: str, *, at_once: int, prune: Collection[str] = ()) -> list[Event]:
        settings = Settings(study=study, output_root=str(tmp_path), device="cpu", calibrate=False)
        script = Script(specs, settings.folder, at_once, prune)
        train_runs(script, settings)
        return script.events

    return go


def losses(folder: Path) -> list[float]:
    return [
        row["loss"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if "loss" in (row := json.loads(line))
    ]


def most_at_once(events: Sequence[Event]) -> int:
    now = most = 0
    for event in events:
        now += isinstance(event, RunStarted) - isinstance(event, RunFinished)
        most = max(most, now)
    return most


def test_a_slot_goes_to_the_next_run_and_all_train_as_alone(
    play: Any, run_all: Any, make_run: Callable[..., RunSpec], tmp_path: Path
) -> None:
    specs = [
        make_run(name, rank=rank, optim={"lr": lr}, trainer={"max_steps": steps})
        for name, rank, lr, steps in [
            ("attn", 4, 1e-2, 4),
            ("ff", 8, 3e-3, 7),
            ("full", 2, 1e-3, 3),
            ("attn", 8, 1e-2, 5),
        ]
    ]
    events = play(specs, "pulled", at_once=2)
    assert most_at_once(events) == 2
    run_all(specs, "alone", max_pack=1)
    for spec in specs:
        assert losses(tmp_path / "pulled" / spec.run_id) == pytest.approx(
            losses(tmp_path / "alone" / spec.run_id), rel=1e-5
        )
        assert record.status(tmp_path / "pulled" / spec.run_id) == "completed"


def test_a_pruned_run_leaves_its_slot_and_touches_no_other(play: Any, make_run: Any, tmp_path: Path) -> None:
    specs = [
        make_run("attn", optim={"lr": lr}, trainer={"max_steps": 8}, evaluation={"every_steps": 2})
        for lr in (1e-2, 3e-3, 1e-3)
    ]
    play(specs, "whole", at_once=2)
    events = play(specs, "pruned", at_once=2, prune={specs[0].run_id})
    ended = [event.record.run_id for event in events if isinstance(event, RunFinished)]
    assert ended[0] == specs[0].run_id
    first = record.read_record(tmp_path / "pruned" / specs[0].run_id)
    assert (first.status, first.steps) == ("pruned", 2)
    assert set(first.scores["validation"]) == {"before"}
    left = {path.name for path in (tmp_path / "pruned" / specs[0].run_id).iterdir()}
    assert left == {"record.json", "metrics.jsonl", "predictions.jsonl"}
    assert first.efficiency.adapter_bytes == 0
    for spec in specs[1:]:
        one, two = (record.read_record(tmp_path / study / spec.run_id) for study in ("whole", "pruned"))
        assert (one.status, one.steps) == (two.status, two.steps) == ("completed", 8)
        assert losses(tmp_path / "whole" / spec.run_id) == pytest.approx(
            losses(tmp_path / "pruned" / spec.run_id), rel=1e-5
        )


def test_a_run_of_another_batch_size_waits_for_a_pack_of_its_own(play: Any, make_run: Any, tmp_path: Path) -> None:
    specs = [
        make_run("attn", trainer={"max_steps": 4, "batch_size": size}, seed=seed)
        for seed, size in enumerate((2, 3, 2, 3))
    ]
    events = play(specs, "mixed", at_once=4)
    assert {event.record.status for event in events if isinstance(event, RunFinished)} == {"completed"}
    assert len(list((tmp_path / "mixed").glob("*/record.json"))) == 4
    assert most_at_once(events) == 2


def test_a_run_of_another_model_waits_until_its_model_is_loaded(play: Any, make_run: Any, tmp_path: Path) -> None:
    other = make_run("attn").model
    config = {**other.config, "num_hidden_layers": 1}
    changed = make_run("attn", model={"name": "shallow", "config": config})
    events = play([make_run("attn"), changed, make_run("ff")], "models", at_once=3)
    assert {event.record.status for event in events if isinstance(event, RunFinished)} == {"completed"}
    assert sum(isinstance(event, Stage) and "loading" in event.message for event in events) == 2


@pytest.mark.parametrize("what", ["batch size", "model"])
def test_what_was_put_off_goes_first_where_all_else_waits_for_it(
    what: str, play: Any, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: dict[str, Any] = {"trainer": {"max_steps": 2, "batch_size": 7}}
    if what == "model":
        other = {"model": {"name": "shallow", "config": {**make_run("attn").model.config, "num_hidden_layers": 1}}}
    monkeypatch.setattr(trainer.time, "sleep", lambda _: pytest.fail("nothing moves"))
    specs = [make_run("attn", trainer={"max_steps": 2}), make_run("attn", **other), make_run("ff")]
    play(specs, "waiting", at_once=1)
    assert len(list((tmp_path / "waiting").glob("*/record.json"))) == 3


def tuned(make_run: Callable[..., RunSpec], name: str) -> Arm:
    space = (Dimension(key="optim.lr", kind="float", low=1e-4, high=1e-1, log=True),)
    changes: dict[str, Any] = {"trainer": {"max_steps": 12}, "evaluation": {"every_steps": 3}}

    def make(params: Any, seed: int) -> RunSpec:
        return make_run(name, seed=seed, optim={"lr": params["optim.lr"]}, **changes)

    return Arm(defaults=(make_run(name, seed=0, **changes),), space=space, make=make)


def test_a_real_search_prunes_confirms_and_resumes(
    make_run: Callable[..., RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    settings = Settings(study="search", output_root=str(tmp_path), device="cpu", calibrate=False)
    arms = [tuned(make_run, name) for name in ("attn", "ff")]
    how = SearchSettings(n_trials=6, pruner="asha", confirm_seeds=(1, 2))
    chosen = launch.train(arms, settings, how)
    found = list(record.records(settings.folder))
    assert len(found) == 2 * 6 + 2 * 2
    assert "pruned" in {one.status for one in found}
    assert {one.search["purpose"] for one in chosen.values()} == {"confirm"}
    assert len(chosen) == 4
    capsys.readouterr()
    assert launch.train(arms, settings, how) == chosen
    assert "nothing to train" in capsys.readouterr().out


def test_a_tuned_value_no_run_can_have_fails_its_trials_and_no_other(
    make_run: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with these comes out only when their data is read."""
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    read = tasks.load

    def torn(spec: DatasetSpec) -> Any:
        if spec.split_seed == 1:
            raise DataError("a file is damaged")
        return read(spec)

    monkeypatch.setattr(tasks, "load", torn)
    settings = Settings(study="search", output_root=str(tmp_path), device="cpu", calibrate=False)
    space = (Dimension(key="dataset.split_seed", kind="choice", choices=(0, 1)),)
    arm = Arm(
        defaults=(make_run("attn"),), space=space,
        make=lambda params, seed: make_run("attn", dataset={"split_seed": params["dataset.split_seed"]}, seed=seed),
    )  # fmt: skip
    with pytest.raises(RunsFailed, match="a file is damaged"):
        launch.train([arm], settings, SearchSettings(n_trials=2))
    assert sorted(one.status for one in record.records(settings.folder)) == ["completed", "failed"]
