"""Runs of several tasks in the analysis: each task beside the runs of it alone, transfer, tasks one after another."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import analyse, captions, continual, figures, load, task_figures
from analysis.venues import DEFAULT
from sweeper.record import METRICS, PREDICTIONS, RECORD, perplexity

TASKS = ("icd10_chapter", "hpo_term")
EXAMPLES, TOKENS = 120, 8


def score(nll: float) -> dict[str, Any]:
    return {
        "nll": nll, "tokens": EXAMPLES * TOKENS, "examples": EXAMPLES, "perplexity": perplexity(nll),
        "metrics": {"exact_match": math.exp(-nll)},
    }  # fmt: skip


def part(name: str) -> dict[str, Any]:
    return {"name": name, "family": name, "metrics": ["exact_match"], "options": {}}


def write_run(
    study: Path, nlls: Mapping[str, float], *, sharing: str = "single", family: str = "", seed: int = 0,
    lr: float = 1e-3, stages: Sequence[Mapping[str, float]] = (), through: Mapping[str, Any] | None = None,
    validation: float | None = None, seen: int = 80, usage: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """A run of one task, or of several in the order of `nlls`, with these test NLLs after training (6 before)."""
    several = bool(family)
    names = list(nlls)
    dataset = part(names[0])
    if several:
        dataset = {
            "name": family,
            "family": family,
            "options": {"weights": "uniform", **(options or {})},
            "parts": [part(n) for n in names],
        }
    spec = {
        "model": {"name": "smollm2_135m", "source": "gguf", "location": "x", "config": {}}, "dataset": dataset,
        "method": {"name": "lora", "options": {}}, "placement": {"name": "attn", "roles": ["attn_q"], "layers": "all"},
        "allocation": {"name": "uniform"}, "rank": 8, "alpha": 16.0, "seed": seed, "optim": {"lr": lr},
        "trainer": {"max_steps": 10, "batch_size": 8}, "evaluation": {"name": "default"},
        **({} if sharing == "single" else {"sharing": {"name": sharing}}),
    }  # fmt: skip
    run_id = f"{abs(hash(json.dumps([spec, lr]))):012x}"[:12]
    folder = study / run_id
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    hard = {name: np.random.default_rng(len(name)).normal(0, 0.5, EXAMPLES) for name in names}
    scores, rows, data = {}, [], {}
    for split in ("validation", "test"):
        for name in names:
            after = nlls[name] if split == "test" or validation is None else validation
            key = f"{split}/{name}" if several else split
            each = np.maximum(after + hard[name] - hard[name].mean() + rng.normal(0, 0.05, EXAMPLES), 1e-3)
            each += after - each.mean()
            scores[key] = {"before": score(6.0), "after": score(after)}
            data[key] = {"examples": EXAMPLES, "groups": EXAMPLES}
            if several:
                data[f"train/{name}"] = {"examples": 100, "seen": seen}
            rows += [
                {
                    "split": key, "moment": moment, "id": f"{name}-{i}", "nll": float(value) * TOKENS, "tokens": TOKENS,
                    "exact_match": 0.0,
                }
                for moment, values in (("before", np.full(EXAMPLES, 6.0)), ("after", each))
                for i, value in enumerate(values)
            ]  # fmt: skip
        if several:
            over = [scores[f"{split}/{name}"]["after"]["nll"] for name in names]
            scores[split] = {"before": score(6.0), "after": score(float(np.mean(over)))}
    curve = [
        {"step": step, "split": f"test/{name}", "moment": str(step), "nll": nll, "exact_match": math.exp(-nll)}
        for step, stage in zip((0, *range(5, 5 * len(stages), 5), 10), stages, strict=False)
        for name, nll in stage.items()
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in curve))
    (folder / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "run_id": run_id, "study": "s", "status": "completed", "spec": spec, "modules": [], "schema": 1, "steps": 10,
        "trainable_parameters": 1000, "total_parameters": 100_000, "scores": scores, "data": data,
        "environment": {"content": {"dataset": "; ".join(f"{name}==1" for name in names)}},
        "sharing": {"through": through} if through else usage or {},
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two tasks alone and together: together the first is better by .2 nats, the second worse by .3."""
    folder = tmp_path / "study"
    for seed in range(3):
        jitter = 0.004 * (seed - 1)
        for name, nll in zip(TASKS, (1.0, 2.0), strict=True):
            write_run(folder, {name: nll + jitter}, seed=seed)
        both = dict(zip(TASKS, (0.8 - jitter, 2.3 + jitter), strict=True))
        across = {TASKS[0]: {TASKS[1]: 3.0}, TASKS[1]: {TASKS[0]: 4.3}}
        write_run(folder, both, sharing="shared", family="mixture", seed=seed, through=across)
    return folder


