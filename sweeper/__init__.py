"""LoRA Atlas in Python: docs/api.md shows it, docs/extending.md your own parts (`sweeper.register`).

Nothing heavy is imported until it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sweeper import register
    from sweeper.api import Run, Study, evaluate, load_study, sweep, train
    from sweeper.errors import SweeperError
    from sweeper.spec import RunSpec

__all__ = ["Run", "RunSpec", "Study", "SweeperError", "evaluate", "load_study", "register", "sweep", "train"]


def __getattr__(name: str) -> Any:
    if name not in (*__all__, "analysis"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "analysis":  # from sweeper import analysis: beside this package in a checkout, inside it in a wheel
        return importlib.import_module("sweeper.installation").analysis()
    if name == "register":
        return importlib.import_module("sweeper.register")
    home = {"RunSpec": "spec", "SweeperError": "errors"}.get(name, "api")
    return getattr(importlib.import_module(f"sweeper.{home}"), name)
