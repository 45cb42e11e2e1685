import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

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


def test_what_is_written_is_utf8_whatever_the_locale(study_folder: Path, root: Path, tmp_path: Path) -> None:
    """Where text is ASCII unless said otherwise, as it is Latin elsewhere."""
    command = [sys.executable, "-m", "analysis", str(study_folder), "--out", str(tmp_path), "--draws", "20"]
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [*command, "--no-figures", "--export", "peft"], cwd=root, env=os.environ | plain, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert " ± " in (tmp_path / "tables" / "efficiency.md").read_text(encoding="utf-8")
    assert not (tmp_path / "report.html").read_text(encoding="utf-8").isascii()


def test_figures_of_a_former_analysis_are_told_of_and_not_in_the_report(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "pareto_nll.png").write_text("of another study")
    assert main([str(study_folder), "--out", str(tmp_path), "--draws", "20", "--no-figures"]) == 0
    assert f"not of this analysis, left in {tmp_path}/figures/: pareto_nll.png\n" in capsys.readouterr().out
    assert "data:image/png" not in (tmp_path / "report.html").read_text()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path)]) == 2
    assert "no record to analyse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: give a study's folder, such as outputs/default, or --import"),
        (["STUDY", "--draws", "0"], "error: --draws must be at least 1, got 0"),
        (["STUDY", "--seed=-1"], "error: --seed must be at least 0, got -1"),
        (["STUDY", "--export", "xls"], "error: argument --export: invalid choice: 'xls'"),
        (["STUDY", "--tuned", "optim.rate"], "error: --tuned optim.rate: no such field. Of this study vary "),
        (["STUDY", "--metric", "bleu"], "error: metric bleu: no such score. Choose from nll"),
        (["STUDY", "--out", "STUDY/../file/paper"], "this folder cannot be made (Not a directory)"),
    ],
)
def test_each_wrong_argument_is_one_line(
    arguments: list[str], line: str, study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    study.symlink_to(study_folder)
    (tmp_path / "file").write_text("")
    given = [one.replace("STUDY/..", str(tmp_path)).replace("STUDY", str(study)) for one in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "paper")] * bool(given)
    try:
        code: object = main(given)
    except SystemExit as exit_:
        code = exit_.code
    told = capsys.readouterr().err
    assert code == 2
    assert told.count("\n") == 1
    assert line in told


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


@pytest.mark.slow
def test_a_venue_sets_the_width_and_an_unknown_one_is_refused(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(study_folder), "--out", str(tmp_path), "--venue", "iclr"]) == 2
    assert "venue iclr: no such venue. Choose from icml, neurips, acl." in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert main([str(study_folder), "--out", str(tmp_path), "--venue", "acl", "--draws", "50"]) == 0
    image = imread(tmp_path / "figures" / "forest.png")
    assert image.shape[1] == pytest.approx(300 * 16 / 2.54, abs=2)
