"""What a study's library was scored to do, in the analysis: intervals by paired examples, and files that are broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import Analysis, analyse, archive, captions, figures, load, tables, task_figures
from tests.analysis.test_together import write_run

EXAMPLES = 60
SHIFTS = {"base": 1.0, "best_member": 0.0, "own": 0.0, "arrow": -0.2, "uniform": 0.0}


def write(study: Path, name: str = "abc", **changes: Any) -> Path:
    """A comparison on one task: arrow is 0.2 nats a token below the best single member, uniform by chance alone."""
    rng = np.random.default_rng(0)
    hard, tokens = rng.normal(2.0, 0.7, EXAMPLES), rng.integers(3, 9, EXAMPLES)
    lines, results = [], []
    for rule, shift in SHIFTS.items():
        each = hard + shift + (0 if rule in ("best_member", "own") else rng.normal(0, 0.05, EXAMPLES))
        right = (hard + shift < 2.0).astype(float)
        lines += [
            {
                "task": "hpo_term", "rule": rule, "id": f"e{i}", "group": f"g{i // 2}", "tokens": int(tokens[i]),
                "nll": float(each[i] * tokens[i]), "exact_match": float(right[i]),
            }
            for i in range(EXAMPLES)
        ]  # fmt: skip
        score = {"nll": float(each @ tokens / tokens.sum()), "metrics": {"exact_match": right.mean(), "macro_f1": 0.5}}
        results.append(
            {"task": "hpo_term", "rule": rule, "right": 0.75 if rule == "arrow" else None, "cost": 1.5, "score": score}
        )
    plain = {"schema": 1, "library": name, "model": "m", "members": [{}, {}, {}], "results": results} | changes
    folder = study / "library"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(plain))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    for seed in range(3):
        write_run(folder, {"icd10_chapter": 1.0}, seed=seed)
    return folder


def broken(found: Analysis) -> list[str]:
    return [one.message for one in found.study.problems if one.kind == "broken library"]


def test_rules_are_compared_on_the_same_examples(study: Path) -> None:
    write(study)
    found = analyse(load(study), draws=100)
    assert not broken(found)
    assert "no record" not in {one.kind for one in found.study.problems}  # the folder of results is no run
    table = found.tables["library"].set_index(["rule", "metric"])
    assert set(table.index) == {(rule, metric) for rule in SHIFTS for metric in ("nll", "exact_match")}
    arrow, base = table.loc[("arrow", "nll")], table.loc[("base", "nll")]
    assert arrow["score"] == pytest.approx(table.loc[("best_member", "nll"), "score"] - 0.2, abs=0.02)
    assert arrow["low"] < -0.2 < arrow["high"] < 0
    # by the same examples: far narrower than the scores' own intervals
    assert arrow["high"] - arrow["low"] < (arrow["score_high"] - arrow["score_low"]) / 4
    assert base["difference"] == pytest.approx(1.0, abs=0.02)
    assert arrow["p_holm"] < 0.001
    assert table.loc[("uniform", "nll"), "p_holm"] > 0.05
    assert (arrow["members"], arrow["examples"], arrow["groups"], arrow["right"]) == (3, EXAMPLES, EXAMPLES // 2, 0.75)
    assert table.loc[("best_member", "nll"), ["difference", "low", "high", "p", "p_holm"]].isna().all()
    assert table.loc[("own", "nll"), ["difference", "low", "high", "p"]].tolist() == [0, 0, 0, 1]  # the same member
    sheet = next(one for one in tables.sheets(found) if one.name == "library")
    assert "| arrow | nll | 60 | 30 |" in sheet.markdown


def test_the_figure_has_a_row_a_rule(study: Path) -> None:
    write(study)
    write(study, "def")
    found = analyse(load(study), draws=100)
    assert "library" in figures.makers(found)
    drawn = task_figures.library(found)
    assert isinstance(drawn, Figure)
    assert len([ax for ax in drawn.axes if ax.get_visible()]) == 2  # a panel a comparison
    assert [one.get_text() for one in drawn.axes[0].get_yticklabels()] == ["base", "own", "arrow", "uniform"]
    assert "paired difference" in captions.caption(found, "library")


def test_a_study_without_one_has_no_table(study: Path) -> None:
    found = analyse(load(study), draws=100)
    assert found.tables["library"].empty
    assert "library" not in figures.makers(found)


def test_an_archive_of_the_study_has_it(study: Path, tmp_path: Path) -> None:
    write(study)
    again = archive.extract(archive.create(study, tmp_path / "study.tar.xz"), tmp_path / "again")
    there, here = (analyse(load(folder), draws=100).tables["library"] for folder in (again, study))
    assert len(here)
    pd.testing.assert_frame_equal(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"schema": 7}, "schema 7; this version reads 1"),
        ({"results": 3}, "TypeError"),
        ({"results": [{"task": "x", "rule": "r", "score": {"metrics": {}}}]}, "KeyError"),
        ({"members": None}, "TypeError"),
    ],
)
def test_what_cannot_be_read_is_a_problem_not_an_end(study: Path, changes: dict[str, Any], line: str) -> None:
    write(study, "bad", **changes)
    write(study, "good")
    found = analyse(load(study), draws=100)
    assert set(found.tables["library"]["library"]) == {"good"}
    (message,) = broken(found)
    assert line in message
    assert "broken library" in set(found.tables["failures"]["kind"])


def test_names_of_a_foreign_file_reach_no_table(study: Path) -> None:
    folder = write(study)
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("hpo_term", "../../x$"))
    found = analyse(load(study), draws=100)
    assert found.tables["library"].empty
    assert "is no name of a task" in broken(found)[0]
