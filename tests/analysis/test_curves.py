"""Validation on the way of a run."""

from pathlib import Path

import numpy as np
import pytest

from analysis import Analysis, analyse, curves, figures, load
from tests.analysis.synthetic import Truth, write_study


def test_means_and_pooled_intervals_over_seeds(tmp_path: Path) -> None:
    study = load(
        write_study(tmp_path / "s", truth=Truth(seed_sd=0.05), ranks=(4, 8), examples=20, steps=12, evaluations=4)
    )
    found = analyse(study, draws=50)
    runs = found.found.runs
    table = curves.validation(study, runs)
    assert set(table["step"]) == {0, 3, 6, 9}
    assert len(table) == 6 * 4
    scores = study.evaluations(runs["run_id"]).merge(runs[["run_id", "arm"]], on="run_id")
    means = scores.groupby(["arm", "step"])["nll"].mean()
    for row in table.to_dict("records"):
        assert row["mean"] == pytest.approx(means[row["arm"], row["step"]])
    last = table[table["step"] == 9]
    assert (last["high"] > last["low"]).all()
    widths = last["high"] - last["low"]
    own = scores[scores["step"] == 9].groupby("arm")["nll"].std()
    assert widths.max() / widths.min() < own.max() / own.min()  # pooled


def test_a_step_that_one_seed_did_not_reach_is_left_out(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", ranks=(4,), examples=20, steps=12, evaluations=4)
    study = load(folder)
    short = study.runs[study.runs["placement"] == "ff"].iloc[0]
    path = Path(short["folder"]) / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"moment": "9"' not in line) + "\n")
    found = analyse(load(folder), draws=50)
    table = curves.validation(found.study, found.found.runs)
    assert set(table[table["arm"].str.startswith("ff")]["step"]) == {0, 3, 6}
    assert set(table[table["arm"].str.startswith("attn")]["step"]) == {0, 3, 6, 9}


def test_runs_scored_only_before_and_after_have_no_curve(analysis: Analysis) -> None:
    assert curves.validation(analysis.study, analysis.found.runs).empty
    assert figures.validation_curves(analysis) == (
        "no run was scored on validation while it trained (evaluation.every_steps)"
    )


def test_the_figure_has_a_line_with_a_band_for_each_placement(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4, 8), examples=20, steps=12, evaluations=4)
    figure = figures.make(analyse(load(study), draws=50))["validation_curves"]
    assert not isinstance(figure, str)
    assert len(figure.axes) == 2
    for ax in figure.axes:
        assert len(ax.lines) == len(ax.collections) == 3
        assert all(np.array_equal(line.get_xdata(), [0, 3, 6, 9]) for line in ax.lines)
