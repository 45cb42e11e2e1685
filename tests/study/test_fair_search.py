"""Searches that are fair to every arm: grids widened until the best is interior, its neighbours trained whole."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from sweeper import config, record
from sweeper.arms import Dimension
from sweeper.errors import Problems, RunsFailed
from sweeper.record import SEARCHES, Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import plan as planning
from sweeper.study.forecast import runs_of
from sweeper.study.scheduler import Scheduler
from sweeper.study.search_settings import SearchSettings
from tests.study.bowl import BowlEngine

GRID = "optim.lr=tag(tune,choice(1e-4,3e-4,1e-3,3e-3,1e-2))"
LR = "optim.lr=tag(log,interval(1e-5,1e-1))"
PRUNED = ["trainer.max_steps=9", "evaluation.every_steps=1"]


def of_placements(best: dict[str, float]) -> Callable[..., float]:
    """A bowl whose lowest point is at 10 to the given power."""
    return lambda spec, share=1.0: 1 + (math.log10(spec.optim.lr) - best[spec.placement.name]) ** 2 + (1 - share)


def named(study: Settings, name: str) -> Settings:
    return dataclasses.replace(study, study=name)


def facts(study: Settings) -> dict[str, dict[str, Any]]:
    found = json.loads((study.folder / SEARCHES).read_text())
    return {one["arm"].split()[0]: one for one in found.values()}


def rates(bowl: BowlEngine, placement: str) -> list[float]:
    return sorted(spec.optim.lr for spec in bowl.trained if spec.placement.name == placement and spec.seed == 0)


def test_a_grid_goes_on_in_its_own_rhythm_at_both_ends() -> None:
    grid = Dimension(key="optim.lr", kind="choice", choices=(3e-4, 1e-3, 3e-3))
    assert grid.widened("high").choices == (3e-4, 1e-3, 3e-3, 1e-2)
    assert grid.widened("low").choices == (1e-4, 3e-4, 1e-3, 3e-3)
    assert grid.widened("low").widened("low").choices[0] == 3e-5
    assert [grid.edge(value) for value in grid.choices] == ["low", None, "high"]
    ranks = Dimension(key="rank", kind="choice", choices=(4, 8, 16))
    assert ranks.widened("high").choices == (4, 8, 16, 32)
    assert ranks.widened("low").choices == (2, 4, 8, 16)
    even = Dimension(key="x", kind="choice", choices=(0.0, 0.1, 0.2))
    assert even.widened("high").choices[-1] == pytest.approx(0.3)
    words = Dimension(key="placement", kind="choice", choices=("attn", "ff"))
    assert words.edge("ff") is None
    assert words.widened("high") == words


def test_a_grid_is_widened_until_the_best_is_interior_and_at_most_as_often_as_asked(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.study.bowl.loss", of_placements({"attn": -3.0, "ff": -1.6, "full": -7.0}))
    axes = ["experiment=smoke", "placement=attn,ff,full", "rank=4", GRID]
    chosen = go(axes, widen=2, confirm_seeds=(1, 2))
    assert rates(bowl, "attn") == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert rates(bowl, "ff") == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert rates(bowl, "full") == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    found = facts(study)
    assert {name: one["widened"] for name, one in found.items()} == {"attn": 0, "ff": 2, "full": 2}
    assert found["ff"]["sides"] == [{"optim.lr": "high"}, {"optim.lr": "high"}]
    assert found["ff"]["edges"] == {}
    assert found["full"]["edges"] == {"optim.lr": "low"}
    assert {one["may_widen"] for one in found.values()} == {2}
    told = {one.spec["placement"]["name"]: one.search for one in chosen.values()}
    assert told["ff"]["widened"] == 2
    assert told["full"]["edges"] == {"optim.lr": "low"}

    trained = len(bowl.trained)
    assert go(axes, widen=2, confirm_seeds=(1, 2)) == chosen
    assert len(bowl.trained) == trained
    assert facts(study) == found


def test_what_other_commands_searched_stays_in_the_file(go: Any, study: Settings) -> None:
    for placement in ("attn", "ff"):
        go(["experiment=smoke", f"placement={placement}", "rank=4", GRID])
    assert set(facts(study)) == {"attn", "ff"}


def late(spec: RunSpec, share: float = 1.0) -> float:
    """High rates are behind until the end, where they win: what a pruner that looks on the way gets wrong."""
    rate = math.log10(spec.optim.lr)
    return 1 + (rate + 2) ** 2 * share + (rate + 4) ** 2 * (1 - share) + (1 - share)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_neighbours_of_the_best_are_finished_until_none_beats_it(
    pruner: str, go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.study.bowl.loss", late)
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR, *PRUNED]
    (alone,) = go(axes, named(study, "alone"), n_trials=12, pruner=pruner, finish=0, sampler="qmc").values()
    (whole,) = go(axes, named(study, "whole"), n_trials=12, sampler="qmc").values()
    bowl.trained.clear()
    bowl.pruned.clear()
    (fair,) = go(axes, n_trials=12, pruner=pruner, finish=12, sampler="qmc").values()

    def nll(one: Record) -> float:
        return one.scores["validation"]["after"].nll

    assert nll(alone) > nll(whole)
    assert nll(fair) == nll(whole)
    found = facts(study)["attn"]
    again = [spec for spec in bowl.trained if spec in bowl.pruned]
    assert found["finished"] == len(again) > 0
    assert found["pruned_beside_best"] == 0
    for spec in again:
        left = record.read_record(study.folder / spec.run_id)
        assert (left.status, left.search["purpose"]) == ("completed", "finish")
        assert 0 < left.search["pruned_at"] < 9

    trained = len(bowl.trained)
    go(axes, n_trials=12, pruner=pruner, finish=12, sampler="qmc")
    assert len(bowl.trained) == trained


def test_no_more_are_finished_than_asked_and_what_stays_pruned_is_told(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.study.bowl.loss", late)
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR, *PRUNED]
    go(axes, n_trials=12, pruner="asha", finish=1, sampler="qmc")
    found = facts(study)["attn"]
    assert found["finished"] == 1
    assert found["pruned_beside_best"] > 0
    assert f"{found['pruned_beside_best']} beside the best still pruned" in capsys.readouterr().out


def test_a_command_killed_while_it_finishes_goes_on_and_repeats_nothing(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.study.bowl.loss", late)
    monkeypatch.setattr(Scheduler, "close", lambda self: self.claims.close())
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR, "seed=0,1", *PRUNED]
    search: dict[str, Any] = {"n_trials": 12, "pruner": "asha", "sampler": "qmc", "confirm_seeds": (5, 6)}
    go(axes, named(study, "undisturbed"), **search)
    undisturbed = [spec.run_id for spec in bowl.trained]
    whole = sum(spec not in bowl.pruned and spec.seed < 2 for spec in bowl.trained)
    bowl.trained.clear()
    bowl.stop_after = whole + 1
    with pytest.raises(SystemExit):
        go(axes, **search)
    bowl.stop_after = math.inf
    go(axes, **search)
    assert sorted(spec.run_id for spec in bowl.trained) == sorted(undisturbed)


def test_a_trial_that_fails_when_it_is_finished_ends_no_search(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.study.bowl.loss", late)
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR, *PRUNED]
    bowl.fail = lambda spec: spec in bowl.pruned
    with pytest.raises(RunsFailed, match="runs failed"):
        go(axes, n_trials=12, pruner="asha", sampler="qmc", confirm_seeds=(5,))
    assert facts(study)["attn"]["finished"] == 0
    assert any(spec.seed == 5 for spec in bowl.trained)
    bowl.fail = lambda spec: False
    go(axes, n_trials=12, pruner="asha", sampler="qmc", confirm_seeds=(5,))
    assert facts(study)["attn"]["finished"] > 0


def test_two_commands_finish_a_trial_once(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one finds the first one's claim, leaves the arm open, and confirms nothing before its time."""
    monkeypatch.setattr("tests.study.bowl.loss", late)
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR, *PRUNED]
    search: dict[str, Any] = {"n_trials": 12, "pruner": "asha", "sampler": "qmc", "confirm_seeds": (5,)}
    seen: list[int] = []

    class Other(BowlEngine):
        def __call__(self, source: Any, settings: Settings, *, should_stop: Callable[[], bool]) -> None:
            super().__call__(Watched(source), settings, should_stop=should_stop)

    class Watched:
        def __init__(self, source: Any) -> None:
            self.source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

        def pull(self, count: int, groups: Any) -> Any:
            pulled = self.source.pull(count, groups)
            if any(run.search.get("purpose") == "finish" for run in pulled.runs) and not seen:
                seen.append(len(pulled.runs))
                go(axes, engine=bowl, **search)
                assert not [spec for spec in bowl.trained if spec.run_id in {run.run_id for run in pulled.runs}]
                assert not [spec for spec in bowl.trained if spec.seed == 5]
            return pulled

    first = Other(bowl.make_record)
    go(axes, engine=first, **search)
    assert seen
    assert [spec.seed for spec in first.trained].count(5) == 1


def test_a_plan_says_how_many_runs_there_are_at_least_and_at_most(composer: Any) -> None:
    def counts(*axes: str, **search: Any) -> tuple[int, int]:
        (arm,) = config.expand(["experiment=smoke", "placement=attn", "rank=4", *axes], composer).arms
        return runs_of(arm, SearchSettings(**search))

    assert counts("seed=0,1") == (2, 2)
    assert counts(GRID, widen=2, confirm_seeds=(1, 2, 3)) == (8, 10)
    assert counts(LR, "seed=0,1", n_trials=8, widen=1) == (16, 24)
    assert counts(LR, n_trials=8, pruner="asha", finish=3) == (8, 11)


def test_a_plain_grid_of_a_search_to_confirm_is_told_how_to_go_on(composer: Any, study: Settings) -> None:
    found = config.expand(["experiment=smoke", "placement=attn", "rank=4"], composer)
    with pytest.raises(Problems, match=r"or give hydra\.sweeper\.confirm_seeds=null"):
        planning.make(found.arms, study, SearchSettings(confirm_seeds=(1, 2)))
