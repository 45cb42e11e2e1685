"""A user's own file: one JSON object a line with `prompt` and `response`, and optionally `id`, `group`, `split`,
`choices` (a list of texts, the response among them) and `check` (Python source that tests a generated program, the text
`PROGRAM`). `dataset.options.group=patient` reads the group from another key.

A group is what examples that are not independent share: a document, a patient, an author. Examples of one group, and
near-duplicate prompts, stay on one side, and the analysis resamples whole groups. Splits that the file does not name
are cut out of its training examples, at most a tenth each. Empty lines are skipped; everything else that is wrong names
its line.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweeper.errors import DataError, unknown
from sweeper.spec import DatasetSpec
from sweeper.tasks import metrics
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.split import split_examples

OPTIONS = {"group": "the key that has a line's group; every line is to have it (group, where a line has it)"}
UNIT = "the file's `group`, else the prompt"
REQUIRED = ("prompt", "response")
OPTIONAL = ("id", "group", "split", "check")


def check(spec: DatasetSpec) -> None:
    """Reads and splits the whole file, which for a file that trains in hours takes seconds."""
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


def _bytes(spec: DatasetSpec) -> bytes:
    if spec.path is None:
        raise DataError(f"dataset={spec.name} needs a file: dataset.path=my.jsonl, each line with prompt and response")
    path = Path(spec.path).expanduser()
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"dataset.path={spec.path}: no such file (looked for {path.absolute()})") from None
    except OSError as error:
        raise DataError(f"dataset.path={spec.path}: cannot be read ({error.strerror})") from None


def _lines(spec: DatasetSpec) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    for number, raw in enumerate(_bytes(spec).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            yield number, raw


def _read(spec: DatasetSpec) -> tuple[list[Example], dict[str, str]]:
    """All examples, and the split of those whose line names one."""
    examples: list[Example] = []
    marked: dict[str, str] = {}
    first_line: dict[str, int] = {}
    group = _group_key(spec)
    for number, raw in _lines(spec):
        where = f"{spec.path}:{number}"
        row = _row(raw, where, group=group)
        example_id = row.get("id", f"line-{number}")
        if example_id in first_line:
            raise DataError(f"{where}: id {example_id!r} was already used on line {first_line[example_id]}")
        first_line[example_id] = number
        examples.append(
            Example(
                example_id, row["prompt"], row["response"], row.get("group", example_id),
                choices=row.get("choices", ()), check=row.get("check", ""),
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


def _row(raw: bytes, where: str, *, group: str | None = None) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1} of the line)") from None
    except (json.JSONDecodeError, RecursionError) as error:
        at = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        raise DataError(f'{where}: not valid JSON ({at}); expected {{"prompt": ..., "response": ...}}') from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with prompt and response, got {type(row).__name__}")
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        have = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where}: missing {' and '.join(missing)}; this line has the keys {have}")
    if group is not None:
        if row.get(group) is None:
            have = ", ".join(map(str, row))
            raise DataError(
                f"{where}: missing {group}, the key of dataset.options.group; this line has the keys {have}"
            )
        row["group"] = row[group]
    present = [key for key in (*REQUIRED, *OPTIONAL) if key in REQUIRED or row.get(key) is not None]
    found: dict[str, Any] = {key: _text(row[key], key, where) for key in present}
    if row.get("choices") is not None:
        found["choices"] = _choices(row["choices"], found["response"], where)
    return found


def _choices(value: Any, response: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where}: choices must be a list of two texts and more, got {json.dumps(value)[:40]}")
    found = tuple(_text(choice, "choices", where) for choice in value)
    if response not in found or len(set(found)) < len(found):
        raise DataError(f"{where}: choices must be different texts and have the response {response[:40]!r} among them")
    return found


def _text(value: Any, key: str, where: str) -> str:
    if key in ("id", "group") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} must be text, got {json.dumps(value)[:40]}")
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
    for number, raw in _lines(spec):
        if _row(raw, "").get("id", f"line-{number}") == example_id:
            return f"{spec.path}:{number}"
    return f"{spec.path}: example {example_id}"
