"""Units of independence of predictions: as written, or read off ids where an earlier version did not write them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import load
from analysis.groups import recovered
from sweeper.record import PREDICTIONS
from tests.analysis.synthetic import edit, write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(
        tmp_path / "study", datasets=("gsm_symbolic",), ranks=(4,), seeds=(0,), examples=12, steps=5, modules=False
    )


def rewrite(folder: Path, names: Sequence[str], groups: Sequence[str | None] | None = None) -> None:
    """Gives the examples of every prediction other ids and, where given, groups."""
    lines = [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
    place = {name: i for i, name in enumerate(dict.fromkeys(line["id"] for line in lines))}
    for line in lines:
        index = place[line["id"]]
        line["id"] = names[index]
        if groups is not None and groups[index] is not None:
            line["group"] = groups[index]
    (folder / PREDICTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def counted(groups: int | None) -> Any:
    facts = {"examples": 12} | ({} if groups is None else {"groups": groups})
    return lambda plain: plain["data"].update(test=facts)


def columns(folder: Path, run: Path) -> dict[str, list[Any]]:
    return load(folder).example_columns(run.name, split="test", phase="after")


def test_groups_are_read_as_they_are_written(study: Path) -> None:
    run = sorted(study.iterdir())[0]
    names, groups = [f"{i}" for i in range(12)], [f"doc{i // 4}" for i in range(12)]
    rewrite(run, names, groups)
    edit(run, counted(3))
    found = columns(study, run)
    assert dict(zip(found["id"], found["group"], strict=True)) == dict(zip(names, groups, strict=True))
    assert load(study).runs.set_index("run_id")["data.test.groups"][run.name] == 3
    assert run.name not in load(study).ungrouped()


def test_an_example_between_groups_is_a_unit_of_its_own(study: Path) -> None:
    run = sorted(study.iterdir())[0]
    rewrite(run, [f"{i}" for i in range(12)], [None, "a", "a", *["b"] * 9])
    assert columns(study, run)["group"] == ["0", "a", "a", *["b"] * 9]


def test_a_record_that_counts_units_needs_no_groups(study: Path) -> None:
    run = sorted(study.iterdir())[0]
    rewrite(run, [f"{i // 4}-{i}" for i in range(12)])
    edit(run, counted(12))
    assert "group" not in columns(study, run)
    assert run.name not in load(study).ungrouped()


def test_groups_of_an_earlier_version_are_read_off_the_ids(study: Path) -> None:
    first, second, third = sorted(study.iterdir())
    rewrite(first, [f"{i // 4}-{i}" for i in range(12)])
    edit(first, counted(None))
    rewrite(second, [f"HumanEval/{i}" for i in range(12)])
    edit(second, lambda plain: plain["spec"]["dataset"].update(name="human_eval", family="human_eval"))
    edit(second, counted(None))
    edit(third, counted(None))
    assert columns(study, first)["group"] == [f"template-{i // 4}" for i in range(12)]
    assert "group" not in columns(study, second)
    assert load(study).ungrouped() == [third.name]


@pytest.mark.parametrize(
    ("family", "ids", "units"),
    [
        ("gsm_symbolic", ["3-0", "3-17", "12-1"], ["template-3", "template-3", "template-12"]),
        ("gsm_symbolic", ["3-0", "line-4"], None),
        ("gsm_symbolic", ["3-0-1"], None),
        ("icd10_chapter", ["S52.001A", "QA0.0101", "J82"], ["S52", "QA0", "J82"]),
        ("icd10_chapter", ["S52.001A", "S5"], None),
        ("hpo_term", ["HP:0001634"], None),
        (None, ["3-0"], None),
        ("gsm_symbolic", [], None),
    ],
)
def test_ids_tell_the_unit_for_certain_or_not_at_all(
    family: str | None, ids: list[str], units: list[str] | None
) -> None:
    assert recovered(family, ids) == units
