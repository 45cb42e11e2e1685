"""Fits over rank and parameters give back the law that the scores were made from."""

from pathlib import Path

import numpy as np
import pytest

from analysis import load, scaling
from analysis.arms import arrange
from analysis.stats import Draws
from tests.analysis.synthetic import Truth, write_study


def test_a_power_law_is_recovered() -> None:
    size = np.array([1.0, 2, 4, 8, 16]) * 1e5
    floor, exponent = scaling.fit(size, 0.3 + 0.5 * (size / 1e5) ** -0.7)  # type: ignore[misc]
    assert floor == pytest.approx(0.3, abs=1e-4)
    assert exponent == pytest.approx(0.7, abs=1e-4)


def test_a_straight_line_in_log_size_has_no_floor() -> None:
    size = np.array([1.0, 2, 4, 8])
    assert scaling.fit(size, 1.0 - 0.1 * np.log2(size)) is None


def test_the_slope_is_that_of_the_study_by_rank_and_by_parameters(tmp_path: Path) -> None:
    truth = Truth(placements={"attn": 0.3, "ff": 0.25}, per_doubling=0.02, seed_sd=0.001, cell_sd=0.005)
    write_study(tmp_path / "s", truth=truth, ranks=(2, 4, 8, 16), examples=100, steps=2)
    table = scaling.table(arrange(load(tmp_path / "s")), "nll", draws=Draws(300))
    assert len(table) == 4
    assert table["per_doubling"].to_numpy() == pytest.approx(-0.02, abs=0.006)
    assert (table["low"] < table["high"]).all()
    by_rank = table[table["by"] == "rank"]["per_doubling"].to_numpy()
    assert table[table["by"] == "parameters"]["per_doubling"].to_numpy() == pytest.approx(by_rank)


def test_one_rank_has_no_slope(tmp_path: Path) -> None:
    write_study(tmp_path / "s", ranks=(4,), examples=20, steps=2)
    assert scaling.table(arrange(load(tmp_path / "s")), "nll", draws=Draws(50)).empty