def test_a_run_of_several_tasks_is_a_row_of_each(study: Path) -> None:
    found = load(study)
    assert found.counts() == {"completed": 9}
    assert len(found.runs) == 12
    together = found.runs[found.runs["together"] != "alone"]
    assert set(together["dataset"]) == set(TASKS)
    assert set(together["together"]) == {"icd10_chapter + hpo_term"}
    own = together[together["dataset"] == "hpo_term"]
    assert sorted(own["test.nll"]) == pytest.approx([2.296, 2.3, 2.304])
    assert set(own["made_with.dataset.content"]) == {"hpo_term==1"}
    assert not [column for column in found.runs if "/" in column or column.startswith("forgetting")]
    columns = found.example_columns(own["run_id"].iloc[0], split="test", phase="after")
    assert len(columns["id"]) == EXAMPLES
    assert columns["id"][0] == "hpo_term-0"


def test_training_together_is_compared_with_training_alone(study: Path) -> None:
    tests = analyse(load(study), draws=200).tables["tests"]
    rows = tests[(tests["metric"] == "nll") & (tests["family"] == "together")].set_index("setting")
    assert len(rows) == 2
    for task, wanted in zip(TASKS, (-0.2, 0.3), strict=True):
        row = rows.loc[task]
        assert "together=alone" in row["a"]
        assert row["difference"] == pytest.approx(wanted, abs=0.02)
        assert row["p_holm"] < 0.05
        assert row["low"] < wanted < row["high"]


def test_a_task_that_saw_fewer_of_its_examples_with_others_is_named(study: Path) -> None:
    def unequal() -> list[str]:
        checks = analyse(load(study), draws=50).tables["checks"]
        return list(checks[checks["check"] == "unequal training"]["message"])

    assert not unequal()
    both = dict.fromkeys(TASKS, 1.0)
    for seed in range(3):
        write_run(study, both, sharing="per_task", family="sequence", seed=seed, seen=40)
    said = "40 examples of it were trained on, 80 in the arm of the task alone: company is not all that differs"
    assert unequal() == [said] * 2


def test_the_nll_through_anothers_blocks_is_set_beside_its_own(study: Path) -> None:
    table = analyse(load(study), draws=200).tables["transfer"].set_index("task")
    assert table.loc["hpo_term", "adapter"] == "icd10_chapter"
    assert table.loc["hpo_term", "nll"] == pytest.approx(4.3)
    assert table.loc["hpo_term", "rise"] == pytest.approx(2.0)
    assert table.loc["hpo_term", "rise_low"] < 2.0 < table.loc["hpo_term", "rise_high"]
    assert table.loc["icd10_chapter", "rise"] == pytest.approx(2.2)


def test_a_rate_is_chosen_by_the_score_over_all_tasks(tmp_path: Path) -> None:
    """At the lower rate the first task is better, at the higher one the mean is."""
    folder = tmp_path / "study"
    for lr, nlls in ((1e-4, (0.5, 4.0)), (1e-3, (1.0, 2.0))):
        write_run(folder, dict(zip(TASKS, nlls, strict=True)), family="mixture", lr=lr)
    found = analyse(load(folder), draws=100).found
    assert [arm.trial["optim.lr"] for setting in found.settings for arm in setting.arms] == [1e-3, 1e-3]


def test_the_measures_of_a_sequence_are_those_of_their_papers() -> None:
    accuracy = np.array([[0.1, 0.2, 0.3], [0.9, 0.3, 0.3], [0.7, 0.8, 0.5], [0.6, 0.75, 0.95]])
    found = continual.measures(accuracy, "exact_match")
    assert found["average"] == pytest.approx((0.6 + 0.75 + 0.95) / 3)
    assert found["backward"] == pytest.approx(((0.6 - 0.9) + (0.75 - 0.8)) / 2)
    assert found["forward"] == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.75)) / 2)
    assert found["learning"] == pytest.approx(((0.9 - 0.1) + (0.8 - 0.2) + (0.95 - 0.3)) / 3)
    nats = continual.measures(1 - accuracy, "nll")
    assert nats["average"] == pytest.approx(1 - found["average"])
    assert [nats[name] for name in continual.MEASURES[1:]] == pytest.approx(
        [found[name] for name in continual.MEASURES[1:]]
    )


