"""Packages that contain data: whether they are installed, where their files are, and how to import a single module."""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from sweeper.errors import DataError
from sweeper.spec import DatasetSpec


def require(module: str, install: str, spec: DatasetSpec) -> None:
    """Raises DataError with the pip command if a package is missing, without importing it."""
    if not is_installed(module):
        raise DataError(f"dataset={spec.name} needs the Python package {module}: pip install {install}")


def installed_version(package: str, spec: DatasetSpec) -> str:
    """The `version` of a family whose data is in that package."""
    return importlib.metadata.version(package)


def is_installed(module: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def folder(module: str) -> Path:
    """The folder of an installed package, found without importing it."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


def module_alone(name: str) -> ModuleType:
    """The module `package.folder.name` (and what it imports), without running the `__init__` of its parents.

    A package that imports all its modules at start-up would need dependencies that this module does not. During the
    import, unexecuted parents are in `sys.modules`; they are removed afterwards.
    """
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]
    root = parents[0]
    before = {key: module for key, module in sys.modules.items() if key.split(".")[0] == root}
    path = folder(root).parent
    try:
        for parent in parents:
            if parent not in sys.modules:
                stand_in = ModuleType(parent)
                stand_in.__path__ = [str(path.joinpath(*parent.split(".")))]
                sys.modules[parent] = stand_in
        return importlib.import_module(name)
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == root and key not in before]:
            del sys.modules[key]
