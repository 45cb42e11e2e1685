"""A study to hand on, in one file that says whether it is whole: records, configurations, versions, analysis."""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import lzma
import math
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import installation
from sweeper.record import RECORD, read_json
from sweeper.seal import BrokenSeal, sealed, unsealed

from . import archive
from .__main__ import main as analyse
from .__main__ import printable

MANIFEST, STUDY, CONFIGS, VERSIONS, ANALYSIS = (
    "manifest.json",
    "study.tar.xz",
    "configs.jsonl",
    "versions.json",
    "analysis",
)
SCHEMA = 1
TOLERANCE = 1e-6  # relative, of a number in a table that another machine or version makes again


class BundleError(ValueError):
    """A bundle that is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A bundle whose files are what its manifest says.

    Attributes:
        different: tables that came out otherwise when its study was analysed again, and how.
        exact: tables that came out with the same bytes. digest: SHA-256 of the bundle itself.
    """

    runs: int
    files: int
    digest: str
    exact: int
    different: dict[str, str]


def create(study: Path, target: Path) -> Path:
    """Writes a bundle: the study's archive (`analysis.archive`), what it says analysed, and digests of all.

    The same study, analysed by the same versions, gives the same bytes. What is analysed is what the archive holds, so
    that whoever has the bundle can do it again.

    Raises:
        OSError: the study has no record, or a file cannot be read or written. ValueError: a record is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="bundle-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        packed = archive.create(study, folder / STUDY)
        inside = archive.extract(packed, Path(scratch) / "study")
        records = [read_json(unsealed(path.read_text())) for path in sorted(inside.glob(f"*/{RECORD}"))]
        configs = (json.dumps({"run_id": one.get("run_id"), "spec": one.get("spec")}) + "\n" for one in records)
        (folder / CONFIGS).write_text("".join(configs))
        (folder / VERSIONS).write_text(json.dumps(_versions(records), indent=1) + "\n")
        _analyse(inside, folder / ANALYSIS)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        facts = {name: {"sha256": _digest(data), "bytes": len(data)} for name, data in names.items()}
        about = {"schema": SCHEMA, "study": study.name, "runs": len(records), "files": facts}
        names[MANIFEST] = sealed(about, indent=1).encode()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in sorted(names.items()):
                entry = tarfile.TarInfo(f"{study.name}.bundle/{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(lzma.compress(buffer.getvalue(), preset=6))
    return target


def verify(path: Path, out: Path | None = None) -> Verified:
    """Checks every file of a bundle, analyses its study again and compares the tables.

    Args:
        out: keeps what was unpacked (`bundle/`, `study/`) and analysed (`analysis/`) here.

    Raises:
        BundleError: a file is missing, added or changed. ValueError: it is no archive, or one that is too large.
        OSError: it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        scratch = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bundle-")))
        digest = _digest(path.read_bytes())
        folder = archive.extract(path, scratch / "bundle")
        about = _manifest(folder)
        _check_files(folder, about["files"])
        study = archive.extract(folder / STUDY, scratch / "study")
        records = sorted(study.glob(f"*/{RECORD}"))
        for one in records:
            try:
                unsealed(one.read_text())
            except BrokenSeal as error:
                raise BundleError(f"{one.parent.name}/{RECORD}: {error}") from None
        if len(records) != about["runs"]:
            raise BundleError(f"{len(records)} records, and {about['runs']} in its {MANIFEST}")
        _analyse(study, scratch / ANALYSIS)
        exact, different = _compare(folder / ANALYSIS, scratch / ANALYSIS)
        return Verified(
            runs=len(records), files=len(about["files"]), digest=digest, exact=exact, different=different
        )  # fmt: skip


