"""What a run minimises. One file an objective; `OBJECTIVES` is the table of them."""

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sweeper import tasks
from sweeper.errors import SpecError, gist, unknown
from sweeper.spec import DatasetSpec, ObjectiveSpec
from sweeper.tasks import preference

if TYPE_CHECKING:
    from sweeper.objectives.objective import Objective
    from sweeper.tasks.example import Encoded, Tokens

__all__ = ["OBJECTIVES", "check", "check_data", "longest", "of", "score_of"]


@dataclass(frozen=True)
class _BuiltIn:
    """A class of a module of this package, which is imported, and torch with it, when it is first asked for."""

    module: str
    name: str

    @property
    def kind(self) -> Any:
        return getattr(importlib.import_module(f"sweeper.objectives.{self.module}"), self.name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.kind)

    def __call__(self, **options: Any) -> "Objective":
        made: Objective = self.kind(**options)
        return made


NEEDS = {
    preference.PLAIN: "a response",
    preference.PAIRS: (
        "pairs (prompt, chosen and rejected; of a task with choices +dataset.options.preferences=wrong_choice)"
    ),
    preference.LABELS: "labelled responses (prompt, completion and label)",
}
"""What examples of each kind are."""
HAS = {
    preference.PLAIN: "one response a prompt",
    preference.PAIRS: "pairs of responses",
    preference.LABELS: "responses that are labelled good or bad",
}

# name -> what makes the objective; its keyword arguments are the options, with their defaults
OBJECTIVES: dict[str, Callable[..., "Objective"]] = {
    module: _BuiltIn(module, name)
    for module, name in (
        ("cpo", "CPO"), ("dpo", "DPO"), ("ipo", "IPO"), ("kto", "KTO"), ("nll", "NLL"), ("orpo", "ORPO"),
        ("simpo", "SimPO"),
    )
}  # fmt: skip


def check(spec: ObjectiveSpec) -> None:
    """Raises SpecError for an objective that there is not, or an option that it does not have or that is no use."""
    if spec.name not in OBJECTIVES:
        raise SpecError(unknown("objective", spec.name, OBJECTIVES))
    known = list(inspect.signature(OBJECTIVES[spec.name]).parameters)
    for name in spec.options:
        if name not in known:
            raise SpecError(
                f"objective.options.{name}: objective={spec.name} has no such option. Options: "
                f"{', '.join(known) or 'none'}."
            )
    try:
        of(spec)
    except TypeError as error:
        raise SpecError(f"objective.options of objective={spec.name}: {gist(error)}") from None


def check_data(spec: ObjectiveSpec, dataset: DatasetSpec) -> None:
    """Raises SpecError where a dataset's examples are none that the objective can be of."""
    kinds = of(spec).kinds
    for part in dataset.parts or (dataset,):
        found = tasks.kind(part)
        if found not in kinds:
            wanted = " or ".join(NEEDS[kind] for kind in kinds)
            raise SpecError(f"objective={spec.name} needs {wanted}, and dataset={part.name} has {HAS[found]}")


def score_of(spec: ObjectiveSpec) -> str:
    """The validation score that runs are judged by where a command does not say; of an unknown objective the NLL."""
    return of(spec).score if spec.name in OBJECTIVES and spec.name != "nll" else "nll"


def longest(example: "Encoded", rows: Sequence["Tokens"]) -> int:
    """Tokens of the longest row that an example becomes, or could under another objective: what it is ordered by."""
    return max(example.longest, *(len(row.input_ids) for row in rows))


def of(spec: ObjectiveSpec) -> "Objective":
    """The objective of a run; one object for all runs that minimise the same."""
    return _made(spec.name, json.dumps(dict(spec.options), sort_keys=True), OBJECTIVES[spec.name])


@lru_cache(maxsize=64)
def _made(name: str, options: str, make: Callable[..., "Objective"]) -> "Objective":
    return make(**json.loads(options))
