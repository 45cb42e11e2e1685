import dataclasses
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from analysis import Analysis, analyse, load
from analysis.manifest import MANIFEST, unlisted
from analysis.tables import (
    COMMONEST,
    Cell,
    Sheet,
    _estimate,
    latex,
    markdown,
    number,
    placement_rank,
    sheets,
    tex,
    title,
    write,
)
from tests.analysis.synthetic import edit, write_study

NASTY = "50% of $x_1$ & {a\\b} #2 ~ ^ <é> 漢 | ± × …"


def test_every_table_is_written_in_three_forms(analysis: Analysis, tmp_path: Path) -> None:
    written = {path.name for path in write(analysis, tmp_path)}
    wanted = ("placement_rank_nll", "efficiency", "tests", "matched_budget", "share_kept", "tuned", "anova", "power")
    assert {f"{name}.{suffix}" for name in wanted for suffix in ("md", "tex")} <= written
    tests = pd.read_csv(tmp_path / "tests.csv")
    assert len(tests) == len(analysis.tables["tests"])


def test_the_base_model_leads_every_table_of_arms(analysis: Analysis) -> None:
    for sheet in sheets(analysis):
        if sheet.name.startswith("placement_rank") or sheet.name == "efficiency":
            firsts = [row[1].text for row in sheet.rows if row[0].text == "icd10_chapter"]
            assert firsts[0] == "base model", sheet.name


def test_bold_only_where_significantly_best(analysis: Analysis) -> None:
    tests = analysis.tables["tests"]
    for metric in analysis.found.metrics:
        sheet = placement_rank(analysis, metric)
        for row in sheet.rows:
            for rank, cell in zip((4, 16), row[-2:], strict=True):
                if cell.bold:
                    arm = f"{row[1].text} r{rank} lora"
                    mine = tests[
                        (tests["setting"] == row[0].text)
                        & (tests["metric"] == metric)
                        & (tests["family"] == "placement")
                    ]
                    mine = mine[(mine["a"] == arm) | (mine["b"] == arm)]
                    assert len(mine) == 2
                    assert set(mine["better"]) == {arm}
    assert any(cell.bold for row in placement_rank(analysis, "nll").rows for cell in row)


