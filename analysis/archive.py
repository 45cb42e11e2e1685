"""A study as a small archive, to keep beside a notebook: python -m analysis.archive outputs/<study> study.tar.xz"""

import argparse
import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sweeper.record import (
    COMMANDS,
    LARGEST_LINES,
    LIBRARY,
    METRICS,
    PREDICTIONS,
    RECORD,
    SEARCHES,
    read_json,
    read_text,
)
from sweeper.seal import seal, unsealed

CURVE_POINTS = 60
MOST_BYTES, MOST_FILES = 4 << 30, 200_000  # of an archive that is unpacked
UNPACKERS: dict[bytes, Any] = {b"\xfd7zXZ": lzma.open, b"]\0\0": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
LARGEST_NAME = 1 << 20  # bytes read at once: tarfile reads a name whole, however long its header says that it is


def create(study: Path, archive: Path) -> Path:
    """Writes a study's records, commands, libraries, per-example test scores to 6 digits and thinned training curves.

    The same study gives the same bytes.

    Raises:
        FileNotFoundError: the study's folder has no record; an existing archive stays as it was.
        ValueError: a file of the study cannot be read.
    """
    records = sorted(study.glob(f"*/{RECORD}"))
    if not records:
        raise FileNotFoundError(f"{study}: no record in it. Give the folder of a study, such as outputs/default.")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for record in records:
            plain = read_json(unsealed(read_text(record)))
            texts = {RECORD: seal(json.dumps(plain, separators=(",", ":")))}
            predictions, metrics = record.parent / PREDICTIONS, record.parent / METRICS
            if predictions.is_file():
                rows = [row for row in _rows(predictions) if row.get("split") == "test"]
                texts[PREDICTIONS] = "".join(json.dumps(_short(row)) + "\n" for row in rows)
            if metrics.is_file():
                texts[METRICS] = "".join(json.dumps(_short(row)) + "\n" for row in _thin(_rows(metrics)))
            for name, text in texts.items():
                _add(tar, f"{study.name}/{record.parent.name}/{name}", text)
        for path in (study / name for name in (COMMANDS, SEARCHES)):
            if path.is_file():
                _add(tar, f"{study.name}/{path.name}", read_text(path))
        for path in sorted((study / LIBRARY).glob("*.json*")):
            whole = read_text(path, largest=LARGEST_LINES)
            short = "".join(json.dumps(_short(row)) + "\n" for row in _rows(path)) if path.suffix == ".jsonl" else whole
            _add(tar, f"{study.name}/{LIBRARY}/{path.name}", short)
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(lzma.compress(buffer.getvalue(), preset=9))
    return archive


def _add(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))


def extract(archive: Path | str, folder: Path | str | None = None) -> Path:
    """Extracts an archive into `folder` (a new temporary one by default). Returns the study's folder.

    Raises:
        ValueError: it is no archive of a study: damaged, too large, of several folders, or not of plain files alone.
    """
    try:
        with open(archive, "rb") as file, tarfile.open(fileobj=_unpacked(file), mode="r:") as tar:
            study = _check(tar)
            target = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="study-"))
            tar.extractall(target, filter="data")
            return target / study
    except (tarfile.TarError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"{archive}: no archive of a study: {error}") from None


class _Pieces(io.RawIOBase):
    """A stream that gives no more than a name's worth of bytes at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_NAME:
            raise tarfile.ReadError(f"a name or header of more than {LARGEST_NAME:,} bytes")
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()


def _unpacked(file: IO[bytes]) -> Any:
    """The tar in a file, whichever way it is compressed."""
    start = file.read(6)
    file.seek(0)
    opened = next((unpack(file) for magic, unpack in UNPACKERS.items() if start.startswith(magic)), file)
    return _Pieces(opened)


def _check(tar: tarfile.TarFile) -> str:
    """The folder that all members are in. Looks at each member's size before it is unpacked to find the next."""
    size, folders = 0, set()
    for count, member in enumerate(iter(tar.next, None), start=1):
        parts = PurePosixPath(member.name).parts
        if not member.isfile() or member.size < 0 or len(parts) < 2 or not set(parts).isdisjoint({"..", "/"}):
            raise ValueError(f"{member.name[:80]!r} is no plain file in a study's folder")
        size += member.size
        if size > MOST_BYTES or count > MOST_FILES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes or {MOST_FILES:,} files")
        folders.add(parts[0])
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} folders")
    return str(folders.pop())


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [read_json(line) for line in read_text(path, largest=LARGEST_LINES).splitlines()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a line is no JSON object")
    return rows


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    losses = [row for row in rows if "loss" in row]
    step = -(-len(losses) // CURVE_POINTS) or 1
    kept = losses[::step]
    return [row for row in rows if "loss" not in row or row in kept]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the archive and prints its size."""
    parser = argparse.ArgumentParser(prog="python -m analysis.archive", description="A study as a small archive.")
    parser.add_argument("study", type=Path)
    parser.add_argument("archive", type=Path)
    options = parser.parse_args(arguments)
    try:
        archive = create(options.study, options.archive)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{archive}: {archive.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
