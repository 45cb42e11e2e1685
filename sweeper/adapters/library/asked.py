"""What `adapters.py route` is asked for: the rules and their numbers, as they are typed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from sweeper.errors import SpecError, unknown

RULES = {
    "uniform": "the mean of the members' updates",
    "centroid": "each prompt through the member whose training prompts are nearest",
    "arrow": "each token and module through the members whose first singular vectors it has most of",
    "lorahub": "one weight for each member, found without gradients on a few examples",
    "mole": "gates by layer and token, trained on a few examples",
}
FREE = ("uniform", "centroid", "arrow")
"""Rules that learn nothing from the task that is scored, which are those used unless others are named."""
GATES = ("layer", "module")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Rules and their numbers.

    Attributes:
        rules: of `RULES`. examples: how many of a task's training examples lorahub and mole learn from, drawn by seed.
        top_k, temperature: of arrow; null is 3, or all members where there are fewer. general: folders of runs whose
            mean adapter arrow takes off every member's.
        budget, alpha: of lorahub: candidates tried, and the weight of sum |w|. steps, lr, balance, gates: of mole:
            optimiser steps, learning rate, weight of the balancing loss, and what a gate is for.
    """

    rules: tuple[str, ...] = FREE
    examples: int = 5
    top_k: int | None = None
    temperature: float = 1.0
    general: tuple[str, ...] = ()
    budget: int = 40
    alpha: float = 0.05
    steps: int = 100
    lr: float = 1e-3
    balance: float = 0.5
    gates: str = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule not in RULES:
                raise SpecError(unknown("rules", rule, RULES))
        if not self.rules:
            raise SpecError(f"rules= names none. Choose from {', '.join(RULES)}")
        if self.gates not in GATES:
            raise SpecError(unknown("gates", self.gates, GATES))
        for name in ("examples", "budget", "steps", *(["top_k"] if self.top_k is not None else [])):
            if getattr(self, name) < 1:
                raise SpecError(field=name, wanted="at least 1", got=getattr(self, name))
        if not 0 <= self.seed < 1 << 32:
            raise SpecError(field="--seed", wanted="at least 0 and below 2^32", got=self.seed)
        for name in ("temperature", "lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SpecError(field=name, wanted="above 0", got=getattr(self, name))
        for name in ("alpha", "balance"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SpecError(field=name, wanted="at least 0", got=getattr(self, name))
        if self.general and "arrow" not in self.rules:
            raise SpecError(f"general={','.join(self.general)} is for rules=arrow, got rules={','.join(self.rules)}")

    @property
    def learns(self) -> tuple[str, ...]:
        """The rules that need examples of the task."""
        return tuple(rule for rule in self.rules if rule not in FREE)

    def most(self, members: int) -> int:
        """How many members arrow takes at a token and module.

        Raises:
            SpecError: more than there are.
        """
        if self.top_k is not None and self.top_k > members:
            raise SpecError(field="top_k", wanted=f"at most {members}, the number of members", got=self.top_k)
        return min(3, members) if self.top_k is None else self.top_k


NAMES = tuple(field.name for field in fields(Asked) if field.name != "seed")


def parse(typed: Mapping[str, str], *, seed: int = 0) -> Asked:
    """`Asked` from what is typed, field -> text.

    Raises:
        SpecError: a value of another kind, or one that cannot be used.
    """
    kinds = {field.name: field.type for field in fields(Asked)}
    return Asked(seed=seed, **{name: _value(name, kinds[name], text) for name, text in typed.items()})


def _value(name: str, kind: Any, text: str) -> Any:
    if kind == tuple[str, ...]:
        return tuple(dict.fromkeys(part.strip() for part in text.strip("[]").split(",") if part.strip()))
    one = next((part for part in get_args(kind) if part is not type(None)), kind)
    try:
        return one(text)
    except ValueError:
        words = {int: "a whole number", float: "a number"}
        raise SpecError(field=name, wanted=words[one], got=text) from None
