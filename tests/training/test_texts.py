"""Texts that a study keeps: once for all runs, whole or shortened, and none of private data; read back in analysis."""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from analysis import analyse, examples, load
from sweeper.record import EXAMPLES, LONGEST_TEXT, MOST_TEXTS, PREDICTIONS, RECORD, read_record
from sweeper.spec import DatasetSpec
from sweeper.training import texts

GENERATE = {
    "evaluation": {"generate": True, "splits": ["test"]},
    "dataset": {"metrics": ["exact_match", "rouge_l"], "max_new_tokens": 3},
}


def test_runs_on_the_same_examples_share_one_file(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    specs = [make_run(rank=rank, **GENERATE) for rank in (2, 4)]
    run_all(specs)
    study = tmp_path / "study"
    (file,) = (study / EXAMPLES).iterdir()
    assert hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest()[:16] == file.name.removesuffix(".jsonl.gz")
    for spec in specs:
        assert read_record(study / spec.run_id).data["test"]["texts"] == file.name.removesuffix(".jsonl.gz")

    found = examples(load(study))
    source = [json.loads(line) for line in Path(specs[0].dataset.path).read_text().splitlines()]
    asked = {row["id"]: row for row in source if row["split"] == "test"}
    assert len(found) == 2 * len(asked)
    for row in found.to_dict("records"):
        assert row["prompt"].endswith(asked[row["id"]]["prompt"])
        assert row["reference"].strip() == asked[row["id"]]["response"]
        assert isinstance(row["text"], str)
    assert len(analyse(load(study), draws=20).arms) == 3  # with the base model
    before = examples(load(study), [specs[0].run_id], phase="before")
    assert before["prompt"].to_list() == found["prompt"].to_list()[: len(before)]


def test_private_data_stays_out(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    """No prompt, no answer, no group of the data in any file of the study, and the same runs by id."""
    path = tmp_path / "private.jsonl"
    rows = [
        {"prompt": f"Has patient-{n} a secret illness?", "response": f"answer-{n % 3}", "group": f"patient-{n // 2}",
         "choices": ["answer-0", "answer-1", "answer-2"]}
        for n in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "metrics": ["choice_accuracy", "rouge_l"], "max_new_tokens": 3}
    spec = make_run(**(GENERATE | {"dataset": data}))
    run_all([spec], keep_texts=False)
    study = tmp_path / "study"
    assert not (study / EXAMPLES).exists()
    for file in (file for file in study.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for word in (b"patient", b"illness", b"answer-"):
            assert word not in content, file.name
    kept = examples(load(study))
    assert kept[["prompt", "reference", "text"]].isna().all(axis=None)
    assert kept["rouge_l"].notna().all()

    run_all([spec], study="open")
    opened = examples(load(tmp_path / "open"))
    assert opened["nll"].to_list() == kept["nll"].to_list()
    assert opened["id"].to_list() == kept["id"].to_list()
    assert set(opened["choice"]) <= {"answer-0", "answer-1", "answer-2"}
    by_group = [frame.groupby("group")["id"].apply(set).to_list() for frame in (opened, kept)]
    assert sorted(map(sorted, by_group[0])) == sorted(map(sorted, by_group[1]))


def test_tasks_of_one_run_have_their_own_texts(
    make_run: Any, two_tasks: tuple[DatasetSpec, ...], run_all: Any, tmp_path: Path
) -> None:
    dataset = DatasetSpec(name="mixture", family="mixture", parts=two_tasks)
    spec = dataclasses.replace(make_run(evaluation={"splits": ["test"]}), dataset=dataset)
    run_all([spec])
    study = tmp_path / "study"
    found = examples(load(study)).groupby("run_id")
    assert set(found.groups) == {f"{spec.run_id}/parity", f"{spec.run_id}/digit"}
    assert found.get_group(f"{spec.run_id}/digit")["prompt"].str.contains("ends in").all()
    assert found.get_group(f"{spec.run_id}/parity")["prompt"].str.contains("is").all()
    assert len(list((study / EXAMPLES).iterdir())) == 2


def test_texts_are_bounded() -> None:
    long = "a" * LONGEST_TEXT + "b" * 1000
    short = texts.shortened(long)
    assert len(short) < LONGEST_TEXT + 40
    assert "[... 1,000 characters ...]" in short
    assert (short[:10], short[-10:]) == ("a" * 10, "b" * 10)
    assert texts.shortened("whole") == "whole"

    rows = [{"split": "test", "moment": "after", "id": str(i), "text": long} for i in range(MOST_TEXTS + 2)]
    found = texts.bounded(rows, keep=True)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row.get("text") for row in found] == [short] * MOST_TEXTS + [None, None]
    assert rows[0]["text"] == long


def test_who_writes_first_is_kept(tmp_path: Path) -> None:
    first = texts.write(tmp_path, '{"id": "1"}\n')
    file = tmp_path / EXAMPLES / f"{first}.jsonl.gz"
    stamp = file.stat().st_mtime_ns
    assert texts.write(tmp_path, '{"id": "1"}\n') == first
    assert file.stat().st_mtime_ns == stamp
    assert texts.write(tmp_path, '{"id": "2"}\n') != first


def test_a_study_may_be_called_as_the_folder_of_texts(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = make_run(evaluation={"splits": ["test"]}, trainer={"max_steps": 1})
    run_all([spec], study=EXAMPLES)
    assert load(tmp_path).runs["run_id"].to_list() == [spec.run_id]


@pytest.mark.parametrize("damage", ["gone", "cut", "no JSON", "a path", "no digest"])
def test_texts_that_cannot_be_read_leave_the_scores(
    damage: str, make_run: Any, run_all: Any, tmp_path: Path
) -> None:  # fmt: skip
    spec = make_run(evaluation={"splits": ["test"]}, trainer={"max_steps": 1})
    run_all([spec])
    study = tmp_path / "study"
    (file,), folder = (study / EXAMPLES).iterdir(), study / spec.run_id
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "no JSON":
        file.write_bytes(gzip.compress(b"no\n"))
    else:
        plain = json.loads((folder / RECORD).read_text())
        del plain["seal"]
        plain["data"]["test"] |= {"texts": "../../x"} if damage == "a path" else {}
        if damage == "no digest":  # as an earlier version leaves it
            del plain["data"]["test"]["texts"]
        (folder / RECORD).write_text(json.dumps(plain))
    loaded = load(study)
    found = examples(loaded)
    assert found["prompt"].isna().all()
    assert found["nll"].notna().all()
    assert [one.kind for one in loaded.problems] == (["unreadable texts"] if damage in ("cut", "no JSON") else [])
    assert (folder / PREDICTIONS).is_file()
