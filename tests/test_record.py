"""Records: what is written is read again, whole or not at all, and by whoever may."""

import contextlib
import dataclasses
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import record
from sweeper.record import Efficiency, Module, Record, Score
from sweeper.spec import run_spec


def test_a_record_is_read_as_it_was_written(make_record: Callable[..., Record], tmp_path: Path) -> None:
    written = make_record(error={"class": "OSError", "message": "gone"}, search={"arm": "a", "trial": 1})
    folder = tmp_path / written.run_id
    assert record.write_record(folder, written) == folder / record.RECORD
    assert record.read_record(folder) == written
    assert record.status(folder) == "completed"
    assert list(record.records(tmp_path)) == [written]


def test_numbers_that_are_not_finite_are_null(make_record: Callable[..., Record], tmp_path: Path) -> None:
    scores = {"test": {"after": Score(nll=math.nan, tokens=1, examples=1, metrics={"bleu": math.inf})}}
    path = record.write_record(tmp_path, make_record(status="diverged", scores=scores))
    plain = json.loads(path.read_text())["scores"]["test"]["after"]
    assert (plain["nll"], plain["perplexity"], plain["metrics"]) == (None, None, {"bleu": None})
    assert math.isnan(record.read_record(tmp_path).scores["test"]["after"].nll)


def test_perplexity_follows_from_the_nll(make_record: Callable[..., Record], tmp_path: Path) -> None:
    score = Score(nll=2.0, tokens=1, examples=1, metrics={"exact_match": 0.5})
    assert score.value("perplexity") == score.perplexity == pytest.approx(math.exp(2))
    assert (score.value("nll"), score.value("exact_match"), score.value("bleu")) == (2.0, 0.5, None)
    assert record.perplexity(1e4) == math.inf


@pytest.mark.parametrize("text", ["", "[1]", '{"schema": 99}', "{"])
def test_what_is_no_record_has_no_status(text: str, tmp_path: Path) -> None:
    (tmp_path / record.RECORD).write_text(text)
    assert record.status(tmp_path) is None
    with pytest.raises(ValueError):
        record.read_record(tmp_path)


def test_a_write_that_is_cut_off_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = record.write_atomically(tmp_path / "deep" / "file", "old")

    def cut_off() -> None:
        with record.replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_files_are_open_to_whom_the_umask_lets_in(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = record.write_atomically(tmp_path / "file", "é → ü")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == "é → ü".encode()


def by_rename(path: Path, content: str) -> None:
    """Writes as a library does that is careful itself: another file, for its owner alone, takes the name."""
    other = path.with_name("other")
    other.write_text(content)
    other.chmod(0o600)
    other.replace(path)


def test_what_a_library_writes_is_on_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the rename finds the content, not an empty file."""
    path, folder = record.write_atomically(tmp_path / "file", "old"), tmp_path / "folder"
    synced: list[tuple[int, str, bool]] = []
    fsync = os.fsync

    def note(number: int) -> None:
        synced.append((os.fstat(number).st_ino, path.read_text(), folder.exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    with record.replacing_file(path) as temporary:
        by_rename(temporary, "new")
    with record.replacing_folder(folder) as made:
        by_rename(made / "part", "new")
    assert synced == [(path.stat().st_ino, "old", False), ((folder / "part").stat().st_ino, "new", False)]
    assert (path.read_text(), (folder / "part").read_text()) == ("new", "new")
    assert {stat.S_IMODE(one.stat().st_mode) for one in (path, folder / "part")} == {
        stat.S_IMODE(record.write_atomically(tmp_path / "plain", "").stat().st_mode)
    }


def test_a_folder_that_is_cut_off_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("old", "new", None):
        with contextlib.suppress(KeyboardInterrupt), record.replacing_folder(folder) as made:
            (made / str(content)).write_text("")
            if content is None:
                raise KeyboardInterrupt
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/new"]


# ---- records of every schema that there was ----

# as the first version wrote it: every field of that version, and none that came later
FIRST: dict[str, Any] = {
    "run_id": "0123456789ab", "study": "s", "status": "completed",
    "spec": {
        "model": {"name": "tiny_llama", "source": "random", "location": "llama"},
        "dataset": {"name": "jsonl", "family": "jsonl"},
        "method": {"name": "lora"},
        "placement": {"name": "attn", "roles": ["attn_q", "attn_k", "attn_v", "attn_o"]},
        "allocation": {"name": "uniform"},
        "rank": 4, "alpha": 8.0, "seed": 0,
        "optim": {"lr": 1e-3}, "trainer": {"max_steps": 4, "batch_size": 2}, "evaluation": {"name": "default"},
    },
    "modules": [{"name": "layers.0.self_attn.q_proj", "role": "attn_q", "layer": 0, "rank": 4, "parameters": 512}],
    "trainable_parameters": 512, "total_parameters": 100_000, "steps": 4,
    "scores": {
        "test": {
            "before": {"nll": 2.0, "tokens": 10, "examples": 2, "metrics": {"exact_match": 0.0}, "perplexity": 7.39},
            "after": {"nll": 1.0, "tokens": 10, "examples": 2, "metrics": {"exact_match": 0.5}, "perplexity": 2.72},
        }
    },
    "data": {}, "environment": {"device": "cpu"}, "error": None,
    "efficiency": {
        "train_seconds_amortised": 1.0, "eval_seconds_amortised": 0.5, "train_seconds_solo": None,
        "peak_memory_solo_bytes": None, "tokens_per_second_solo": None, "train_tokens": 100, "train_flops": 1e9,
        "adapter_bytes": 2048, "pack_runs": 1, "pack_seconds": 1.0, "pack_peak_memory_bytes": None,
        "compile_seconds": None,
    },
    "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:02+00:00", "schema": 1,
}  # fmt: skip
SCHEMAS = {1: FIRST}


@pytest.mark.parametrize("schema", range(1, record.SCHEMA_VERSION + 1))
def test_a_record_of_every_schema_is_read(schema: int, tmp_path: Path) -> None:
    from analysis.load import load

    folder = tmp_path / "s" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / record.RECORD).write_text(json.dumps(SCHEMAS[schema]))
    found = record.read_record(folder)
    assert (found.run_id, found.status, found.scores["test"]["after"].nll) == ("0123456789ab", "completed", 1.0)
    assert found.modules[0].parameters == found.trainable_parameters == 512
    assert run_spec(found.spec).rank == 4
    study = load(tmp_path / "s")
    assert not study.problems
    row = study.runs.iloc[0]
    assert (row["test.nll"], row["test.before.nll"], row["rank"], row["placement"]) == (1.0, 2.0, 4, "attn")


def test_the_schema_is_a_new_one_where_a_field_loses_its_place() -> None:
    """A field of the first version that is gone or of another kind would make its records unreadable."""
    for kind, plain in ((Record, FIRST), (Efficiency, FIRST["efficiency"]), (Module, FIRST["modules"][0])):
        assert {item.name for item in dataclasses.fields(kind)} >= set(plain)
