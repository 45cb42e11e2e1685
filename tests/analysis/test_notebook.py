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


def test_every_cell_is_run_in_order_and_has_its_outputs() -> None:
    """`make notebook` stores them; a cell that is changed without it shows up here."""
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert [index for index, cell in enumerate(code) if not cell["outputs"]] == []
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert set(kinds) <= {"execute_result", "display_data", "stream"}
    assert [output["name"] for cell in code for output in cell["outputs"] if "name" in output].count("stderr") == 0
    pictures = [
        output["data"]["image/png"]
        for cell in code
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    assert NOTEBOOK.stat().st_size < 250_000


def test_stored_outputs_are_those_of_the_cells() -> None:
    """A text that is printed is printed again: the study and the code are those that made the outputs."""
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    (shown,) = [
        "".join(cell["outputs"][0]["data"]["text/plain"])
        for cell in code
        if "study.counts()" in "".join(cell["source"])
    ]
    study = load(archive.extract(NOTEBOOK.parent / "study.tar.xz"))
    assert shown == repr(study.counts())


def test_only_analysis_is_called() -> None:
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
