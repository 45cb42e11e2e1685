"""A user's own file of JSON lines, a JSON list, CSV, TSV or Parquet, with the columns `prompt` and `response`, or with
those of another layout that people have (`sweeper.tasks.conversation`), and optionally `id`, `group`, `split`,
`choices` (a list of texts, the response among them) and `check` (Python source that tests a generated program, the text
`PROGRAM`). `dataset.columns` says which columns these are where they have other names (`sweeper.tasks.columns`). In
place of a response a line may have preferences: `chosen` and `rejected`, or `completion` and `label`
(`sweeper.tasks.preference`).

A group is what examples that are not independent share: a document, a patient, an author. Examples of one group, and
near-duplicate prompts, stay on one side, and the analysis resamples whole groups. Splits that the file does not name
are cut out of its training examples, at most a tenth each. Empty lines are skipped; everything else that is wrong names
its line.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sweeper.errors import DataError, unknown
from sweeper.spec import DatasetSpec
from sweeper.tasks import columns, conversation, metrics, preference, rows
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.split import split_examples

OPTIONS = {
    "group": "the key that has a line's group; every line is to have it (group, where a line has it)",
    "loss": conversation.OPTION,
}
UNIT = "the file's `group`, else the prompt"
REQUIRED = ("prompt", "response")
OPTIONAL = ("id", "group", "split", "check")
COLUMNS = (*REQUIRED, *OPTIONAL, "choices", *dict.fromkeys((*preference.COLUMNS, *conversation.NAMES)))


def check(spec: DatasetSpec) -> None:
    """Reads and splits the whole file, which for a file that trains in hours takes seconds."""
    conversation.every_turn(spec)
    for examples in load(spec).values():
        metrics.check(spec.metrics, examples)


def version(spec: DatasetSpec) -> str:
    return hashlib.sha256(_bytes(spec)).hexdigest()


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    examples, marked = _read(spec)
    try:
        return split_examples(examples, spec, marked=marked)
    except DataError as error:
        raise DataError(f"{spec.path}: {error}") from None


def kind(spec: DatasetSpec) -> str:
    """What the examples are (`sweeper.tasks.preference`), by the first line."""
    for _, where, values in _rows(spec):
        return preference.kind_of(preference.unfolded(values, where)[1])
    return preference.PLAIN


def _bytes(spec: DatasetSpec) -> bytes:
    if spec.path is None:
        raise DataError(
            f"dataset={spec.name} needs a file: dataset.path=my.jsonl (or .csv, .parquet), with prompt and response"
        )
    path = Path(spec.path).expanduser()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device, which may have no end
            raise DataError(f"dataset.path={spec.path}: cannot be read (no plain file)")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"dataset.path={spec.path}: no such file (looked for {path.absolute()})") from None
    except OSError as error:
        raise DataError(f"dataset.path={spec.path}: cannot be read ({error.strerror})") from None


def _rows(spec: DatasetSpec) -> Iterator[rows.Row]:
    """The file's rows, their columns under our names."""
    texts, kind = columns.templates(spec), Path(str(spec.path)).suffix.lower()
    for row in rows.read(_bytes(spec), str(spec.path)):
        values = row.values
        if kind == ".parquet":  # whose columns have kinds, so that numbers were not written as text
            values = {key: columns.as_text(value) for key, value in values.items()}
        try:
            values = columns.mapped(values, texts)
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None
        if kind in rows.DELIMITED:  # an empty cell is all that stands there for nothing
            values = {key: value for key, value in values.items() if key in REQUIRED or value != ""}
        yield row._replace(values=values)


def _read(spec: DatasetSpec) -> tuple[list[Example], dict[str, str]]:
    """All examples, and the split of those whose line names one."""
    examples: list[Example] = []
    marked: dict[str, str] = {}
    first_place: dict[str, str] = {}
    group = _group_key(spec)
    for name, where, values in _rows(spec):
        row, layout = _row(values, where, group=group)
        example_id = row.get("id", name)
        if example_id in first_place:
            raise DataError(f"{where}: id {example_id!r} was already used on {first_place[example_id]}")
        first_place[example_id] = name.replace("-", " ")
        examples.append(
            Example(
                example_id, row["prompt"], row["response"], row.get("group", example_id),
                choices=row.get("choices", ()), check=row.get("check", ""), rejected=row.get("rejected", ""),
                label=row.get("label"), turns=layout.turns, tools=layout.tools,
            )
        )  # fmt: skip
        if "split" in row:
            if row["split"] not in SPLITS:
                raise DataError(f"{where}: {unknown('split', row['split'], SPLITS)}")
            marked[example_id] = row["split"]
    if not examples:
        raise DataError(f"{spec.path}: the file is empty; each line should be an object with prompt and response")
    return examples, marked


def _group_key(spec: DatasetSpec) -> str | None:
    found = spec.options.get("group")
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise DataError(f"dataset.options.group must be the name of a key of the lines, got {found!r}")
    return found


def _row(
    values: Mapping[str, Any], where: str, *, group: str | None = None
) -> tuple[dict[str, Any], conversation.Recognised]:
    """The fields of an example that a row has, each checked, and the layout that it has."""
    values, preferred = preference.unfolded(values, where)
    try:
        layout = conversation.Recognised(dict(values)) if preferred else conversation.recognised(values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    row, required = layout.values, REQUIRED[layout.running :]  # running text has no prompt
    missing = [key for key in required if key not in row]
    if missing:
        have = _listed(row)
        hint = f"; {columns.suggestion(missing, row)}" if row else ""
        raise DataError(f"{where}: missing {' and '.join(missing)}; this line has the keys {have}{hint}")
    if group is not None:
        if row.get(group) is None:
            have = _listed(row)
            raise DataError(
                f"{where}: missing {group}, the key of dataset.options.group; this line has the keys {have}"
            )
        row["group"] = row[group]
    present = [key for key in (*required, *OPTIONAL) if key in required or row.get(key) is not None]
    found: dict[str, Any] = {"prompt": ""} | {key: _text(row[key], key, where) for key in present}
    if "rejected" in preferred:
        preferred["rejected"] = _text(preferred["rejected"], "rejected", where)
    found |= preferred
    if row.get("choices") is not None:
        found["choices"] = _choices(row["choices"], found["response"], where)
    return found, layout


def _listed(row: Mapping[str, Any]) -> str:
    """The keys of a row, for a message: a file that is none may have keys of any length."""
    have = ", ".join(map(str, row)) or "none"
    return have if len(have) <= 300 else f"{have[:300]}..."


def _choices(value: Any, response: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(
            f"{where}: choices must be a list of two texts and more, got {json.dumps(value, default=str)[:40]}"
        )
    found = tuple(_text(choice, "choices", where) for choice in value)
    if response not in found or len(set(found)) < len(found):
        raise DataError(f"{where}: choices must be different texts and have the response {response[:40]!r} among them")
    return found


def _text(value: Any, key: str, where: str) -> str:
    if key in ("id", "group") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} must be text, got {json.dumps(value, default=str)[:40]}")
    if not value.strip():
        raise DataError(f"{where}: {key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = json.dumps(value[error.start])
        raise DataError(
            f"{where}: {key} holds half of a surrogate pair ({half[1:-1]} at character {error.start + 1}), which is no "
            "text: write the whole pair, or leave it out"
        ) from None
    return value


def where(spec: DatasetSpec, example_id: str) -> str:
    """The file and line of an example."""
    for row in _rows(spec):
        if _row(row.values, "")[0].get("id", row.name) == example_id:
            return row.place
    return f"{spec.path}: example {example_id}"
