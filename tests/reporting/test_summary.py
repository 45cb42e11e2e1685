"""The table says what the records say, with the base model beside them."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sweeper import record
from sweeper.record import Efficiency, Record
from sweeper.reporting import summary
from sweeper.spec import RunSpec

Make = Callable[..., RunSpec]
MakeRecord = Callable[..., Record]


def test_rows_hold_the_base_model_and_every_run(make_spec: Make, make_record: MakeRecord) -> None:
    rows = summary.rows([make_record(make_spec(rank=rank)) for rank in (4, 8)])
    assert [row["placement"] for row in rows] == [summary.BASE, "attn", "attn"]
    base, first, _ = rows
    assert (base["nll"], base["trainable_parameters"], base["exact_match_before"]) == (5.0, 0, 0.0)
    assert (first["nll"], first["rank"], first["trainable_percent"]) == (0.25, 4, 0.4)
    assert (first["exact_match_before"], first["exact_match_after"]) == (0.0, 0.75)
    assert first["seconds"] == 1.5


def test_the_commonest_answer_has_a_row(make_spec: Make, make_record: MakeRecord, tmp_path: Path) -> None:
    spec = make_spec()
    data = {"validation": {"examples": 10, "majority": {"exact_match": 0.25}}}
    record.write_record(tmp_path, make_record(spec, data=data))
    rows = summary.rows([record.read_record(tmp_path)])
    assert [row["placement"] for row in rows] == [summary.BASE, summary.MAJORITY, "attn"]
    assert (rows[1]["exact_match_before"], rows[1]["nll"]) == (0.25, None)


def test_one_base_row_for_each_model(make_spec: Make, make_record: MakeRecord) -> None:
    specs = [make_spec(model={"name": name, "location": name}, rank=r) for name in ("llama", "gpt2") for r in (4, 8)]
    rows = summary.rows([make_record(spec) for spec in specs])
    assert [row["model"] for row in rows] == ["llama", "gpt2", "llama", "llama", "gpt2", "gpt2"]


def test_files_hold_the_same_rows(tmp_path: Path, make_spec: Make, make_record: MakeRecord) -> None:
    records = [make_record(make_spec(rank=rank, seed=seed)) for rank in (4, 8) for seed in (0, 1)]
    table, markdown = summary.write(tmp_path, records)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["", "0", "1", "0", "1"]
    assert float(rows[1]["nll"]) == 0.25
    assert "metric_change" not in rows[0]
    lines = markdown.read_text().splitlines()
    assert lines[0].startswith(
        "| placement | rank | seed | trainable | % | validation NLL | perplexity | accuracy before"
    )
    assert "0.000 → 0.750" in lines[3]
    assert "3 MiB" in lines[3]


def test_what_is_absent_is_a_dash(make_spec: Make, make_record: MakeRecord) -> None:
    failed = make_record(
        make_spec(rank=8),
        status="failed",
        scores={},
        trainable_parameters=0,
        total_parameters=0,
        error={"class": "E", "message": "m"},
    )
    console = Console(width=200, record=True)
    summary.show([make_record(), failed], console)
    last = console.export_text().splitlines()[3]
    assert last.split() == ["attn", "8", "-", "-", "-", "-", "-", "1.5", "3", "MiB", "failed"]


def test_a_method_without_a_rank_has_none(make_spec: Make, make_record: MakeRecord) -> None:
    record = make_record(make_spec(method={"name": "bitfit"}, rank=8))
    assert summary.rows([record])[-1]["rank"] is None


def test_no_scores_at_all_is_no_error(make_record: MakeRecord) -> None:
    console = Console(width=200, record=True)
    summary.show([make_record(scores={})], console)
    assert "accuracy" not in console.export_text()


def test_packed_seconds_are_explained(make_record: MakeRecord) -> None:
    one = make_record()
    packed = dataclasses.replace(one, efficiency=dataclasses.replace(one.efficiency, pack_runs=9))
    assert not any("share" in line for line in summary.notes([one]))
    assert any("share of its pack" in line for line in summary.notes([packed]))


def test_a_small_share_of_a_pack_is_no_zero(make_spec: Make, make_record: MakeRecord) -> None:
    console = Console(width=200, record=True)
    shown = [0.0417, 0.000312, 3.0, 1234.56]
    runs = [
        make_record(make_spec(rank=rank), efficiency=Efficiency(train_seconds_amortised=seconds))
        for rank, seconds in zip((1, 2, 4, 8), shown, strict=True)
    ]
    summary.show(runs, console)
    text = console.export_text()
    assert all(f" {seconds} " in text for seconds in ("0.0417", "0.000312", "3", "1234.6"))


def test_examples_left_out_or_cut_are_in_table_and_note(
    tmp_path: Path, make_spec: Make, make_record: MakeRecord
) -> None:
    data = {
        "train": {"examples": 98, "truncated": 5, "dropped": 2, "tokens": 900, "majority": {}},
        "test": {"examples": 10, "truncated": 0, "dropped": 0, "tokens": 90, "majority": {}},
    }
    records = [make_record(make_spec(rank=rank), data=data) for rank in (4, 8)]
    line = (
        "dataset=jsonl on model=tiny_llama: dataset.max_length: 2 of 100 train examples are left out (their response "
        "is too long); 5 of 100 train examples are cut at the prompt's start."
    )
    assert summary.notes(records).count(line) == 1
    table, markdown = summary.write(tmp_path, records)
    assert line in markdown.read_text()
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["train_dropped"], row["train_truncated"]) for row in rows[1:]] == [("2", "5")] * 2
    assert "test_dropped" not in rows[0]
    console = Console(width=80, record=True)
    summary.show(records, console)
    assert line in " ".join(console.export_text().split())


def test_where_nothing_was_shortened_nothing_is_said(make_spec: Make, make_record: MakeRecord) -> None:
    whole = make_record(make_spec(), data={"train": {"examples": 9, "truncated": 0, "dropped": 0}})
    for records in ([whole], [make_record()]):
        assert not any("max_length" in line for line in summary.notes(records))
        assert not any("dropped" in key for row in summary.rows(records) for key in row)


def test_runs_of_other_settings_have_a_table_of_their_own(
    tmp_path: Path, make_spec: Make, make_record: MakeRecord
) -> None:
    asked = [make_record(make_spec(rank=rank, dataset={"name": "mine", "path": "mine.jsonl"})) for rank in (4, 8)]
    alike = make_record(make_spec(rank=16, dataset={"name": "mine", "path": "mine.jsonl"}))
    other = make_record(make_spec(rank=4))
    longer = make_record(make_spec(rank=4, trainer={"max_steps": 400}))
    records = [*asked, other, longer, alike]
    table, markdown = summary.write(tmp_path, records, {record.run_id for record in asked})
    text = markdown.read_text()
    parts = text.split("## ")[1:]
    assert [part.splitlines()[0] for part in parts] == [
        "dataset=mine, trainer.max_steps=4",
        "dataset=jsonl, trainer.max_steps=4",
        "dataset=jsonl, trainer.max_steps=400",
    ]
    assert [part.count("| attn |") for part in parts] == [3, 1, 1]
    assert all("trainer.max_steps" not in part.splitlines()[2] for part in parts)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run_id"] for row in rows} - {""} == {record.run_id for record in records}
    assert [row["setting"] for row in rows if row["run_id"] == alike.run_id] == ["dataset=mine, trainer.max_steps=4"]
    assert {row["dataset"] for row in rows if row["run_id"]} == {"mine", "jsonl"}


def test_settings_that_a_command_asked_for_are_in_one_table(
    tmp_path: Path, make_spec: Make, make_record: MakeRecord
) -> None:
    records = [make_record(make_spec(dataset={"name": name, "path": name})) for name in ("a", "b", "c")]
    _, markdown = summary.write(tmp_path, records, {record.run_id for record in records[:2]})
    assert [line for line in markdown.read_text().splitlines() if line.startswith("#")] == [
        "## dataset=a,b", "## dataset=c",
    ]  # fmt: skip
    table, markdown = summary.write(tmp_path, records, {record.run_id for record in records})
    assert "#" not in markdown.read_text()
    assert "setting" not in table.read_text()


@pytest.mark.parametrize(
    ("width", "hidden"),
    [
        (120, []),
        (80, ["%", "perplexity"]),
        (40, ["trainable", "%", "perplexity", "accuracy before → after", "seconds", "peak memory"]),
    ],
)
def test_the_table_fits_and_names_what_there_was_no_room_for(
    width: int, hidden: list[str], make_spec: Make, make_record: MakeRecord
) -> None:
    console = Console(width=width, record=True)
    summary.show([make_record(make_spec(rank=rank)) for rank in (4, 16)], console)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    told = " ".join(" ".join(lines).split())
    assert ("No room here for" in told) == bool(hidden)
    assert not hidden or f"No room here for {', '.join(hidden)}: see summary.md." in told
    row = next(line for line in lines if line.startswith("attn") and " 16 " in line)
    assert "0.0625" in row
