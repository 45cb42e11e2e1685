"""Where what can be made or fetched again is kept between commands: models, data, tokens, verdicts, measurements.

What is in it lies under a digest of all that it was made from, is written whole or not at all, and says itself whether
it is damaged: whoever reads it makes it again where it is.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeper.errors import SpecError, SweeperError, unknown

NAME = "lora-atlas"
FORMER = "lora-placement-sweep"
LIMIT = "SWEEPER_CACHE_LIMIT"
DEFAULT_LIMIT = "100GB"
FETCHED = ("data", "packages")  # asked for by `lora-atlas fetch`; a limit takes nothing of these
MODELS = "models"  # what folders of converted weights are called in lists; they lie in the cache folder itself
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_HELD: dict[Path, int] = {}


def cache_folder() -> Path:
    """The environment variable SWEEPER_CACHE, or a folder in the user's cache.

    A user who has only the folder of the project's former name keeps it: nothing is fetched or converted again, and
    saved adapters name a base model in it.
    """
    chosen = os.environ.get("SWEEPER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    present, former = base / NAME, base / FORMER
    return former if former.is_dir() and not present.is_dir() else present


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is removed as one: a file, or a folder of a model, package or compilation. `used` is in seconds of time."""

    path: Path
    kind: str
    bytes: int
    used: float


def limit_bytes() -> int | None:
    """What the cache may hold: SWEEPER_CACHE_LIMIT, such as 500MB; "none" is no limit.

    Raises:
        SpecError: it is no size.
    """
    text = os.environ.get(LIMIT, "").strip() or DEFAULT_LIMIT
    if text.lower() == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text, re.IGNORECASE)
    if found is None:
        raise SpecError(f"{LIMIT}={text}: not a size. Write a number with KB, MB, GB or TB, or none.")
    unit = found[2].upper()
    return int(float(found[1]) * _UNITS[unit if unit in _UNITS else f"{unit}B" if unit != "B" else ""])


def touch(path: Path) -> None:
    """Notes that a file of the cache is read: file systems may not, or once a day."""
    with contextlib.suppress(OSError):
        os.utime(path, (time.time(), path.stat().st_mtime))


def hold(folder: Path) -> None:
    """Keeps a folder of the cache from being removed for a limit until this process ends, and notes its use."""
    if folder in _HELD:
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written is not cleared either
        mark = os.open(_mark(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # open until the process ends
        _HELD[folder] = mark
        fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(_mark(folder))


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.used")


def entries(root: Path) -> Iterator[Entry]:
    """Everything in a cache folder but what is being written, and locks."""
    for path in _visible(root):
        if path.is_dir() and not (path / "config.json").is_file():
            for one in _visible(path):
                if one.suffix != ".lock":
                    yield from _entry(one, path.name)
        elif path.is_dir():
            yield from _entry(path, MODELS)
        else:
            yield from _entry(path, "measurements")


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _entry(path: Path, kind: str) -> Iterator[Entry]:
    size, used = 0, 0.0
    try:
        for file in [path] if path.is_file() else path.rglob("*"):
            found = file.lstat()
            size, used = size + found.st_size, max(used, found.st_mtime, found.st_atime if file.is_file() else 0.0)
        if _mark(path).is_file():
            used = max(used, _mark(path).stat().st_mtime)
    except OSError:  # another process has just removed it
        return
    yield Entry(path=path, kind=kind, bytes=size, used=used)


def trim(root: Path | None = None, limit: int | None = None) -> list[Entry]:
    """Removes what was used longest ago until the rest is within a limit (bytes; None: as `limit_bytes`).

    What was fetched on request stays, and so does what a running process holds or another one is just clearing.
    """
    root = root or cache_folder()
    limit = limit_bytes() if limit is None else limit
    if limit is None or not root.is_dir():
        return []
    found = sorted(entries(root), key=lambda entry: entry.used)
    left, gone = sum(entry.bytes for entry in found), []
    for entry in found:
        if left <= limit:
            break
        if entry.kind not in FETCHED and remove(entry.path):
            left -= entry.bytes
            gone.append(entry)
    return gone


def remove(path: Path) -> bool:
    """Removes a file or folder of the cache; False where a process holds it.

    A folder is renamed first, so that nobody finds half of it.
    """
    try:
        if path.is_file():
            path.unlink()
            return True
        with _mark(path).open("ab") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            going = path.with_name(f".{path.name}.removed.{os.getpid()}")
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)
            _mark(path).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def main(arguments: Sequence[str]) -> int:
    """`lora-atlas cache` lists what there is by kind; `cache clean [KIND ...]` removes it, but for what is in use."""
    parser = argparse.ArgumentParser(prog=f"{NAME} cache", description="What the cache folder holds.")
    parser.add_argument("action", nargs="?", choices=["list", "clean"], default="list")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="what to remove (default: all but what was fetched)")
    options = parser.parse_args(arguments)
    root = cache_folder()
    found = list(entries(root))
    kinds = sorted({entry.kind for entry in found})
    try:
        limit = limit_bytes()
        for kind in options.kinds:
            if kind not in kinds:
                raise SpecError(unknown("kind", kind, kinds, given=kind))
    except SweeperError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.action == "clean":
        return _clean([entry for entry in found if entry.kind in (options.kinds or set(kinds) - set(FETCHED))], root)
    for kind in kinds:
        own = [entry for entry in found if entry.kind == kind]
        print(f"{kind:14}{_size(sum(entry.bytes for entry in own)):>10}{len(own):>8,} {_last_use(own)}")
    most = "no limit" if limit is None else f"limit {_size(limit)}"
    print(f"{root}: {_size(sum(entry.bytes for entry in found))}, {most} ({LIMIT})")
    return 0


def _clean(asked: Sequence[Entry], root: Path) -> int:
    gone = [entry for entry in asked if remove(entry.path)]
    held = f"; {len(asked) - len(gone)} in use and kept" if len(gone) < len(asked) else ""
    print(f"{root}: removed {len(gone):,} of {len(asked):,}, {_size(sum(entry.bytes for entry in gone))}{held}")
    return 0


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _last_use(own: Sequence[Entry]) -> str:
    return f"last used {time.strftime('%Y-%m-%d %H:%M', time.localtime(max(entry.used for entry in own)))}"
