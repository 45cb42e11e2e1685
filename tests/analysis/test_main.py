from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.analysis.synthetic import edit


def test_one_command_writes_everything(study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "paper"
    assert main([str(study_folder), "--out", str(out), "--draws", "100", "--export", "csv"]) == 0
    for name in (
        "report.html",
        "tables/efficiency.tex",
        "figures/pareto_nll.pdf",
        "figures/importance.png",
        "csv/runs.csv",
    ):
        assert (out / name).stat().st_size > 100, name
    text = capsys.readouterr().out
    assert "84 completed" in text
    assert "check: tuned to the edge" in text


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path)]) == 2
    assert "no record to analyse" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_a_study_where_all_failed_still_gets_a_report(study_folder: Path, tmp_path: Path) -> None:
    import shutil

    study = tmp_path / "failed"
    for folder in sorted(study_folder.iterdir())[:2]:
        shutil.copytree(folder, study / folder.name)
        edit(
            study / folder.name,
            lambda plain: plain.update(status="failed", scores={}, error={"class": "E", "message": "m"}),
        )
    assert main([str(study), "--out", str(tmp_path / "paper")]) == 0
    assert "E: m" in (tmp_path / "paper" / "report.html").read_text()
