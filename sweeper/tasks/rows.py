"""Rows of a file, each with its place: JSON lines, a JSON list, CSV, TSV or Parquet, as its name ends."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sweeper import installation
from sweeper.errors import DataError, gist

DELIMITED = (".csv", ".tsv")
LARGEST_CELL = 1 << 30  # characters of a CSV file's cell


class Row(NamedTuple):
    """A row: `name` tells it from the others, `place` is where it is for a message."""

    name: str
    place: str
    values: dict[str, Any]


def read(content: bytes, path: str) -> Iterator[Row]:
    """The rows of a file that has this content and path; what it cannot be read as is said with its place.

    Raises:
        DataError: a row, or the file, is malformed; or pyarrow is needed and not installed.
    """
    kind = Path(path).suffix.lower()
    if kind in DELIMITED:
        return _csv(content, path)
    return {".parquet": _parquet, ".json": _json}.get(kind, _jsonl)(content, path)


def _jsonl(content: bytes, path: str) -> Iterator[Row]:
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            place = f"{path}:{number}"
            yield Row(f"line-{number}", place, _object(_parsed(_text(raw, place, "the line"), place), place))


def _json(content: bytes, path: str) -> Iterator[Row]:
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl(content, path)
        return
    for number, value in enumerate(_parsed(_text(content.removeprefix(b"\xef\xbb\xbf"), path, "the file"), path), 1):
        place = f"{path}: item {number}"
        yield Row(f"item-{number}", place, _object(value, place))


def _text(raw: bytes, place: str, whole: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start + 1} of {whole})") from None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            at = f"column {error.colno}: {error.msg}"
        else:
            at = "too deeply nested" if isinstance(error, RecursionError) else "a number of thousands of digits"
        raise DataError(f'{place}: not valid JSON ({at}); expected {{"prompt": ..., "response": ...}}') from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with prompt and response, got {type(value).__name__}")
    return value


def _csv(content: bytes, path: str) -> Iterator[Row]:
    """Commas, or tabs or semicolons where the header has those and no comma; the first row names the columns."""
    text = _text(content.removeprefix(b"\xef\xbb\xbf"), path, "the file")
    header = text.split("\n", 1)[0]
    separator = "," if "," in header else next((one for one in "\t;" if one in header), ",")
    limit = csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}:1: two columns are called {twice!r}")
        last = reader.line_num
        for cells in reader:
            first, last = last + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise DataError(f"{path}:{first}: {len(cells)} cells, and the header names {len(names)} columns")
            yield Row(f"line-{first}", f"{path}:{first}", dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(content: bytes, path: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(f"dataset.path={path} needs the package pyarrow: {installation.install('hub')}") from None
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"dataset.path={path}: no Parquet file that can be read ({gist(error)})") from None
    for number, values in enumerate(rows, start=1):
        yield Row(f"row-{number}", f"{path}: row {number}", values)