def _analyse(study: Path, out: Path) -> None:
    """Tables, claims and report of a study; figures follow from them, and their bytes from the fonts of a machine."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = analyse([str(study), "--out", str(out), "--no-figures"])
    if code:
        raise ValueError(errors.getvalue().strip().removeprefix("error: ") or "the study cannot be analysed")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(unsealed((folder / MANIFEST).read_text()))
        whole = found["schema"] == SCHEMA and isinstance(found["files"], dict) and isinstance(found["runs"], int)
    except BrokenSeal as error:
        raise BundleError(f"{MANIFEST}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise BundleError(f"no {MANIFEST} of schema {SCHEMA}: not a bundle of this project")
    return dict(found)


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    """Raises BundleError for the first file that is missing, added or not what was written."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(there ^ files.keys()):
        raise BundleError(f"{name} is {'missing' if name in files else 'not in its manifest'}")
    for name, facts in files.items():
        if not isinstance(facts, dict) or _digest((folder / name).read_bytes()) != facts.get("sha256"):
            raise BundleError(f"{name} is not what was written: its SHA-256 is another")
    for name in (STUDY, CONFIGS, VERSIONS):
        if name not in files:
            raise BundleError(f"{name} is missing")


def _compare(former: Path, again: Path) -> tuple[int, dict[str, str]]:
    """Tables with equal bytes, and those in which something differs by more than rounding."""
    exact, different = 0, {}
    for path in sorted(former.rglob("*.csv")):
        name = path.relative_to(former).as_posix()
        if not (again / name).is_file():
            different[name] = "not made again"
        elif path.read_bytes() == (again / name).read_bytes():
            exact += 1
        elif (where := next(_unlike(path, again / name), None)) is not None:
            different[name] = where
    return exact, different


def _unlike(one: Path, two: Path) -> Iterator[str]:
    rows = [list(csv.reader(io.StringIO(path.read_text(), newline=""))) for path in (one, two)]
    if len(rows[0]) != len(rows[1]):
        yield f"{len(rows[0])} rows, now {len(rows[1])}"
        return
    for number, (left, right) in enumerate(zip(*rows, strict=True), start=1):
        if len(left) != len(right):
            yield f"row {number}: {len(left)} cells, now {len(right)}"
        for a, b in zip(left, right, strict=False):
            if a != b and not _close(a, b):
                yield f"row {number}: {a}, now {b}"


def _close(one: str, two: str) -> bool:
    try:
        return math.isclose(float(one), float(two), rel_tol=TOLERANCE, abs_tol=1e-12)
    except ValueError:
        return False


def _versions(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What the runs were made with -> how many of them: commit, device, and version of each package."""
    found: dict[str, Counter[str]] = {}
    for one in records:
        environment = one.get("environment") or {}
        facts = {name: environment.get(name) for name in ("git_commit", "device", "precision", "python")}
        for name, value in (facts | dict(environment.get("versions") or {})).items():
            found.setdefault(name, Counter())[str(value)] += 1
    return {name: dict(sorted(counts.items())) for name, counts in sorted(found.items())}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """`bundle STUDY [FILE]` and `bundle verify FILE [--out FOLDER]`; 0, 1 where tables differ, 2 on bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _verify(words[1:]) if words[:1] == ["verify"] else _create(words)
    except (OSError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2


def _create(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=installation.program("bundle"), description="A study as one file that can be verified.",
        epilog="`verify FILE` checks a bundle, analyses its study again and compares the tables.",
    )  # fmt: skip
    parser.add_argument("study", type=Path, help="its folder, such as outputs/default")
    parser.add_argument("file", type=Path, nargs="?", help="default: STUDY.bundle.tar.xz in the current folder")
    options = parser.parse_args(words)
    name = options.study.resolve().name
    made = create(options.study.resolve(), options.file or Path(f"{name}.bundle.tar.xz"))
    print(f"{made}: {made.stat().st_size / 1024:.0f} KiB, SHA-256 {_digest(made.read_bytes())}")
    return 0


def _verify(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{installation.program('bundle')} verify")
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="keep what is unpacked and analysed in this new folder")
    options = parser.parse_args(words)
    if options.out is not None and options.out.exists():
        raise ValueError(f"--out {options.out}: it exists; give a new folder")
    try:
        found = verify(options.file, options.out)
    except BundleError as error:
        raise ValueError(f"{options.file}: {error}") from None
    print(f"{options.file}: SHA-256 {found.digest}")
    print(f"{found.runs} runs, {found.files} files: every digest matches")
    for name, where in found.different.items():
        print(printable(f"{name} differs when analysed again: {where}"))
    if not found.different:
        print(f"analysed again: every table is as it was, {found.exact} of them byte for byte")
    return 1 if found.different else 0


if __name__ == "__main__":
    raise SystemExit(main())
