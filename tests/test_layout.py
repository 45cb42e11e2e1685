"""The source imports one way, file by file and folder by folder: what a sweep is made of knows nothing of the sweep."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# from the command down to what all may import: a folder, or a file beside the folders, imports only what stands below
LAYERS = (
    "command", "api", "plugins", "adapters", "rescoring", "cli", "repeat", "config", "study", "reporting", "training",
    "identity", "register", "methods", "fused", "objectives", "lora", "placement", "tasks", "models", "untrusted",
)  # fmt: skip


def place(module: str) -> str:
    """The folder of `sweeper/` that a module is in, or the module itself where it lies beside the folders."""
    return module.split(".")[1] if module.count(".") else module


def modules(root: Path) -> dict[str, Path]:
    paths = [path for name in ("sweeper", "analysis") for path in (root / name).rglob("*.py")]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Every module of ours that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            package = path.parent.name if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            for name in node.names if module in known else ():
                full = f"{module}.{name.name}"
                yield full if full in known else module


def check(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.fixture
def graph(root: Path) -> dict[str, set[str]]:
    """module -> what it imports"""
    known = modules(root)
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def test_no_file_imports_what_imports_it(graph: dict[str, set[str]]) -> None:
    assert graph["sweeper.study.launch"] > {"sweeper.study.scheduler", "sweeper.spec"}
    check(graph)


def test_imports_go_down_the_layers(graph: dict[str, set[str]]) -> None:
    folders: dict[str, set[str]] = {}
    for module, found in graph.items():
        if module.startswith("sweeper."):
            here = place(module)
            folders.setdefault(here, set()).update({place(other) for other in found} - {here})
    assert folders["study"] >= {"methods", "reporting", "training"}
    check(folders)
    upwards = [
        f"{here} imports {there}"
        for here, found in folders.items()
        for there in found
        if there in LAYERS and (here not in LAYERS or LAYERS.index(there) < LAYERS.index(here))
    ]
    assert not upwards


def test_the_analysis_imports_itself_relatively(root: Path) -> None:
    """In a wheel it lies inside `sweeper`, so its own name is another there."""
    for path in (root / "analysis").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "analysis"], path


def test_the_analysis_knows_of_the_rest_only_the_record_and_how_it_is_installed(graph: dict[str, set[str]]) -> None:
    analysis = {other for module, found in graph.items() if module.startswith("analysis") for other in found}
    assert {other for other in analysis if not other.startswith("analysis")} == {
        "sweeper.installation",
        "sweeper.record",
        "sweeper.seal",
    }


def test_a_circle_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match=" imports "):
        check({"a": {"b"}, "b": {"c"}, "c": {"b"}})
