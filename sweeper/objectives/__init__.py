"""What a run minimises. One file an objective; `OBJECTIVES` is the table of them."""

import inspect
import json
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from sweeper.errors import SpecError, unknown
from sweeper.spec import ObjectiveSpec

if TYPE_CHECKING:
    from sweeper.objectives.objective import Objective

__all__ = ["OBJECTIVES", "check", "of"]


def _nll() -> "Objective":
    from sweeper.objectives.nll import NLL

    return NLL()


# name -> what makes the objective; its keyword arguments are the options, with their defaults
OBJECTIVES: dict[str, Callable[..., "Objective"]] = {"nll": _nll}


def check(spec: ObjectiveSpec) -> None:
    """Raises SpecError for an objective that there is not, or an option that it does not have."""
    if spec.name not in OBJECTIVES:
        raise SpecError(unknown("objective", spec.name, OBJECTIVES))
    known = list(inspect.signature(OBJECTIVES[spec.name]).parameters)
    for name in spec.options:
        if name not in known:
            raise SpecError(
                f"objective.options.{name}: objective={spec.name} has no such option. Options: "
                f"{', '.join(known) or 'none'}."
            )


def of(spec: ObjectiveSpec) -> "Objective":
    """The objective of a run; one object for all runs that minimise the same."""
    return _made(spec.name, json.dumps(dict(spec.options), sort_keys=True), OBJECTIVES[spec.name])


@lru_cache(maxsize=64)
def _made(name: str, options: str, make: Callable[..., "Objective"]) -> "Objective":
    return make(**json.loads(options))
