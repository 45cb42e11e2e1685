from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from analysis import Analysis, analyse, load
from analysis.arms import FULL, Scores, aligned, arrange, varying
from sweeper.record import PREDICTIONS
from tests.analysis.synthetic import edit, write_study


def test_the_trial_is_chosen_on_validation_and_reported_on_test(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3), examples=20, steps=2)
    runs = load(study).runs
    for row in runs.to_dict("records"):  # validation prefers 1e-3, test prefers 3e-3
        good, bad = (0.1, 0.9) if row["optim.lr"] == 1e-3 else (0.9, 0.1)
        edit(
            Path(row["folder"]),
            lambda plain, good=good, bad=bad: (
                plain["scores"]["validation"]["after"].update(nll=good),
                plain["scores"]["test"]["after"].update(nll=bad),
            ),
        )
    for folder in study.iterdir():
        (folder / "predictions.jsonl").unlink()
    found = analyse(load(study), draws=50)
    assert set(found.tables["tuned"]["optim.lr"]) == {1e-3}
    assert found.arms[found.arms["seeds"] > 0]["nll"].to_list() == [0.9] * 3


def test_a_method_without_a_rank_is_one_arm_whatever_rank_and_alpha_its_runs_name(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), methods=("lora", "bitfit", "full_ft"), examples=20, steps=2)
    labels = [arm.label for arm in analyse(load(study), draws=50).found.arms]
    placed = ("attn", "ff", "full")
    ranked = [f"{place} r{rank} lora" for place in placed for rank in (4, 8)]
    assert sorted(labels) == sorted([*ranked, *(f"{place} bitfit" for place in placed), FULL])


def test_a_trial_that_lost_replicates_does_not_win_by_it(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3), examples=20, steps=2)
    runs = load(study).runs
    best = runs[(runs["placement"] == "attn") & (runs["optim.lr"] == 3e-3)]
    edit(Path(best["folder"].iloc[0]), lambda plain: plain.update(status="diverged"))
    tuned = analyse(load(study), draws=50).tables["tuned"].set_index("arm")
    assert tuned.loc["attn r4", "optim.lr"] == 1e-3
    assert tuned.loc["ff r4", "optim.lr"] == 3e-3


def test_edges_of_what_was_tried_are_named(analysis: Analysis) -> None:
    tuned = analysis.tables["tuned"]
    assert set(tuned["edge"]) == {"optim.lr highest tried"}
    assert "tuned to the edge" in set(analysis.tables["checks"]["check"])


def test_full_fine_tuning_is_an_arm_of_its_own(analysis: Analysis) -> None:
    arms = analysis.arms
    full = arms[arms["placement"] == FULL]
    assert len(full) == 2
    assert full["rank"].isna().all()
    assert full["trainable_percent"].to_list() == pytest.approx([100.0, 100.0])


def test_fields_that_follow_make_no_arms(study_folder: Path) -> None:
    study = load(study_folder)
    assert set(varying(study.runs, study.fields)) == {"dataset", "method", "placement", "rank", "optim.lr", "seed"}


def test_matrices_are_paired_by_seed_and_example() -> None:
    a = Scores(x_RE=np.array([[1.0, 2, 3], [4, 5, 6]]), w_E=np.ones(3), seeds=(0, 1), ids=("p", "q", "r"))
    b = Scores(x_RE=np.array([[60.0, 40], [30, 10]]), w_E=np.ones(2), seeds=(1, 0), ids=("r", "p"))
    shared = aligned(a, b)
    assert shared is not None
    assert shared[0].tolist() == [[1, 3], [4, 6]]
    assert shared[1].tolist() == [[10, 30], [40, 60]]
    base = Scores(x_RE=np.array([[7.0, 8, 9]]), w_E=np.ones(3), seeds=(), ids=("p", "q", "r"))
    shared = aligned(base, a)
    assert shared is not None
    assert shared[0].tolist() == [[7, 8, 9], [7, 8, 9]]
    assert aligned(a, Scores(x_RE=np.ones((1, 1)), w_E=np.ones(1), seeds=(5,), ids=())) is None


