"""The table at the end of a command, on screen and as summary.csv and summary.md in the study folder."""

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sweeper import naming
from sweeper.record import Record, Score, csv_cell, markdown_text, perplexity, shortened, write_atomically
from sweeper.reporting.table import Column, print_fitted
from sweeper.reporting.text import duration, number, point, size
from sweeper.spec import MethodSpec

BASE = "none (base model)"
MAJORITY = "none (commonest answer)"
SPLIT = "validation"
SHORTENED = ("dropped", "truncated")
Flat = Mapping[str, Any]  # a run's spec by dotted fields, made once for all that a table asks of it
LENGTH_OF_TRAINING = ("trainer.max_steps", "trainer.batch_size", "trainer.accumulation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A column: the key of the raw value in a row's dict, its text for people, and how well it can be spared."""

    key: str
    title: str
    show: Callable[[Any], str] = str
    spare: int = 0
    wraps: bool = False


def rows(records: Sequence[Record], fields: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A dict a run, and first one for each base model as it was before training. Absent values are None.

    `fields` tell the runs apart, besides placement and rank; those that differ, where none are given.
    """
    return _rows(records, [naming.flat(record.spec) for record in records], fields)


def _rows(records: Sequence[Record], flats: Sequence[Flat], fields: Sequence[str] | None) -> list[dict[str, Any]]:
    fields = naming.varying_rows(flats) if fields is None else fields
    metric = _metric(records)
    found = [_run_row(record, flat, fields, metric) for record, flat in zip(records, flats, strict=True)]
    return [*_base_rows(records, flats, fields, metric), *found]


def show(records: Sequence[Record], console: Console) -> None:
    """Prints the table."""
    flats = [naming.flat(record.spec) for record in records]
    fields = naming.varying_rows(flats)
    content = _rows(records, flats, fields)
    hidden = print_fitted(
        [
            Column(title=one.title, cells=[_text(one, row) for row in content], spare=one.spare, wraps=one.wraps)
            for one in _columns(records, fields)
        ],
        console,
    )
    if hidden:
        console.print(f"No room here for {', '.join(hidden)}: see summary.md.", style="dim", markup=False)
    for line in notes(records):
        console.print(line, style="dim", markup=False)


def show_search(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints the table of a search: a row an arm, with its trials, the best one and what is to be said of it."""
    columns = [
        Column(title="arm", cells=[row["arm"] for row in rows], wraps=True),
        Column(title="trials", cells=[str(row["trials"]) for row in rows]),
        Column(title="pruned", cells=[str(row["pruned"]) for row in rows], spare=2),
        Column(title="failed", cells=[str(row["failed"]) for row in rows], spare=1),
        Column(title="best", cells=[number(row["best"], 4) for row in rows]),
        Column(title="with", cells=[point(row["params"]) or "-" for row in rows], wraps=True),
        Column(title="", cells=["; ".join(_of_search(row)) for row in rows], wraps=True),
    ]
    print_fitted(columns, console)


def _of_search(row: Mapping[str, Any]) -> Iterator[str]:
    for key, end in row["edges"].items():
        yield f"{key} at the {end} end of its range"
    if row.get("widened"):
        yield "widened once" if row["widened"] == 1 else f"widened {row['widened']} times"
    if row.get("finished"):
        yield f"{row['finished']} of the pruned finished"
    if row.get("beside"):
        yield f"{row['beside']} beside the best still pruned"


def write(study: Path, records: Sequence[Record], asked: Collection[str] = ()) -> tuple[Path, Path]:
    """Writes summary.csv (raw values) and summary.md (the printed table) to the study folder.

    Runs of one setting, trained on the same data for as long, are in one table. Where a study has more of them,
    summary.md has a heading for each and summary.csv a column `setting`.

    Args:
        asked: ids of the runs that a command asked for. Their settings are together, and first.
    """
    flats = {id(record): naming.flat(record.spec) for record in records}
    parts = _by_setting(records, flats, asked)
    of_part = {name: [flats[id(record)] for record in own] for name, own in parts.items()}
    fields = naming.varying_rows(list(flats.values()))
    content = [
        {**row, **({"setting": name} if len(parts) > 1 else {})}
        for name, own in parts.items()
        for row in _rows(own, of_part[name], fields)
    ]
    buffer = io.StringIO()
    keys = dict.fromkeys(key for row in content for key in row if key != "metric_change")
    writer = csv.DictWriter(buffer, list(keys), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in content)
    tables = [
        "\n".join([*([f"## {markdown_text(name)}", ""] if len(parts) > 1 else []), *_markdown(own, of_part[name])])
        for name, own in parts.items()
    ]
    return write_atomically(study / "summary.csv", buffer.getvalue()), write_atomically(
        study / "summary.md", "\n".join(tables)
    )


def by_setting(records: Sequence[Record], asked: Collection[str] = ()) -> dict[str, list[Record]]:
    """The runs of each setting under what tells it from the others; first, together, the settings of those `asked`."""
    return _by_setting(records, {id(record): naming.flat(record.spec) for record in records}, asked)


def _by_setting(
    records: Sequence[Record], flats: Mapping[int, Flat], asked: Collection[str] = ()
) -> dict[str, list[Record]]:  # fmt: skip
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(repr(_setting(flats[id(record)])), []).append(record)
    first = [key for key, own in found.items() if any(record.run_id in asked for record in own)] or list(found)[:1]
    fields = [key for key in naming.varying([own[0].spec for own in found.values()]) if _is_of_setting(key)]

    def name(keys: Sequence[str]) -> str:
        every = [flats[id(found[key][0])] for key in keys]
        values = {field: dict.fromkeys(_plain(one.get(field)) for one in every) for field in fields}
        return ", ".join(f"{field}={','.join(own)}" for field, own in values.items()) or "all"

    groups = [first, *([key] for key in found if key not in first)]
    return {name(keys): [record for key in keys for record in found[key]] for keys in groups if keys}


def _setting(flat: Flat) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if _is_of_setting(key)}


def _is_of_setting(key: str) -> bool:
    """Whether arms that are compared have a field in common: model, data, objective, and how long they train."""
    return key.split(".")[0] in ("model", "dataset", "objective") or key in LENGTH_OF_TRAINING


def _markdown(records: Sequence[Record], flats: Sequence[Flat]) -> Iterator[str]:
    """Lines of a table and its notes."""
    fields = naming.varying_rows(flats)
    columns = _columns(records, fields)
    yield "| " + " | ".join(column.title for column in columns) + " |"
    yield "| " + " | ".join("---" for _ in columns) + " |"
    for row in _rows(records, flats, fields):
        cells = (markdown_text(_text(column, row)).replace("|", "\\|") for column in columns)
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield from (f"{line}\n" for line in notes(records))


def notes(records: Sequence[Record]) -> list[str]:
    """What a reader must know to read the seconds and the memory right."""
    lines = [f"NLL in nats per response token on {SPLIT}; perplexity = exp(NLL)."]
    if any(record.efficiency.pack_runs > 1 for record in records):
        lines.append("Seconds: a run's share of its pack. Memory: alone where calibrated, else the pack's.")
    return [*lines, *_shortened(records)]


def _shortened(records: Sequence[Record]) -> list[str]:
    """A line for each dataset and model of which examples were left out or cut."""
    found: dict[str, str] = {}
    for one in records:
        line = shortened(one.data)
        if line is not None:
            spec = one.spec
            found[f"dataset={spec['dataset']['name']} on model={spec['model']['name']}: {line}."] = ""
    return list(found)


def _columns(records: Sequence[Record], fields: Sequence[str]) -> list[Shown]:
    metric = _metric(records)
    columns = [
        Shown(key="placement", title="placement", wraps=True),
        Shown(key="rank", title="rank"),
        *(Shown(key=key, title=key, show=_plain, wraps=True) for key in fields),
        Shown(key="trainable_parameters", title="trainable", show="{:,}".format, spare=2),
        Shown(key="trainable_percent", title="%", show="{:.3f}".format, spare=6),
        Shown(key="nll", title=f"{SPLIT} NLL", show=lambda value: number(value, 4)),
        Shown(key="perplexity", title="perplexity", show=number, spare=5),
    ]
    if metric is not None:
        columns.append(Shown(key="metric_change", title=f"{_TITLES.get(metric, metric)} before → after", spare=1))
    columns += [
        Shown(key="seconds", title="seconds", show=duration, spare=3),
        Shown(key="peak_memory_bytes", title="peak memory", show=size, spare=4),
    ]
    if any(record.status != "completed" for record in records):
        columns.append(Shown(key="status", title="status"))
    return columns


_TITLES = {"exact_match": "accuracy", "preference_accuracy": "preference accuracy"}


def _run_row(record: Record, flat: Flat, fields: Sequence[str], metric: str | None) -> dict[str, Any]:
    from sweeper import methods  # imports torch

    method = MethodSpec(name=flat["method"], options=record.spec["method"].get("options", {}))
    lacking = methods.lacks(method) if method.name in methods.METHODS else []  # a plugin's, not loaded for this command
    phases = record.scores.get(SPLIT, {})
    cost = record.efficiency
    share = record.trainable_parameters / record.total_parameters if record.total_parameters else None
    row = {
        "run_id": record.run_id,
        "status": record.status,
        "placement": "all" if "placement" in lacking else flat["placement"],
        "rank": None if "rank" in lacking else flat["rank"] if record.sharing else _ranks(record, flat["rank"]),
        **{key: flat.get(key) for key in fields},
        "trainable_parameters": record.trainable_parameters or None,
        "trainable_percent": None if share is None else 100 * share,
        **_scores(phases.get("after")),
    }
    if metric is not None:
        before, after = (_value(phases.get(phase), metric) for phase in ("before", "after"))
        row |= {f"{metric}_before": before, f"{metric}_after": after, "metric_change": _change(before, after)}
    row |= {
        "seconds": cost.train_seconds_amortised,
        "peak_memory_bytes": cost.peak_memory_solo_bytes or cost.pack_peak_memory_bytes,
        **{f"{split}_{key}": facts[key] for split, facts in record.data.items() for key in SHORTENED if facts.get(key)},
    }
    return row


def _ranks(record: Record, nominal: Any) -> Any:
    """The rank of the modules, or from the lowest to the highest where an allocation spread them."""
    found = {module.rank for module in record.modules}
    if len(found) < 2:
        return next(iter(found), nominal)
    return f"{min(found)}–{max(found)}"


def _base_rows(
    records: Sequence[Record], flats: Sequence[Flat], fields: Sequence[str], metric: str | None
) -> list[dict[str, Any]]:
    """Two rows for each model and dataset: the scores before training, and of the commonest answer where it has any."""
    found: dict[str, dict[str, Any]] = {}
    for record, flat in zip(records, flats, strict=True):
        score = record.scores.get(SPLIT, {}).get("before")
        if score is None:
            continue
        key = repr((record.spec["model"], record.spec["dataset"]))
        row: dict[str, Any] = {"run_id": None, "status": None, "placement": BASE, "rank": None}
        row |= {name: flat.get(name) if name.split(".")[0] in ("model", "dataset") else None for name in fields}
        row |= {"trainable_parameters": 0, "trainable_percent": 0.0, **_scores(score)}
        if metric is not None:
            value = _value(score, metric)
            row |= {f"{metric}_before": value, f"{metric}_after": None, "metric_change": number(value)}
        found.setdefault(key, row | {"seconds": None, "peak_memory_bytes": None})
        commonest = record.data.get(SPLIT, {}).get("majority", {}).get(metric)
        if commonest is not None:
            blank = dict.fromkeys(row)
            blank |= {name: row[name] for name in fields if name.split(".")[0] == "dataset"}
            blank |= {f"{metric}_before": commonest, "metric_change": number(commonest), "placement": MAJORITY}
            found.setdefault(f"{key} majority", blank | {"seconds": None, "peak_memory_bytes": None})
    return list(found.values())


def _metric(records: Sequence[Record]) -> str | None:
    """The metric to show: of preferences their accuracy, else the first that any run has on the validation split."""
    every = [score for record in records for score in record.scores.get(SPLIT, {}).values()]
    names = dict.fromkeys(name for score in every for name in score.metrics)
    return "preference_accuracy" if "preference_accuracy" in names else next(iter(names), None)


def _scores(score: Score | None) -> dict[str, float | None]:
    return {"nll": None if score is None else score.nll, "perplexity": None if score is None else perplexity(score.nll)}


def _value(score: Score | None, metric: str) -> float | None:
    return None if score is None else score.metrics.get(metric)


def _change(before: float | None, after: float | None) -> str | None:
    return None if before is None and after is None else f"{number(before)} → {number(after)}"


def _text(column: Shown, row: dict[str, Any]) -> str:
    value = row.get(column.key)
    return "-" if value is None else column.show(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
