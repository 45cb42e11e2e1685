"""The search inside arms: how many trials, what is asked again, what is pruned, and what a repeated command does."""

import contextlib
import dataclasses
import math
import shlex
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from sweeper import config, record
from sweeper.errors import Problems, RunsFailed, SpecError
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import plan as planning
from sweeper.study import storage
from sweeper.study.scheduler import Scheduler
from sweeper.study.search import ArmSearch, Told, Trial
from sweeper.study.search_settings import SearchSettings
from tests.study.bowl import BowlEngine, loss

LR = "optim.lr=tag(log,interval(1e-5,1e-1))"
GRID = ["experiment=smoke", "placement=attn,ff,full", "rank=4,8,16"]


def studies(settings: Settings) -> list[optuna.Study]:
    kept = storage.open_storage(SearchSettings(), settings.folder)
    return [optuna.load_study(study_name=name, storage=kept) for name in optuna.get_all_study_names(kept)]


def test_a_grid_is_every_combination_once_and_a_search_is_as_many_trials_in_every_arm(
    go: Any, bowl: BowlEngine, study: Settings
) -> None:
    go(GRID)
    assert len(bowl.trained) == 9
    bowl.trained.clear()
    chosen = go([*GRID, LR, "seed=0,1"], dataclasses.replace(study, study="search"), n_trials=8)
    assert len(bowl.trained) == 9 * 8 * 2
    per_arm: dict[tuple[str, int], set[float]] = {}
    for spec in bowl.trained:
        per_arm.setdefault((spec.placement.name, spec.rank), set()).add(spec.optim.lr)
    assert {len(rates) for rates in per_arm.values()} == {8}
    assert len(per_arm) == 9
    assert all(1e-3 in rates for rates in per_arm.values())  # the default comes first
    assert len(chosen) == 18
    assert len(studies(dataclasses.replace(study, study="search"))) == 9


