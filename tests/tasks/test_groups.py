"""Units of independence: what every family's unit is, how many a split has, and that predictions name them."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from analysis import groups
from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec, from_mapping
from sweeper.tasks.example import Example
from sweeper.tasks.split import split_examples, units
from tests.tasks.test_leakage import load, offline

CONF = Path(__file__).parents[2] / "conf" / "dataset"
# Of ids, texts and groups. A dataset that comes to mean other data needs another name.
DIGESTS = {
    "chain_sum": "80131db6a18b7fae",
    "codeio": "8356f08a8d4bf1af",
    "gsm_symbolic": "cb73b5ade4bb6615",
    "gsm_symbolic_wide": "269843f88a44e7ec",
    "hpo_term": "d9143a15eece214f",
    "hpo_term_wide": "628eecfae03a8fc6",
    "human_eval": "3be9e341daca6fb4",
    "icd10_chapter": "8ee4ee7525cd192f",
    "licence_category": "09d491e7ccfecbe4",
    "long_sum": "d9daf38931596057",
}


def spec_of(name: str) -> DatasetSpec:
    plain: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    return from_mapping(DatasetSpec, plain)


def documented(root: Path) -> dict[str, tuple[str, str]]:
    """Task -> unit and counts, as the table of units in docs/tasks.md has them."""
    table = (root / "docs" / "tasks.md").read_text().split("| task | unit |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: (unit, counts) for names, unit, counts in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("spec", offline())
def test_the_table_says_how_many_units_a_split_has(spec: DatasetSpec, root: Path) -> None:
    unit, counts = documented(root)[spec.name]
    assert unit == getattr(tasks.FAMILIES[spec.family], "UNIT")  # noqa: B009 (the protocol leaves it open)
    splits = load(spec)
    validation, test = (len(set(units(splits[split]))) for split in ("validation", "test"))
    assert counts == f"{validation or '–'} / {test}"
    sides: dict[str, str] = {}
    for split, examples in splits.items():
        for name in units(examples):
            assert sides.setdefault(name, split) == split, f"{name} is in {sides[name]} and {split}"


def test_every_family_says_what_its_unit_is() -> None:
    for name, family in tasks.FAMILIES.items():
        assert getattr(family, "UNIT", ""), name


@pytest.mark.parametrize("name", DIGESTS)
def test_a_name_means_the_data_that_it_meant(name: str) -> None:
    splits = load(spec_of(name))
    plain = {
        split: [(e.id, e.prompt, e.response, e.group, e.choices, e.check) for e in part]
        for split, part in splits.items()
    }
    assert hashlib.sha256(repr(plain).encode()).hexdigest()[:16] == DIGESTS[name]


def test_the_wide_names_hold_out_more_groups() -> None:
    gsm, hpo = (load(spec_of(f"{name}_wide")) for name in ("gsm_symbolic", "hpo_term"))
    assert [len({e.group for e in gsm[split]}) for split in ("train", "validation", "test")] == [30, 15, 40]
    assert set(Counter(e.group for e in gsm["test"]).values()) == {6}
    assert len({e.group for e in hpo["test"]}) == len(hpo["test"]) == 400
    kept = {e.group for split in ("validation", "test") for e in hpo[split]}
    assert not kept & {e.group for e in hpo["train"]}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsm_symbolic", {"test_templates": 0}, "test_templates must be a whole number from 1 to 84, got 0"),
        ("gsm_symbolic", {"validation_templates": True}, "validation_templates must be a whole number from 1 to 84"),
        ("gsm_symbolic", {"test_templates": 60, "validation_templates": 25}, "leave none of the 85 templates"),
        ("gsm_symbolic", {"test_templates": 2}, "test_examples=208: the 2 templates of this split give at most 200"),
        ("hpo_term", {"held_out_per_parent": 0}, "held_out_per_parent must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_held_out_is_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tasks.check(replace(spec_of(name), options=options))


def test_of_a_cluster_that_is_held_out_some_may_be_kept_and_none_is_trained_on() -> None:
    examples = [Example(f"{i}", f"question {i}", "a", f"group {i // 5}") for i in range(300)]
    spec = DatasetSpec(name="d", family="jsonl", validation_examples=10, test_examples=30)
    whole, thinned = split_examples(examples, spec), split_examples(examples, spec, held_out_each=2)
    assert len({e.group for e in whole["test"]}) == 6
    assert Counter(Counter(e.group for e in thinned["test"]).values()) == {2: 15}
    assert len(thinned["train"]) == 300 - 5 * (15 + 5)
    assert not {e.group for e in thinned["train"]} & {e.group for part in ("validation", "test") for e in thinned[part]}


def test_a_unit_joins_groups_that_share_a_prompt_and_has_a_short_name() -> None:
    long = "a clause " * 20
    examples = [
        Example("1", "Which letter?", "a", "x"), Example("2", "which letter", "b", "y"), Example("3", "?", "c", "y"),
        Example("4", "Another", "d", long), Example("5", "Own", "e", "5"),
    ]  # fmt: skip
    found = units(examples)
    assert found[:3] == ["x", "x", "x"]
    assert re.fullmatch(r"[0-9a-f]{12}", found[3])
    assert found[4] == "5"
    assert units([examples[3]]) == [found[3]]


def test_the_units_are_encoded_and_kept_in_the_cache(
    tmp_path: Path, make_tokenizer: Callable[..., Any], write_jsonl: Callable[..., str]
) -> None:
    rows = [{"prompt": f"p {i}", "response": "r", "split": "test", "patient": i // 4} for i in range(12)]
    rows += [{"prompt": f"q {i}", "response": "r", "patient": f"q{i}"} for i in range(12)]
    spec = DatasetSpec(
        name="d", family="jsonl", path=write_jsonl(*rows), template="plain", options={"group": "patient"}
    )
    made = tasks.encode(spec, make_tokenizer(), model_key="m", cache=tmp_path / "tokens")
    assert Counter(e.group for e in made["test"].examples) == {"0": 4, "1": 4, "2": 4}
    assert tasks.data_of(made)["test"]["groups"] == 3
    assert tasks.encode(spec, make_tokenizer(), model_key="m", cache=tmp_path / "tokens") == made
    ungrouped = tasks.encode(replace(spec, options={}), make_tokenizer(), model_key="m", cache=tmp_path / "tokens")
    assert all(e.unit == e.id for e in ungrouped["test"].examples)
    assert tasks.data_of(ungrouped)["test"]["groups"] == 12


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("doctor", r"my.jsonl:1: missing doctor, .*options.group; this line has the keys prompt, response, patient"),
        ("patient", r"my.jsonl:2: missing patient, .*dataset.options.group; this line has the keys prompt, response"),
        (3, r"dataset.options.group must be the name of a key of the lines, got 3"),
    ],
)  # fmt: skip
def test_a_key_for_the_group_is_in_every_line(group: object, message: str, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl({"prompt": "p", "response": "r", "patient": 1}, {"prompt": "q", "response": "r"})
    with pytest.raises(DataError, match=message):
        tasks.check(DatasetSpec(name="d", family="jsonl", path=path, options={"group": group}))


@pytest.mark.parametrize("spec", offline())
def test_groups_read_off_ids_are_the_task_s(spec: DatasetSpec) -> None:
    """The analysis may say what an earlier version's groups were only where it says what the task does."""
    for examples in load(spec).values():
        recovered = groups.recovered(spec.family, [e.id for e in examples])
        assert recovered == (units(examples) if spec.family in groups.FROM_IDS and examples else None)