def test_orders_of_the_same_tasks_are_one_arm(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    first, second = TASKS
    for seed in range(2):
        for order, kept in (((first, second), 1.5), ((second, first), 1.9)):
            stages = [
                {order[0]: 6.0, order[1]: 6.0}, {order[0]: 1.0, order[1]: 5.0}, {order[0]: kept, order[1]: 2.0}
            ]  # fmt: skip
            write_run(folder, {order[0]: kept, order[1]: 2.0}, family="sequence", seed=seed, stages=stages)
    table = analyse(load(folder), draws=200).tables["continual"]
    (row,) = table[table["metric"] == "nll"].to_dict("records")
    assert (row["tasks"], row["orders"], row["seeds"]) == (2, 2, 2)
    assert row["forgetting"] == pytest.approx((0.5 + 0.9) / 2)
    assert row["backward"] == pytest.approx(-(0.5 + 0.9) / 2)
    assert row["forward"] == pytest.approx(1.0)
    assert row["average"] == pytest.approx((1.5 + 2.0 + 1.9 + 2.0) / 4)
    assert row["forgetting_low"] < row["forgetting"] < row["forgetting_high"]
    assert row["learning"] == pytest.approx((5.0 + 4.0) / 2)
    assert row["on_front"]


def test_a_sequence_that_was_not_scored_between_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "study", dict.fromkeys(TASKS, 1.0), family="sequence")
    assert analyse(load(tmp_path / "study"), draws=50).tables["continual"].empty


def test_studies_of_single_tasks_have_no_new_columns(tmp_path: Path) -> None:
    write_run(tmp_path / "study", {TASKS[0]: 1.0})
    found = load(tmp_path / "study")
    assert not {"together", "_parts"} & set(found.runs)
    assert found.fields.count("sharing") == 1


def test_figures_of_several_tasks_are_made_and_captioned(study: Path, tmp_path: Path) -> None:
    found = analyse(load(study), draws=100)
    apart, across = task_figures.together(found), task_figures.transfer(found)
    assert isinstance(apart, Figure)
    assert isinstance(across, Figure)
    names = [label.get_text() for ax in apart.axes for label in ax.get_yticklabels()]
    assert names == ["attn r8 shared"] * 2
    assert "+2.00" in {text.get_text() for ax in across.axes for text in ax.texts}
    assert "together minus alone" in captions.caption(found, "together")
    assert task_figures.forgetting_curves(found) == "no run has tasks one after another"
    stages = [dict.fromkeys(TASKS, 6.0), {TASKS[0]: 1.0, TASKS[1]: 5.0}, {TASKS[0]: 1.5, TASKS[1]: 2.0}]
    write_run(tmp_path / "sequence", stages[-1], family="sequence", stages=stages)
    sequence = analyse(load(tmp_path / "sequence"), draws=100)
    curves = task_figures.forgetting_curves(sequence)
    assert isinstance(curves, Figure)
    lines = {tuple(np.asarray(line.get_ydata()).tolist()) for line in curves.axes[0].get_lines()}
    assert {(6.0, 1.0, 1.5), (6.0, 5.0, 2.0)} <= lines
    assert task_figures.together(sequence) == "no task was trained alone as it was with others"


