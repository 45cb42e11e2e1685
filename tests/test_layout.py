"""Folders of the source import one way: what a sweep is made of knows nothing of the sweep."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SLOTS = ("sweeper.engine.bank", "sweeper.engine.transfer")  # what methods are made of, below them and the engine


def place(module: str) -> str:
    """The folder of `sweeper/` that a module is in, or the module itself where it lies beside the folders."""
    return "engine.bank" if module.startswith(SLOTS) else module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Every module of ours that a file imports, at the top or inside a function."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [f"{node.module}.{name.name}" for node in nodes for name in node.names if str(node.module) == "sweeper"] + [
        str(node.module) for node in nodes if str(node.module).startswith("sweeper.")
    ]


def test_no_folder_imports_what_imports_it(root: Path) -> None:
    graph: dict[str, set[str]] = {}
    for path in (root / "sweeper").rglob("*.py"):
        here = place(".".join(path.relative_to(root).with_suffix("").parts))
        graph.setdefault(here, set()).update({place(module) for module in imports(path)} - {here})
    assert graph["sweep"] >= {"compose", "engine", "ranks", "search"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