def test_a_range_of_some_methods_is_announced_with_their_names(
    go: Any, bowl: BowlEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = "optim.lr=tag(log,method,interval(1e-4,1e-2))"
    go(["experiment=smoke", "placement=attn", "rank=4", "method=lora,rslora,lora_plus", tuned], n_trials=1)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith(
        "optim.lr from 0.0001 to 0.01, log scale (method=lora,rslora); "
        "optim.lr from 2e-05 to 0.002, log scale (method=lora_plus)"
    )


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random", "qmc", "nsga2"])
def test_every_sampler_searches_and_tuning_is_per_arm(sampler: str, go: Any, bowl: BowlEngine) -> None:
    chosen = go(["experiment=smoke", "placement=attn,ff", "rank=4", LR, "optim.weight_decay=interval(0,0.1)"],
                n_trials=12, sampler=sampler)  # fmt: skip
    assert len(bowl.trained) == len({spec.run_id for spec in bowl.trained}) == 24
    rates = {one.spec["placement"]["name"]: one.spec["optim"]["lr"] for one in chosen.values()}
    best = {name: min((loss(s), s.optim.lr) for s in bowl.trained if s.placement.name == name)[1] for name in rates}
    assert rates == best


def test_a_command_that_is_done_does_nothing_and_says_so(
    go: Any, bowl: BowlEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    first = go([*GRID[:2], "rank=4", LR], n_trials=5)
    trained = len(bowl.trained)
    capsys.readouterr()
    assert go([*GRID[:2], "rank=4", LR], n_trials=5) == first
    assert len(bowl.trained) == trained == 15
    assert capsys.readouterr().out.startswith("every trial that the budget allows is done; nothing to train\n")


def test_more_trials_and_more_seeds_extend(go: Any, bowl: BowlEngine) -> None:
    axes = ["experiment=smoke", "placement=attn,ff", "rank=4", LR]
    go(axes, n_trials=4)
    go(axes, n_trials=7)
    assert len({spec.run_id for spec in bowl.trained}) == len(bowl.trained) == 14
    go([*axes, "seed=0,1"], n_trials=7)
    assert len({spec.run_id for spec in bowl.trained}) == len(bowl.trained) == 28


def test_another_space_or_objective_starts_a_study_beside_the_old(go: Any, study: Settings) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4"]
    go([*axes, LR], n_trials=3)
    go([*axes, "optim.lr=tag(log,interval(1e-4,1e-2))"], n_trials=3)
    go([*axes, LR], n_trials=3, objectives=("validation.exact_match",))
    assert len(studies(study)) == 3


def test_a_finite_space_is_not_asked_twice(go: Any, bowl: BowlEngine) -> None:
    go(
        ["experiment=smoke", "placement=attn", "rank=tag(tune,choice(4,8))", "optim.lr=tag(tune,choice(1e-3,1e-2))"],
        n_trials=9,
    )
    assert len({spec.run_id for spec in bowl.trained}) == len(bowl.trained) == 4


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_after_a_crash_nothing_is_lost_and_nothing_is_done_twice(
    sampler: str, go: Any, bowl: BowlEngine, study: Settings, make_record: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    axes = ["experiment=smoke", "placement=attn,ff", "rank=4", LR, "seed=0,1"]
    undisturbed = BowlEngine(make_record)
    go(axes, dataclasses.replace(study, study="undisturbed"), undisturbed, n_trials=6, sampler=sampler)
    for bowl.stop_after in (1, 4, 5, 11, 17):
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "close", lambda self: None)  # a process that is killed closes nothing
            with pytest.raises(SystemExit):
                go(axes, n_trials=6, sampler=sampler)
        monkeypatch.setattr("sweeper.study.search.alive", lambda trial: False)
    bowl.stop_after = math.inf
    go(axes, n_trials=6, sampler=sampler)
    assert len({spec.run_id for spec in bowl.trained}) == len(bowl.trained) == 24
    if sampler == "random":
        assert {spec.run_id for spec in bowl.trained} == {spec.run_id for spec in undisturbed.trained}
    for one in studies(study):
        assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in one.get_trials()) == 6
        assert not any(trial.state == optuna.trial.TrialState.RUNNING for trial in one.get_trials())


def test_a_stopped_trial_goes_on_from_where_it_is(go: Any, bowl: BowlEngine) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    bowl.stop_after = 2
    with pytest.raises(SystemExit):
        go(axes, n_trials=6)
    bowl.stop_after = math.inf
    go(axes, n_trials=6)
    assert len({spec.run_id for spec in bowl.trained}) == len(bowl.trained) == 6


def test_the_best_trial_is_confirmed_on_fresh_seeds_and_only_that_stands_for_the_arm(go: Any, bowl: BowlEngine) -> None:
    chosen = go(["experiment=smoke", "placement=attn,ff", "rank=4", LR], n_trials=6, confirm_seeds=(1, 2, 3))
    assert len(bowl.trained) == 12 + 6
    assert len(chosen) == 6
    assert {one.search["purpose"] for one in chosen.values()} == {"confirm"}
    assert {one.spec["seed"] for one in chosen.values()} == {1, 2, 3}
    for name in ("attn", "ff"):
        best = min((loss(s), s.optim.lr) for s in bowl.trained if s.placement.name == name and s.seed == 0)[1]
        assert {one.spec["optim"]["lr"] for one in chosen.values() if one.spec["placement"]["name"] == name} == {best}


def test_a_best_value_at_an_edge_is_told_and_the_range_widened(
    go: Any, bowl: BowlEngine, study: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", "optim.lr=tag(log,interval(1e-4,2e-3))"]
    go(axes, n_trials=6)
    assert "optim.lr at the high end of its range" in capsys.readouterr().out
    assert len(bowl.trained) == 6
    go(axes, n_trials=6, widen=1)
    out = capsys.readouterr().out
    assert "attn r4: range widened to optim.lr from 0.0001 to 0.00894, log scale" in out
    assert len({spec.run_id for spec in bowl.trained}) == len(bowl.trained) == 9
    assert max(spec.optim.lr for spec in bowl.trained) > 2e-3
    go(axes, n_trials=6, widen=1)
    assert len(bowl.trained) == 9


def test_trials_are_pruned_by_perplexity_as_by_the_nll_it_comes_from(go: Any, bowl: BowlEngine) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR, "trainer.max_steps=9", "evaluation.every_steps=1"]
    go(axes, n_trials=12, pruner="asha", objectives=("validation.perplexity",))
    assert bowl.pruned


@pytest.mark.parametrize("pruner", ["asha", "median", "hyperband", "patient"])
def test_hopeless_trials_are_pruned_and_their_slots_go_to_the_next(pruner: str, go: Any, bowl: BowlEngine) -> None:
    axes = ["experiment=smoke", "placement=attn,ff", "rank=4", LR, "trainer.max_steps=9", "evaluation.every_steps=1"]
    chosen = go(axes, n_trials=12, pruner=pruner)
    finished = {spec.run_id for spec in bowl.trained} & {spec.run_id for spec in bowl.pruned}
    assert len(bowl.trained) + len(bowl.pruned) == 24 + len(finished)
    assert bowl.pruned or pruner == "patient"  # losses that only fall are no reason for patience to end
    assert bowl.most == bowl.slots
    best = {name: min(loss(s) for s in bowl.trained if s.placement.name == name) for name in ("attn", "ff")}
    assert sorted(one.scores["validation"]["after"].nll for one in chosen.values()) == sorted(best.values())


def test_replicates_are_pruned_together_on_their_mean(go: Any, bowl: BowlEngine) -> None:
    axes = [
        "experiment=smoke",
        "placement=attn",
        "rank=4",
        LR,
        "seed=0,1",
        "trainer.max_steps=9",
        "evaluation.every_steps=1",
    ]
    go(axes, n_trials=10, pruner="asha")
    assert bowl.pruned
    for spec in bowl.pruned:
        twins = {s.seed for s in bowl.pruned if s.optim.lr == spec.optim.lr}
        assert twins == {0, 1}


def test_a_failed_trial_is_told_and_tried_again_by_the_next_command(go: Any, bowl: BowlEngine) -> None:
    axes = ["experiment=smoke", "placement=attn,ff", "rank=4", LR]
    bowl.fail = lambda spec: spec.placement.name == "ff" and spec.optim.lr == 1e-3
    with pytest.raises(RunsFailed) as failed:
        go(axes, n_trials=4)
    assert "1 of 8 runs failed; the same command trains just these again" in failed.value.lines[0]
    assert "OutOfMemoryError: no room" in failed.value.lines[1]
    assert "placement=ff" in failed.value.lines[2]
    assert "optim.lr=0.001" in failed.value.lines[2]
    assert len(bowl.trained) == 8
    bowl.fail = lambda spec: False
    go(axes, n_trials=4)
    assert len(bowl.trained) == 9


def test_a_failed_trial_is_named_with_the_command_that_trains_it_alone(
    go: Any, bowl: BowlEngine, composer: Any
) -> None:
    bowl.fail = lambda spec: spec.optim.lr != 1e-3
    with pytest.raises(RunsFailed) as failed:
        go(["experiment=smoke", "placement=attn", "rank=4", LR], n_trials=2)
    (alone,) = [line.partition("train.py ")[2] for line in failed.value.lines if "alone:" in line]
    assert alone.endswith(" hydra.mode=RUN")
    spec, _ = config.from_config(composer.compose(shlex.split(alone)))
    assert spec in bowl.trained
    assert spec.optim.lr != 1e-3


def test_a_line_that_was_cut_off_costs_no_other(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power cut or a full disk leaves the journal: the trial it told the end of is told again, from its record."""
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    go(axes, n_trials=4)
    journal = study.folder / storage.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    monkeypatch.setattr("sweeper.study.search.alive", lambda trial: False)
    for wanted in (4, 6):
        go(axes, n_trials=wanted)
        assert len(bowl.trained) == wanted
        (one,) = studies(study)
        assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in one.get_trials()) == wanted


@pytest.mark.parametrize("axis", ["method.dropout=interval(0,0.9)", "rank=int(interval(4,30))"])
def test_a_range_is_not_widened_to_what_no_run_can_use(
    axis: str, go: Any, bowl: BowlEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.study.bowl.loss", lambda spec, share=1.0: 2 + spec.method.dropout - spec.rank / 100)
    go(["experiment=smoke", "placement=attn", axis], n_trials=20, widen=2)
    assert len(bowl.trained) == 20
    assert "at the edge of its range" in capsys.readouterr().out


def test_values_that_do_not_go_together_are_one_trial_and_not_the_end_of_all(
    go: Any, bowl: BowlEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, every = "trainer.max_steps=tag(tune,choice(25,15))", "evaluation.every_steps=tag(tune,choice(5,20))"
    axes = ["model=tiny_llama", "search=lr", "placement=attn", "rank=4", "optim.lr=1e-3", "trainer.patience=1"]
    for _ in range(2):
        go([*axes, steps, every], n_trials=4)
        assert len(bowl.trained) == 3
    out = capsys.readouterr().out
    assert out.count("trainer.max_steps=15, evaluation.every_steps=20 cannot be tried: trainer.patience=1 counts") == 1
    assert "every trial that the budget allows is done; nothing to train" in out


def test_a_damaged_journal_is_named(go: Any, study: Settings) -> None:
    study.folder.mkdir()
    (study.folder / storage.JOURNAL).write_text("not\nJSON\n")
    with pytest.raises(SpecError, match=r"search\.journal cannot be read"):
        go(["experiment=smoke", LR], n_trials=2)


def test_a_diverged_trial_is_the_worst_of_all(
    go: Any, bowl: BowlEngine, study: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    bowl.diverge = lambda spec: spec.optim.lr >= 1e-2
    chosen = go(["experiment=smoke", "placement=attn", "rank=4", LR], n_trials=8)
    assert all(one.spec["optim"]["lr"] < 1e-2 for one in chosen.values())
    (one,) = studies(study)
    values = {t.params["optim.lr"]: t.value for t in one.get_trials()}
    assert all((value == math.inf) == (lr >= 1e-2) for lr, value in values.items())
    told = [line for line in capsys.readouterr().out.splitlines() if "attn r4 trial" in line]
    assert sum("): diverged; best" in line for line in told) == sum(lr >= 1e-2 for lr in values) > 0
    assert "inf" not in "".join(told)


def test_a_trial_whose_cost_was_not_measured_failed(go: Any, study: Settings) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    for _ in range(2):  # nor is it begun without end
        with pytest.raises(RunsFailed, match="no trial completed"):
            go(axes, n_trials=3, objectives=("train_seconds_solo",))
    (one,) = studies(study)
    assert all(trial.user_attrs.get("outcome") == "failed" for trial in one.get_trials())


def test_a_token_budget_is_the_same_for_every_arm(go: Any, bowl: BowlEngine, make_record: Any) -> None:
    def costly(spec: RunSpec, **changes: Any) -> Record:
        efficiency = record.Efficiency(train_tokens=100)
        return make_record(spec, efficiency=efficiency, **changes)

    bowl.make_record, bowl.slots = costly, 1
    go(["experiment=smoke", "placement=attn,ff", "rank=4", LR], max_tokens=300, parallel=1)
    assert [sum(s.placement.name == name for s in bowl.trained) for name in ("attn", "ff")] == [3, 3]


def test_no_trial_starts_after_the_time_is_up(go: Any, bowl: BowlEngine) -> None:
    with pytest.raises(RunsFailed, match="attn r4: no trial completed"):
        go(["experiment=smoke", "placement=attn", "rank=4", LR], max_seconds=0.0)
    assert not bowl.trained


def test_several_objectives_give_a_front(go: Any, study: Settings, bowl: BowlEngine) -> None:
    axes = ["experiment=smoke", "placement=attn", LR, "rank=tag(tune,choice(2,4,8))"]
    go(axes, n_trials=8, objectives=("validation.nll", "trainable_parameters"), sampler="nsga2")
    (one,) = studies(study)
    assert [direction.name for direction in one.directions] == ["MINIMIZE", "MINIMIZE"]
    assert one.best_trials
    assert len(bowl.trained) == 8


def test_at_most_a_quarter_of_the_trials_run_before_the_first_is_known(go: Any, bowl: BowlEngine) -> None:
    bowl.slots = 100
    go(["experiment=smoke", "placement=attn,ff", "rank=4", LR], n_trials=8)
    assert bowl.most == 2 * 2
    bowl.most = 0
    go(["experiment=smoke", "placement=attn,ff", "rank=8", LR], n_trials=8, parallel=8)
    assert bowl.most == 2 * 8


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ({"sampler": "foo"}, "hydra.sweeper.sampler=foo: no such sampler. Choose from tpe, gp, "),
        ({"pruner": "foo"}, "no such pruner"),
        ({"n_trials": 0}, "must be at least 1"),
        ({"max_seconds": math.nan}, "hydra.sweeper.max_seconds=nan: must be at least 0"),
        ({"objectives": ("nll",)}, "choose from validation.nll"),
        ({"direction": ("down",)}, "choose minimize or maximize"),
        ({"direction": ("minimize", "maximize")}, "give one for each objective"),
        ({"direction": ("maximize",)}, "direction=maximize: validation.nll is better the lower it is; leave direction"),
        ({"objectives": ("validation.perplexity",), "direction": ("maximize",)}, "perplexity is better the lower"),
        ({"objectives": ("validation.exact_match",), "direction": ("minimize",)}, "exact_match is better the higher"),
        (
            {"objectives": ("validation.nll", "train_flops"), "direction": ("minimize", "maximize")},
            "direction=maximize: train_flops is better the lower it is",
        ),
        ({"objectives": ("validation.nll", "train_flops"), "pruner": "asha"}, "pruning needs a single objective"),
        ({"objectives": ("train_flops",), "pruner": "asha"}, "does not change while a run trains"),
        ({"objectives": ("validation.nll", "train_flops"), "confirm_seeds": (1,)}, "no single best trial"),
        ({"confirm_seeds": (1, 1)}, r"hydra.sweeper.confirm_seeds=\[1, 1\]: give each once"),
        ({"confirm_seeds": (-1,)}, r"seeds are in \[0, 2\*\*31\)"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_named(search: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError, match=line):
        SearchSettings(**search)


def test_a_direction_that_says_what_is_so_anyhow_changes_nothing() -> None:
    plain = SearchSettings(objectives=("validation.nll", "validation.exact_match"))
    said = SearchSettings(objectives=plain.objectives, direction=("minimize", "maximize"))
    assert plain.directions == said.directions == said.direction


@pytest.mark.parametrize(
    ("axes", "search", "line"),
    [
        ([], {"n_trials": 3}, "hydra.sweeper.n_trials=3: no field is tuned"),
        ([], {"pruner": "asha"}, "hydra.sweeper.pruner=asha: no field is tuned, so there are no trials to end early"),
        ([LR], {"pruner": "asha"}, "give evaluation.every_steps, from 1 to 3"),
        ([LR, "trainer.max_steps=1"], {"pruner": "asha"}, "trainer.max_steps=1 is over before one"),
        ([LR, "evaluation.every_steps=1,0"], {"pruner": "asha"}, "give evaluation.every_steps, from 1 to 3"),
        ([LR], {"confirm_seeds": (0, 1)}, "trials are chosen on seed 0"),
        ([LR, "evaluation=none"], {}, "evaluation.splits has no validation"),
        ([LR], {"objectives": ("validation.bleu",)}, "has no such metric. Choose from validation.nll, "),
        ([LR, "dataset=chain_sum", "dataset.metrics=[final_number]", "dataset.max_new_tokens=4"],
         {"objectives": ("validation.final_number",)}, "give evaluation.generate=true"),
        ([LR, "dataset.metrics=[choice_accuracy]", "evaluation.every_steps=1"],
         {"objectives": ("validation.choice_accuracy",), "pruner": "asha"}, "scored at its end: prune on"),
        (["rank=tag(tune,choice(4,100))"], {}, "rank=100 is above the size of .*: choose at most"),
        (["rank=int(interval(4,8))", "placement.layers=tag(tune,choice(all,first:9))"], {}, "this model has 4 layers"),
        ([LR], {"sampler_options": {"foo": 1}}, "sampler_options: .*foo"),
        ([LR], {"sampler_options": {"n_startup_trials": "a"}}, "sampler_options: .*not supported between .*int.*str"),
        ([LR], {"storage": "postgresql+psycopg://localhost:1/none"}, "the database cannot be used"),
        ([LR], {"storage": "sqlite:////nowhere/searches.db"}, r"cannot be used \(/nowhere is no folder that can be"),
        ([LR], {"storage": f"sqlite:///{__file__}"}, "cannot be used .*file is not a database"),
        ([LR], {"storage": "nonsense"}, "cannot be used .*Could not parse"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_work_is_refused_before_it_begins(
    axes: list[str], search: dict[str, Any], line: str, composer: Any, study: Settings
) -> None:
    found = config.expand(["experiment=smoke", "placement=attn", "rank=4", *axes], composer)
    with pytest.raises(Problems, match=line):
        planning.make(found.arms, study, SearchSettings(**search))
    assert not study.folder.exists()


def test_a_cost_that_is_not_measured_is_no_objective(composer: Any, study: Settings) -> None:
    found, search = (
        config.expand(["experiment=smoke", LR], composer),
        SearchSettings(objectives=("train_seconds_solo",)),
    )
    with pytest.raises(Problems, match=r"train_seconds_solo is measured on a run alone: give sweep\.calibrate=true"):
        planning.make(found.arms, dataclasses.replace(study, calibrate=False), search)


def test_a_dry_run_looks_for_the_database_and_writes_nothing_to_it(
    go: Any, study: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    with contextlib.closing(sqlite3.connect(old)) as kept, kept:
        kept.execute("CREATE TABLE mine (n)")
    before = old.read_bytes()
    for file in (old, new):
        go([*GRID, LR], dataclasses.replace(study, dry_run=True), n_trials=2, storage=f"sqlite:///{file}")
    assert capsys.readouterr().out.count("this was a dry run") == 2
    assert old.read_bytes() == before
    assert not new.exists()
    go(["experiment=smoke", "placement=attn", "rank=4", LR], n_trials=1, storage=f"sqlite:///{new}")
    assert len(optuna.get_all_study_names(f"sqlite:///{new}")) == 1


def test_tables_of_another_optuna_are_one_line(tmp_path: Path) -> None:
    settings = SearchSettings(storage=f"sqlite:///{tmp_path / 'searches.db'}")
    storage.open_storage(settings, tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "searches.db")) as kept, kept:
        kept.execute("UPDATE alembic_version SET version_num = 'v2.4.0.a'")
    with pytest.raises(SpecError, match=r"cannot be used \(.*optuna storage upgrade") as caught:
        storage.open_storage(settings, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_driver_that_starts_waits_for_another_that_is_about_to_sign_its_trial(
    go: Any, study: Settings, bowl: BowlEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    go(axes, n_trials=2)
    (one,) = studies(study)
    asked = one.ask(one.get_trials()[0].distributions)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        asked.set_user_attr("driver", storage.this_driver() | {"seen": time.time()})

    monkeypatch.setattr(time, "sleep", sleep)
    go(axes, n_trials=3)
    assert waits
    assert one.get_trials()[asked.number].state == optuna.trial.TrialState.RUNNING
    assert len(bowl.trained) == 2


def test_a_trial_asked_for_right_after_the_look_is_not_taken_for_a_dead_drivers(
    go: Any, study: Settings, bowl: BowlEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    go(axes, n_trials=2)
    (one,) = studies(study)
    asked: list[optuna.Trial] = []
    look = ArmSearch._trials

    def look_then_ask(self: ArmSearch, *, fresh: bool = False) -> list[optuna.trial.FrozenTrial]:
        found = look(self, fresh=fresh)
        if fresh and not asked:
            asked.append(one.ask(one.get_trials()[0].distributions))
        return found

    monkeypatch.setattr(ArmSearch, "_trials", look_then_ask)
    go(axes, n_trials=2)
    assert one.get_trials()[asked[0].number].state == optuna.trial.TrialState.RUNNING


def test_a_driver_whose_trial_another_gave_up_for_dead_goes_on(
    go: Any, study: Settings, bowl: BowlEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a machine has slept: the point is tried again, with the records that its runs left."""
    tell, taken = ArmSearch.tell, []

    def tell_too_late(self: ArmSearch, trial: Trial) -> Told:
        if not taken:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number})
            taken.append(tell(self, trial))
            return taken[0]
        return tell(self, trial)

    monkeypatch.setattr(ArmSearch, "tell", tell_too_late)
    go(["experiment=smoke", "placement=attn", "rank=4", LR], n_trials=4)
    (one,) = studies(study)
    assert taken[0].state == "taken over"
    ended = [t for t in one.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(ended) == len(bowl.trained) == 4


def test_a_line_of_the_journal_that_was_edited_is_named_and_costs_no_record(
    go: Any, bowl: BowlEngine, study: Settings
) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    go(axes, n_trials=3, sampler="random")
    journal = study.folder / storage.JOURNAL
    whole = journal.read_text()
    lines = whole.splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if "param_value_internal" in line)
    lines[place] = lines[place].replace('"param_value_internal":', '"param_value_internal":1')
    journal.write_text("".join(lines))
    with pytest.raises(SpecError, match=r"cannot be read \(a line of it was edited or damaged\): move it away"):
        go(axes, n_trials=3, sampler="random")
    journal.unlink()
    go(axes, n_trials=3, sampler="random")
    assert len(bowl.trained) == 3