def test_the_front_of_learning_and_forgetting(tmp_path: Path) -> None:
    """Of four strategies one learns most, one forgets least, one lies between, and one is beaten on both."""
    first, second = TASKS
    ends = {"single": (1.0, 3.0), "stack": (1.5, 2.0), "per_task": (2.5, 2.5), "merge": (2.6, 3.5)}
    for seed in range(3):
        for sharing, (learnt, kept) in ends.items():
            more = 0.02 * seed
            stages = [
                {first: 6.0, second: 6.0}, {first: learnt + more, second: 5.0}, {first: kept + 2 * more, second: learnt}
            ]  # fmt: skip
            write_run(
                tmp_path / "study", stages[-1], family="sequence", sharing=sharing, seed=seed, stages=stages
            )  # fmt: skip
    found = analyse(load(tmp_path / "study"), draws=100)
    table = found.tables["continual"]
    rows = {row["arm"].split("=")[-1]: row for row in table[table["metric"] == "nll"].to_dict("records")}
    assert {name: bool(row["on_front"]) for name, row in rows.items()} == {
        "single": True, "stack": True, "per_task": True, "merge": False
    }  # fmt: skip
    figure = task_figures.learning_forgetting(found)
    assert isinstance(figure, Figure)
    (ax,) = [one for one in figure.axes if one.get_visible()]
    drawn = {
        tuple(np.round(np.asarray(one.get_offsets())[0], 3).tolist())
        for one in ax.collections
        if len(one.get_offsets())
    }
    points = {(round(row["forgetting"], 3), round(row["learning"], 3)) for row in rows.values()}
    assert points <= drawn
    (front,) = [line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    joined = list(zip(np.asarray(front.get_xdata()).tolist(), np.asarray(front.get_ydata()).tolist(), strict=True))
    wanted = sorted((rows[name]["forgetting"], rows[name]["learning"]) for name in ("single", "stack", "per_task"))
    np.testing.assert_allclose(joined, wanted)
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert texts == set(ends)
    assert "forgotten of it by the end" in captions.caption(found, "learning_forgetting")
    alone = analyse(load(tmp_path / "study"), draws=50)
    alone.tables["continual"] = alone.tables["continual"].iloc[:0]
    assert task_figures.learning_forgetting(alone) == "no run has tasks one after another"


def test_gates_are_set_out_by_task_and_expert(tmp_path: Path) -> None:
    """Experts of different seeds are put in the order of their gates; the figure has one seed's as they are."""
    first, second = TASKS
    for seed, gates in enumerate(([0.75, 0.25], [0.125, 0.875])):
        usage = {"usage": {first: gates, second: gates[::-1]}, "told_apart": 1.0, "balance": 1.25}
        write_run(tmp_path, {first: 1.0, second: 2.0}, sharing="routed", family="mixture", seed=seed, usage=usage)
    found = analyse(load(tmp_path), draws=100)
    table = found.tables["experts"]
    assert len(table) == 4
    own = table[table["task"] == first].set_index("expert")
    assert own.loc[1, "gate"] == pytest.approx((0.75 + 0.875) / 2)
    assert own.loc[2, "gate"] == pytest.approx((0.25 + 0.125) / 2)
    assert (own["seeds"] == 2).all()
    assert (table["told_apart"] == 1).all()
    figure = figures.makers(found)["experts"](found, DEFAULT)
    assert isinstance(figure, Figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == (["0.25", "0.75", "0.75", "0.25"] if second < first else ["0.75", "0.25", "0.25", "0.75"])
    assert "Mean gate of each expert" in captions.caption(found, "experts")
    write_run(tmp_path / "plain", {first: 1.0})
    assert analyse(load(tmp_path / "plain"), draws=100).tables["experts"].empty


def test_orders_that_the_seed_draws_are_replicates(tmp_path: Path) -> None:
    first, second = TASKS
    for seed, order in enumerate(((first, second), (second, first), (first, second))):
        stages = [dict.fromkeys(order, 6.0), {order[0]: 1.0, order[1]: 5.0}, {order[0]: 1.5 + seed / 10, order[1]: 2.0}]
        write_run(tmp_path, stages[-1], family="sequence", seed=seed, stages=stages, options={"order": "seed"})
    found = analyse(load(tmp_path), draws=100)
    assert {len(arm.runs) for setting in found.found.settings for arm in setting.arms} == {3}
    row = found.tables["continual"].query("metric == 'nll'").iloc[0]
    assert (row["orders"], row["seeds"]) == (2, 2)
    assert row["forgetting"] == pytest.approx(((0.5 + 0.7) / 2 + 0.6) / 2)


def test_what_is_gained_together_is_a_share_of_what_is_gained_alone(study: Path) -> None:
    """Alone the tasks gain 5 and 4 nats, together 5.2 and 3.7."""
    table = analyse(load(study), draws=100).tables["gains"].query("metric == 'nll'").set_index("task")
    first, second = TASKS
    assert table.loc[first, "share"] == pytest.approx(5.2 / 5, abs=1e-3)
    assert table.loc[second, "share"] == pytest.approx(3.7 / 4, abs=1e-3)
    assert table.loc["mean", "share"] == pytest.approx((5.2 / 5 + 3.7 / 4) / 2, abs=1e-3)
    assert table.loc[f"worst: {second}", "share"] == table.loc[second, "share"]
    assert (table["low"] < table["share"]).all()
    assert table.loc["mean", "tasks"] == 2
