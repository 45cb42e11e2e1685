"""Bars of the figures: the paired difference to one reference arm, about the arm's mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import Analysis, analyse, captions, contrasts, load, shown
from tests.analysis.synthetic import Truth, edit, write_study


def test_a_bar_is_as_long_as_the_paired_interval_and_reaches_the_reference_where_p_says_so(analysis: Analysis) -> None:
    table = analysis.tables["contrasts"].query("metric == 'nll'").set_index(["setting", "b"])
    arms = shown.trained(analysis, "nll")
    level = arms[arms["is_reference"]].set_index("setting")["nll"]
    assert len(level) == 2
    assert arms.loc[arms["is_reference"], ["nll_low", "nll_high"]].isna().all(axis=None)
    others = arms[~arms["is_reference"]]
    assert len(others) == len(table) == 12
    for row in others.to_dict("records"):
        test = table.loc[(row["setting"], row["arm"])]
        assert row["nll_high"] - row["nll_low"] == pytest.approx(test["high"] - test["low"])
        outside = not row["nll_low"] <= level[row["setting"]] <= row["nll_high"]
        assert outside == (test["p"] < 0.05)


def test_what_all_arms_share_is_not_in_a_bar(tmp_path: Path) -> None:
    hard = Truth(example_sd=1.5, placements={"attn": 6.0, "full": 6.0})
    found = analyse(load(write_study(tmp_path / "s", truth=hard, ranks=(4,), examples=60, steps=2)), draws=50)
    arms = shown.trained(found, "nll").query("not is_reference")
    own = found.arms.set_index("arm").loc[arms["arm"]]
    assert ((own["nll_high"] - own["nll_low"]).to_numpy() > 10 * (arms["nll_high"] - arms["nll_low"]).to_numpy()).all()


def test_the_reference_is_chosen_without_a_look_at_scores(tmp_path: Path) -> None:
    methods = ("dora", "lora", "full_ft")
    for name, levels in (("a", {"attn": 0.1, "full": 0.5}), ("b", {"attn": 0.5, "full": 0.1})):
        truth = Truth(placements=levels)
        study = write_study(tmp_path / name, truth=truth, ranks=(4, 8), methods=methods, examples=20, steps=2)
        found = analyse(load(study), draws=50)
        (label,) = contrasts.references(found.found, "nll").values()
        assert label == "full r8 lora"
        assert set(found.tables["contrasts"]["a"]) == {label}


def test_arms_without_a_shared_seed_have_no_bar(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=20, steps=2)

    def later(plain: dict[str, Any]) -> None:
        if plain["spec"]["placement"]["name"] == "attn":
            plain["spec"]["seed"] += 100

    for folder in study.iterdir():
        edit(folder, later)
    found = analyse(load(study), draws=50)
    arms = shown.trained(found, "nll").set_index("placement")
    assert np.isnan(arms.loc["attn", "nll_low"])
    assert not arms.loc["attn", "differs"]
    assert np.isfinite(arms.loc["ff", "nll_low"])


def test_forgetting_has_bars_of_variances_pooled_over_arms(analysis: Analysis) -> None:
    table = analysis.tables["contrasts"].query("metric == 'forgetting'")
    assert len(table) == 12
    widths = (table["high"] - table["low"]).groupby(table["setting"])
    assert (widths.max() / widths.min() < 3).all()  # of three seeds each alone they differ tenfold
    assert table.loc[table["b"].str.startswith("attn"), "significant"].all()


def test_captions_name_the_reference_and_what_a_bar_is(analysis: Analysis) -> None:
    for name in ("pareto_nll", "rank_nll", "arms_nll", "learn_forget", "heatmap_nll"):
        text = captions.caption(analysis, name)
        assert "the reference arm (full r16)" in text, name
        assert "95% interval of the paired difference" in text
    assert "thin dashed line" not in captions.caption(analysis, "learn_forget")
    assert "Holm's correction for 12 comparisons are hatched" in captions.caption(analysis, "heatmap_nll")
    assert "Full fine-tuning is a line" in captions.caption(analysis, "rank_nll")
    assert "Full fine-tuning is a line" not in captions.caption(analysis, "forest")
