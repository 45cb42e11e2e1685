"""The mixed model on request: effects of a known truth, and one line where it cannot be had."""

from pathlib import Path

import pytest

from analysis import load, mixed
from analysis.__main__ import main
from analysis.arms import arrange
from sweeper import installation
from tests.analysis.synthetic import Truth, write_study

pytest.importorskip("statsmodels")


def test_the_placements_differ_by_what_they_were_made_with(tmp_path: Path) -> None:
    truth = Truth(placements={"attn": 0.3, "ff": 0.2}, per_doubling=0.02, arm_example_sd=0.01, cell_sd=0.01)
    write_study(tmp_path / "s", truth=truth, ranks=(4, 8), examples=60, steps=2, groups=12)
    table = mixed.table(arrange(load(tmp_path / "s")), "nll").set_index("term")
    assert table.loc["placement ff", "estimate"] == pytest.approx(-0.1, abs=0.03)
    assert table.loc["rank, per doubling", "low"] < -0.01
    assert (table["p"] > 0).all()
    assert (table["level"] == "example").all()


def test_many_rows_are_averaged_within_seed_and_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_study(tmp_path / "s", ranks=(4,), examples=60, steps=2, groups=12)
    monkeypatch.setattr(mixed, "MOST_ROWS", 200)
    table = mixed.table(arrange(load(tmp_path / "s")), "nll")
    assert set(table["level"]) == {"seed × group"}
    assert set(table["rows"]) == {3 * 3 * 12}


def test_without_statsmodels_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "s", ranks=(4,), examples=20, steps=2)
    monkeypatch.setattr(mixed.importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--mixed"]) == 2
    assert capsys.readouterr().err == f"error: --mixed needs statsmodels: {installation.install('mixed')}\n"
