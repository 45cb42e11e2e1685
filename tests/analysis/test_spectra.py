"""Spectra that lie beside records become columns, rows by module and a table; broken ones are named."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from analysis import Analysis, analyse, figures, load, tables
from analysis.exchange import from_published
from sweeper.record import SPECTRA
from tests.analysis.synthetic import LAYERS, write_study


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_study(tmp_path / "small", ranks=(4,), seeds=(0, 1), examples=20, steps=3, spectra=True)


def test_a_run_has_columns_of_its_update(small: Path) -> None:
    runs = load(small).runs.set_index("placement")
    squares = sum((layer + 1) ** 2 for layer in range(LAYERS))
    attn, full = runs.loc["attn"].iloc[0], runs.loc["full"].iloc[0]
    assert attn["update_norm"] == pytest.approx(math.sqrt(4 * squares))
    assert full["update_norm"] == pytest.approx(math.sqrt(4 * squares + 3 * 4 * squares))
    assert (attn["effective_rank"], attn["stable_rank"]) == (3.0, 1.5)
    assert (attn["intruder_dimensions"], full["intruder_dimensions"]) == (4, 7)
    assert attn["energy.attn_q"] == pytest.approx(0.25)
    assert full["energy.ff_up"] == pytest.approx(4 / 16)
    assert pd.isna(attn["energy.ff_up"])


def test_modules_by_run(small: Path) -> None:
    study = load(small)
    runs = study.runs[study.runs["placement"] == "ff"]["run_id"]
    rows = study.spectra(runs)
    assert len(rows) == 2 * 3 * LAYERS
    assert rows.groupby("run_id")["energy_share"].sum().tolist() == pytest.approx([1.0, 1.0])
    assert study.spectra([]).empty


def test_runs_from_elsewhere_stand_beside_those_with_spectra(small: Path, tmp_path: Path) -> None:
    """An imported run has no folder, in which nothing can be looked for."""
    rows = from_published(Path(__file__).parent / "data" / "published_2025.json")
    study = load(small, rows=rows)
    everyone = study.runs["run_id"]
    assert study.folder(rows[0]["run_id"]) is None
    assert len(study.spectra(everyone)) > 0
    assert set(study.curves(everyone)["run_id"]) == set(study.runs[study.runs["source"] == "study"]["run_id"])
    analysis = analyse(study, draws=20)
    assert len(analysis.tables["spectra"]) == 3
    assert not isinstance(figures.where_energy_went(analysis), str)


def test_a_table_by_arm(analysis: Analysis) -> None:
    table = analysis.tables["spectra"].set_index("arm")
    row = table[[label.startswith("ff") and "16" in label for label in table.index]].iloc[0]
    assert row["runs"] == 3
    assert row["effective_rank"] == 12.0
    assert row["intruder_dimensions"] == 3
    assert row["energy"] == "ff_gate 33%, ff_up 33%, ff_down 33%"
    assert any(sheet.name == "spectra" for sheet in tables.sheets(analysis))


def test_a_study_without_spectra_has_none(tmp_path: Path) -> None:
    study = load(write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=20, steps=2))
    assert "update_norm" not in study.runs
    found = analyse(study, draws=50)
    assert found.tables["spectra"].empty
    assert not any(sheet.name == "spectra" for sheet in tables.sheets(found))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "spectra.json: JSONDecodeError"),
        ('{"schema": 2}', "python adapters.py spectra"),
        ('{"schema": 1, "modules": [{"name": "q"}]}', "a module without role"),
    ],
)
def test_a_broken_file_is_named_and_the_run_stays(text: str, line: str, small: Path) -> None:
    folder = sorted(small.iterdir())[0]
    (folder / SPECTRA).write_text(text)
    study = load(small)
    assert len(study.runs) == 6
    (problem,) = study.problems
    assert (problem.kind, problem.folder) == ("broken spectra", str(folder))
    assert line in problem.message
    assert study.runs["update_norm"].isna().sum() == 1


def test_what_the_command_wrote_is_what_is_read(small: Path) -> None:
    """The fields that the analysis needs are fields of what the training side writes."""
    from analysis.spectra import BY_MODULE, SCHEMA
    from sweeper.adapters import spectra

    assert set(BY_MODULE) <= set(spectra.ModuleSpectrum.__dataclass_fields__)
    assert spectra.SCHEMA == SCHEMA
    assert json.loads((sorted(small.iterdir())[0] / spectra.FILE).read_text())["schema"] == SCHEMA
