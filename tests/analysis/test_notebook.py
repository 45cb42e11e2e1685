import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import analyse, archive, load
from tests.analysis.synthetic import write_study

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "paper.ipynb"


def cells() -> list[str]:
    plain = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in plain["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, object] = {}
    for source in cells():
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    made = names["made"]
    assert isinstance(made, dict)
    assert not isinstance(made["pareto_nll"], str)


@pytest.mark.parametrize(("chosen", "kept"), [("module://an_inline_backend", True), ("tkagg", False)])
def test_a_notebook_keeps_the_backend_that_shows_its_figures(chosen: str, kept: bool, tmp_path: Path) -> None:
    (tmp_path / "an_inline_backend.py").write_text("from matplotlib.backends.backend_agg import FigureCanvas\n")
    code = "import matplotlib, analysis.style; print(matplotlib.get_backend())"
    folders = os.pathsep.join([str(tmp_path), str(NOTEBOOK.parents[1])])
    environment = os.environ | {"MPLBACKEND": chosen, "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == (chosen if kept else "Agg"), done.stderr


def test_outputs_are_stripped_and_only_analysis_is_called() -> None:
    plain = json.loads(NOTEBOOK.read_text())
    for cell in plain["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    imports = [line for source in cells() for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["from pathlib import Path", "from analysis import analyse, archive, figures, load, tables"]


def test_the_shipped_study_is_small() -> None:
    assert (NOTEBOOK.parent / "study.tar.xz").stat().st_size < 600_000


def test_an_archive_gives_the_same_scores(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0, 1), examples=30, steps=200)
    first = archive.create(study, tmp_path / "one.tar.xz")
    assert first.read_bytes() == archive.create(study, tmp_path / "two.tar.xz").read_bytes()
    folder = archive.extract(first, tmp_path / "again")
    before, after = analyse(load(study), draws=50).arms, analyse(load(folder), draws=50).arms
    assert after["nll"].to_list() == pytest.approx(before["nll"].to_list(), rel=1e-5)
    assert len(load(folder).curves(load(folder).runs["run_id"].head(1))) == 50


def test_an_empty_study_does_not_replace_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "study.tar.xz"
    kept.write_bytes(b"kept")
    assert archive.main([str(tmp_path / "nowhere"), str(kept)]) == 2
    assert "nowhere: no record in it. Give the folder of a study" in capsys.readouterr().err
    assert kept.read_bytes() == b"kept"