def test_shuffled_predictions_are_put_in_order(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0, 1), examples=40, steps=2)
    before = analyse(load(study), draws=50).tables
    for i, folder in enumerate(sorted(study.iterdir())):
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        np.random.default_rng(i).shuffle(lines)
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    after = analyse(load(study), draws=50).tables
    pd.testing.assert_frame_equal(before["tests"], after["tests"])
    pd.testing.assert_frame_equal(before["arms"], after["arms"])


def test_matched_budgets_are_interpolated(analysis: Analysis) -> None:
    table = analysis.tables["matched_budget"]
    assert len(table)
    assert (np.abs(np.log(table["parameters_a"] / table["parameters_b"])) <= np.log(1.05) + 1e-9).all()
    assert table["b"].str.contains("…").any()


def test_share_of_the_reference(analysis: Analysis) -> None:
    table = analysis.tables["share_kept"]
    nll = table[(table["metric"] == "nll") & (table["reference"] == FULL)]
    assert len(nll) == 2 * 6
    arms = analysis.arms.set_index(["setting", "arm"])["nll"]
    for row in nll.to_dict("records"):
        base, reference = arms[row["setting"], "base model"], arms[row["setting"], FULL]
        assert row["share"] == pytest.approx((base - arms[row["setting"], row["arm"]]) / (base - reference))
        assert row["low"] < row["share"] < row["high"]
    assert (nll["percent_of_reference"] < 4).all()


def test_the_truth_is_found(analysis: Analysis) -> None:
    tests = analysis.tables["tests"]
    placement = tests[(tests["metric"] == "nll") & (tests["family"] == "placement")]
    wins = set(placement[placement["a"].str.startswith("attn")]["better"])
    assert wins == {"ff r4 lora", "full r4 lora", "ff r16 lora", "full r16 lora"}
    importance = analysis.tables["importance"].set_index(["setting", "field"])["importance"]
    assert importance["icd10_chapter", "placement"] > importance["icd10_chapter", "seed"]
    assert set(arrange(analysis.study).metrics) == {"nll", "exact_match"}


def test_one_number_an_arm_has_no_chance_of_being_on_the_front(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), seeds=(0,), examples=20, steps=2)
    for folder in study.iterdir():
        (folder / PREDICTIONS).unlink()
    found = analyse(load(study), draws=50)
    assert found.arms["on_front"].any()
    assert found.arms["front_probability"].isna().all()
    assert found.tables["hypervolume"][["low", "high"]].isna().all(axis=None)
    assert found.tables["hypervolume"]["hypervolume"].notna().all()


def test_forgetting_is_a_mean_with_an_interval_over_seeds(analysis: Analysis) -> None:
    arms = analysis.arms.set_index(["setting", "arm"])
    for arm in analysis.found.arms:
        row, values = arms.loc[(arm.setting, arm.label)], arm.runs["forgetting"]
        assert row["forgetting"] == pytest.approx(values.mean())
        low, high = student.interval(0.95, 2, values.mean(), values.sem())
        assert (row["forgetting_low"], row["forgetting_high"]) == pytest.approx((low, high))
    assert arms.loc[("icd10_chapter", "base model"), "forgetting"] == 0


def test_tasks_are_averaged_with_equal_weight(analysis: Analysis) -> None:
    table = analysis.tables["all_tasks"]
    row = table[(table["arm"] == "attn r4 lora") & (table["metric"] == "nll")].iloc[0]
    arms = analysis.arms[analysis.arms["arm"] == "attn r4 lora"]
    assert row["estimate"] == pytest.approx(arms["nll"].mean())


def test_an_unknown_metric_is_an_error(study_folder: Path) -> None:
    with pytest.raises(ValueError, match="Choose from nll, exact_match"):
        analyse(load(study_folder), metric="bleu", draws=10)
