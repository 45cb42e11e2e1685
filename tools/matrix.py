"""Tests under other versions of Python and of the packages than the pinned ones; writes docs/matrix.json.

    .venv/bin/python -m tools.matrix                    every cell of CELLS
    .venv/bin/python -m tools.matrix floors newest      these alone

Each cell has an environment of its own in build/matrix. One whose Python is not here, or whose packages cannot be
installed, is "not run" with the reason. Nothing needs a GPU.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "matrix.json"
EXTRAS = ("train", "search", "analysis", "mixed", "hub", "metrics", "tracking")
RUNNERS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")  # what of the extra `dev` the tests need
SHOWN = ("torch", "transformers", "peft", "hydra-core", "optuna", "numpy", "pandas", "scipy", "datasets")
# each touches a library where its versions differ: a few minutes for a cell
TESTS = (
    "tests/test_record.py", "tests/test_pickles.py", "tests/test_cli.py", "tests/plugins", "tests/lora/test_forms.py",
    "tests/lora/test_optimizer.py", "tests/methods", "tests/placement/test_placement.py", "tests/tasks/test_jsonl.py",
    "tests/tasks/test_hub.py", "tests/tasks/test_encode.py", "tests/tasks/test_metrics.py",
    "tests/training/test_packed_equals_solo.py", "tests/training/test_export.py", "tests/study/test_search.py",
    "tests/reporting/test_trackers.py", "tests/rescoring", "tests/adapters/test_merge.py",
    "tests/analysis/test_tables.py", "tests/analysis/test_figures.py", "tests/analysis/test_mixed.py",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A column of the matrix.

    Attributes:
        name: what it is called on the command line.
        python: minor version of CPython.
        versions: "pins" of constraints.txt, "floors" of pyproject.toml, or "newest" of the package index.
    """

    name: str
    python: str
    versions: str


CELLS = (
    Cell(name="pins", python="3.11", versions="pins"),
    Cell(name="floors", python="3.11", versions="floors"),
    Cell(name="pins-3.12", python="3.12", versions="pins"),
    Cell(name="newest", python="3.13", versions="newest"),
    Cell(name="newest-3.14", python="3.14", versions="newest"),
)


class NotRun(Exception):
    """Why a cell has no result."""


def requirements(project: Mapping[str, Any], extras: Iterable[str]) -> list[str]:
    """What the package and its extras ask for, without what they ask of the package itself."""
    optional = project["optional-dependencies"]
    asked, left = list(project["dependencies"]), list(extras)
    while left:
        for one in optional[left.pop()]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", one)
            left += own[1].split(",") if own else []
            asked += [] if own else [one]
    return asked + [one for one in optional["dev"] if re.split(r"[>=\[]", one)[0] in RUNNERS]


def floors(asked: Iterable[str]) -> list[str]:
    """A pin of each lower bound.

    Raises:
        ValueError: a requirement without one.
    """
    found = []
    for one in asked:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", one)
        if match is None:
            raise ValueError(f"{one} has no lower bound")
        found.append(f"{match[1]}=={match[2]}")
    return sorted(set(found))


def interpreter(minor: str) -> str:
    """A CPython of that minor version: on the path, or among those of pyenv.

    Raises:
        NotRun: there is none.
    """
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{minor}"), *sorted(kept.glob(f"{minor}.*/bin/python"))):
        version = "import platform; print(platform.python_version())"
        if found and _output([str(found), "-c", version]).startswith(f"{minor}."):
            return str(found)
    raise NotRun(f"no Python {minor} is installed here")


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def environment(cell: Cell, folder: Path) -> Path:
    """Makes the environment of a cell; its Python.

    Raises:
        NotRun: no interpreter, or the packages cannot be installed together.
    """
    python, marker = folder / "bin" / "python", folder / "asked.txt"
    with (ROOT / "pyproject.toml").open("rb") as file:
        asked = requirements(tomllib.load(file)["project"], EXTRAS)
    limits = {"pins": (ROOT / "constraints.txt").read_text(), "floors": "\n".join(floors(asked)), "newest": ""}
    text = "\n".join((*asked, "--", limits[cell.versions]))
    if marker.exists() and marker.read_text() == text:
        return python
    base = interpreter(cell.python)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    (folder / "limits.txt").write_text(limits[cell.versions])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile", "--prefer-binary"]
    data = ["--no-deps", "-r", str(ROOT / "constraints-data.txt")]
    for arguments in (["-c", str(folder / "limits.txt"), *asked], data):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise NotRun(f"cannot be installed: {(lines or ['pip failed'])[-1].removeprefix('ERROR: ')}")
    marker.write_text(text)
    return python


def tested(cell: Cell, python: Path, tests: Sequence[str], workers: str) -> dict[str, Any]:
    """Runs the tests of a cell; what came of them."""
    names = json.dumps(SHOWN)
    code = (
        f"import importlib.metadata as m, json, platform\nfound = {{n: m.version(n) for n in {names}}}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    versions = json.loads(_output([str(python), "-c", code]))
    report = ROOT / "build" / "matrix" / f"{cell.name}.log"
    places = os.pathsep.join((str(ROOT), str(ROOT / "sweeper" / "plugins")))
    one_thread = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # an old library under a new one warns of what is none of ours: with the pins a warning is an error, here it is told
    how = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-n", workers]
    how += [] if cell.versions == "pins" else ["-W", "default", "--disable-warnings"]
    command = [str(python), "-m", "pytest", *how, *tests]
    with report.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | one_thread, stdout=file, stderr=subprocess.STDOUT)
    return {"versions": versions, "files": list(tests), **counts(report.read_text(errors="replace"), done.returncode)}


def counts(log: str, code: int) -> dict[str, Any]:
    """Tests that passed, failed and were skipped, of pytest's last line, and the names of those that failed."""
    last = log.strip().splitlines()[-1] if log.strip() else ""
    found = {kind: int(match[1]) if (match := re.search(rf"(\d+) {kind}", last)) else 0 for kind in KINDS}
    failed = [match[1] for line in log.splitlines() if (match := re.match(r"(?:FAILED|ERROR) (\S+)", line))]
    return {**found, "exit_code": code, "failures": sorted(set(failed))}


KINDS = ("passed", "failed", "skipped", "error")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools.matrix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", help=f"of {', '.join(cell.name for cell in CELLS)}; all by default")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files of tests instead of the usual ones")
    parser.add_argument("--workers", default="auto", help="processes that test, as pytest-xdist's -n")
    parser.add_argument("--here", action="store_true", help="test the pins in the Python that runs this")
    options = parser.parse_args(arguments)
    known = {cell.name: cell for cell in CELLS}
    if wrong := [name for name in options.cells if name not in known]:
        parser.error(f"no such cell: {', '.join(wrong)}. Choose from {', '.join(known)}")
    (ROOT / "build" / "matrix").mkdir(parents=True, exist_ok=True)
    worst = 0
    for name in options.cells or known:
        cell = known[name]
        found: dict[str, Any] = {"python": cell.python, "packages": cell.versions}
        try:
            own = options.here and cell.name == "pins"
            python = Path(sys.executable) if own else environment(cell, ROOT / "build" / "matrix" / name)
            found |= tested(cell, python, options.tests, options.workers)
            worst = max(worst, found["exit_code"])
        except NotRun as error:
            found["not_run"] = str(error)
        found["date"] = datetime.date.today().isoformat()
        print(f"{name}: {found.get('not_run') or {kind: found[kind] for kind in KINDS}}", flush=True)
        kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        kept[name] = found
        ordered = {name: kept[name] for name in known if name in kept}
        FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")
    return 1 if worst else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
