"""Whether a package that carries data is there."""

import importlib.util

from sweeper.errors import DataError
from sweeper.spec import DatasetSpec


def require(module: str, install: str, spec: DatasetSpec) -> None:
    """Raises DataError saying what to give to pip, without importing the module."""
    if importlib.util.find_spec(module) is None:
        raise DataError(f"dataset={spec.name} needs the Python package {module}: pip install {install}")