def test_text_is_escaped() -> None:
    sheet = Sheet(name="x", caption=NASTY, header=[NASTY], rows=[[Cell(value=NASTY, text=NASTY)]])
    assert "\\|" in markdown(sheet)
    text = tex(NASTY)
    for raw in ("50% ", " & ", "x_1", " #2"):
        assert raw not in text
    assert text.isascii()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(analysis: Analysis, tmp_path: Path) -> None:
    write(analysis, tmp_path)
    nasty = Sheet(name="nasty", caption=NASTY, header=[NASTY] * 3, rows=[[Cell(value=NASTY, text=NASTY)] * 3] * 60)
    (tmp_path / "nasty.tex").write_text(latex(nasty))
    document = (tmp_path / "all.tex").read_text().replace("\\end{document}", "\\input{nasty}\n\\end{document}")
    (tmp_path / "all.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    over = [float(points) for points in re.findall(r"Overfull .hbox \(([\d.]+)pt too wide\)", done.stdout)]
    assert max(over, default=0) < 57  # points of the margin of a page
    assert (tmp_path / "all.pdf").stat().st_size > 10_000


def test_bold_is_the_best_of_methods_too(tmp_path: Path) -> None:
    """Two methods that are alike are not both the best, whatever they do to other placements."""
    study = write_study(tmp_path / "s", ranks=(4, 8), methods=("lora", "dora"), examples=60, steps=2)
    found = analyse(load(study), draws=200)
    placement = found.tables["tests"].query("family == 'placement' and metric == 'nll'")
    assert set(placement[placement["b"].str.startswith("full")]["better"]) >= {"full r4 lora", "full r4 dora"}
    assert not [cell for row in placement_rank(found, "nll").rows for cell in row if cell.bold]
    tests = found.tables["tests"]
    pairs = set(zip(tests["a"], tests["b"], strict=True))
    assert ("attn r4 dora", "attn r4 lora") in pairs


def test_a_method_without_a_rank_keeps_its_name_and_its_placement(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "s", ranks=(4, 8), seeds=(0,), methods=("lora", "bitfit", "full_ft"), examples=20, steps=2
    )
    sheet = placement_rank(analyse(load(study), draws=50), "nll")
    assert sheet.header[:2] == ["placement", "method"]
    firsts = [(row[0].text, row[1].text) for row in sheet.rows]
    assert firsts[0] == ("base model", "")
    assert set(firsts[1:5]) == {("full fine-tuning", ""), *((name, "bitfit") for name in ("attn", "ff", "full"))}
    assert "no rank stands in the first column" in sheet.caption


def test_wide_tables_fit_on_a_page() -> None:
    cells = [Cell(value=1.0, text="0.123 [0.100, 0.200]")] * 8
    assert latex(Sheet(name="x", caption="", header=["x"] * 8, rows=[cells] * 50)).startswith("\\begin{landscape}")
    sentence = [Cell(value="", text="a sentence that breaks into lines, " * 4), Cell(value=1, text="1")]
    text = latex(Sheet(name="x", caption="", header=["x", "y"], rows=[sentence]))
    assert "p{0.9" in text
    assert "resizebox" not in text


def test_a_table_of_a_former_analysis_does_not_stay_and_whatever_else_there_is_does(
    analysis: Analysis, tmp_path: Path
) -> None:
    fewer = dataclasses.replace(
        analysis, tables={name: t for name, t in analysis.tables.items() if name not in ("anova", "power", "slopes")}
    )
    (tmp_path / "notes.md").write_text("mine from the start")
    (tmp_path / "anova.pdf").write_text("mine from the start")
    write(analysis, tmp_path)
    (tmp_path / "power.md").write_text("mine by now")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "slopes.md").write_text("mine from the start")
    written = write(fewer, tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    mine = {"notes.md", "anova.pdf", "power.md", "kept/slopes.md"}
    assert left == {path.name for path in written} | mine | {MANIFEST}
    assert all((tmp_path / name).read_text().startswith("mine") for name in mine)
    assert unlisted(tmp_path, written) == ["notes.md", "power.md"]


@pytest.mark.parametrize("note", ["", "[]", '{"../mine.md": "DIGEST", "/": 3, "": null, "..": []}'])
def test_a_manifest_that_is_not_ours_removes_nothing(note: str, analysis: Analysis, tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("mine")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / MANIFEST).write_text(note.replace("DIGEST", hashlib.sha256(b"mine").hexdigest()))
    write(analysis, tmp_path / "tables")
    assert (tmp_path / "mine.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.12345, "0.1235"), (-1.5, "−1.5"), (1234567.0, "1.23e+06"), (12345.6, "12,346"), (3e-7, "3e−07")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_field_keeps_its_name() -> None:
    assert [title(key) for key in ("trainer.max_steps", "macro_f1", "nll")] == ["trainer.max_steps", "macro f1", "NLL"]


def test_the_commonest_answer_stands_below_the_base_model(analysis: Analysis) -> None:
    """Only where the records have it, and only for the metrics it has."""
    runs = analysis.found.runs
    runs[f"{analysis.found.split}.majority.exact_match"] = 0.25
    found = placement_rank(analysis, "exact_match")
    place = next(place for place, row in enumerate(found.rows) if any(cell.text == COMMONEST for cell in row))
    assert any(cell.text == "base model" for row in found.rows[:place] for cell in row)
    assert any(cell.value == 0.25 for cell in found.rows[place])
    assert not any(cell.text == COMMONEST for row in placement_rank(analysis, "nll").rows for cell in row)


def test_seconds_have_the_interval_of_their_repeated_timings(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=20, steps=10)
    for path in study.glob("*/record.json"):
        edit(path.parent, lambda record: record["efficiency"].update(step_seconds_solo=[0.10, 0.11, 0.12]))
    found = analyse(load(study), draws=50)
    arm = found.arms[found.arms["arm"] != "base model"].iloc[0]
    # t(2) = 4.303, sd 0.01, three timings, ten steps
    assert arm["train_seconds_solo_high"] == pytest.approx(10 * (0.11 + 4.303 * 0.01 / 3**0.5), rel=1e-3)
    sheet = next(one for one in sheets(found) if one.name == "efficiency")
    assert re.search(r"\[0\.85, 1\.35\]", markdown(sheet))


def test_an_interval_that_is_not_symmetric_is_written_out() -> None:
    row = {"x": 24_308.0, "x_low": 15_520.0, "x_high": 38_072.0, "y": 0.5, "y_low": 0.4, "y_high": 0.6}
    assert _estimate(row, "x").text == "24,308 [15,520, 38,072]"
    assert _estimate(row, "y").text == "0.50 ± 0.10"