@pytest.mark.parametrize("lines", range(1, 12))
def test_a_driver_killed_between_two_lines_of_its_journal_changes_no_point(
    lines: int, go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the default nor a point that was asked for and not noted is left out or becomes another."""
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    go(axes, n_trials=3, sampler="random")
    journal = study.folder / storage.JOURNAL
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:lines]))
    monkeypatch.setattr("sweeper.study.search.alive", lambda trial: False)
    monkeypatch.setattr("sweeper.study.search.being_signed", lambda trial: False)
    go(axes, n_trials=3, sampler="random")
    assert len(bowl.trained) == 3
    (one,) = studies(study)
    assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in one.get_trials()) == 3


def test_a_database_that_is_restarted_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sqlalchemy.exc import OperationalError

    gone = OperationalError("SELECT", {}, Exception("server closed the connection"))
    kept = storage.open_storage(SearchSettings(storage=f"sqlite:///{tmp_path / 'studies.db'}"), tmp_path)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    answers: list[Any] = [gone, gone, []]

    def ask() -> Any:
        answer = answers.pop(0)
        if answer is gone:
            raise answer
        return answer

    assert storage._again(ask)() == []
    assert capsys.readouterr().err.count("the database does not answer") == 1
    assert getattr(kept.get_all_studies, "__wrapped__", None) is not None
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", -1.0)
    answers.append(gone)
    with pytest.raises(SpecError, match=r"has not answered for -1 s .*the same command goes on from what is saved"):
        storage._again(ask)()


def test_what_a_repeated_search_takes_up_is_told(
    go: Any, bowl: BowlEngine, study: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["experiment=smoke", "placement=attn", "rank=4", LR]
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "close", lambda self: None)  # a process that is killed closes nothing
        bowl.stop_after = 2
        with pytest.raises(SystemExit):
            go(axes, n_trials=5)
    monkeypatch.setattr("sweeper.study.search.alive", lambda trial: False)
    bowl.stop_after = math.inf
    broken = next(study.folder.glob("*/record.json"))
    broken.write_text(broken.read_text()[:-9])
    capsys.readouterr()
    go(axes, n_trials=5)
    out = " ".join(capsys.readouterr().out.split())
    assert "2 trials have ended already" in out
    assert f"{broken.parent.name} trains again; its record is kept beside the new one" in out


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_pruner_needs_no_objective_to_be_named(pruner: str) -> None:
    assert SearchSettings(pruner=pruner, objectives=()).objectives == ()
    with pytest.raises(SpecError, match="does not change while a run trains"):
        SearchSettings(pruner=pruner, objectives=("train_flops",))
