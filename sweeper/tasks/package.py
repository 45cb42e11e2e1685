"""Packages that contain data: whether they are here, where their files are, and how to import a single module."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from sweeper import installation, packages
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec


def require(module: str, package: str, spec: DatasetSpec) -> None:
    """Raises DataError with the command that fetches a package if it is missing, without importing it."""
    if not is_installed(module):
        raise DataError(f"dataset={spec.name} needs the data in the package {package}: {installation.fetch(package)}")


def require_extra(module: str, extra: str, spec: DatasetSpec) -> None:
    """Raises DataError with the command that installs one of our extras if a package of it is missing."""
    if not is_installed(module):
        raise DataError(f"dataset={spec.name} needs the Python package {module}: {installation.install(extra)}")


def installed_version(package: str, spec: DatasetSpec) -> str:
    """The `version` of a family whose data is in that package."""
    return packages.distribution(package).version


def is_installed(module: str) -> bool:
    """Whether a package is installed or fetched, without importing it."""
    return packages.find(module) is not None


def folder(module: str) -> Path:
    """The folder of a package, found without importing it."""
    found = packages.find(module)
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


def imported(name: str) -> ModuleType:
    """A package as `import` gives it, installed or fetched."""
    if name not in sys.modules:
        found = packages.find(name)
        assert found is not None
        assert found.loader is not None
        sys.modules[name] = made = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(made)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


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
