"""What an objective is to the trainer: an entry of the table `sweeper.objectives.OBJECTIVES`.

Shapes: L lanes (runs), R token rows of a lane, K target tokens of a lane (padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from sweeper.models.loss import Head
from sweeper.tasks.example import Tokens

SHARE, VALUE, REFERENCE = range(3)  # columns of `Outputs.facts`


@dataclass(frozen=True, slots=True)
class Row:
    """A row of tokens that an example becomes; loss falls on `input_ids[prompt_length:]`.

    `value` is a number of the objective's own, such as a label. `reference` is the log-likelihood of the targets under
    the base model, in nats, which is filled in where the objective asks for it.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    value: float = 0.0
    reference: float = 0.0


@dataclass(eq=False)
class Outputs:
    """What a forward pass gives the objective of some lanes. Lanes are runs and do not depend on one another.

    Attributes:
        head: makes logits of `states` [L*K, D], the hidden states that predict the targets.
        targets: [L, K] token ids.
        weights: [L, K] 1 / (target tokens of the run's whole step, of rows of the same place in their examples); 0 for
            padding.
        rows: [L, K] which row of its lane a target is of. positions: [L, K] its place in that row, from 0.
        facts: [L, R, 3] of each row: the weight of its example in the loss, which is 1 / (examples of the run's whole
            step) and 0 for rows that fill up a lane; `Row.value`; `Row.reference`.
    """

    head: Head
    states: Tensor
    targets: Tensor
    weights: Tensor
    rows: Tensor
    positions: Tensor
    facts: Tensor

    @cached_property
    def nll(self) -> Tensor:
        """NLL [L, K] of each target token, in nats; differentiable."""
        return self.head.nll(self.states, self.targets)

    @property
    def shares(self) -> Tensor:
        """[L, R] weight of each row's example."""
        return self.facts[..., SHARE]

    @property
    def values(self) -> Tensor:
        return self.facts[..., VALUE]

    @property
    def references(self) -> Tensor:
        return self.facts[..., REFERENCE]

    @cached_property
    def _of_row(self) -> Tensor:
        """[L, K, R] whether a target is of a row."""
        rows = torch.arange(self.facts.shape[1], device=self.rows.device)
        return (self.rows[..., None] == rows) & (self.weights > 0)[..., None]

    def by_row(self, each: Tensor) -> Tensor:
        """Sums [L, R] over the targets of each row of a number for each target [L, K]."""
        # no scatter: what it adds up on a GPU is in an order of chance
        return torch.where(self._of_row, each[..., None], 0.0).sum(1)

    @cached_property
    def counts(self) -> Tensor:
        """[L, R] target tokens of each row, at least 1."""
        return self._of_row.sum(1).clamp(min=1)

    @cached_property
    def log_likelihoods(self) -> Tensor:
        """[L, R] log-likelihood of the targets of each row, in nats."""
        return -self.by_row(self.nll)


class Objective(Protocol):
    """What a run minimises. Inherit from it, and say what differs.

    Attributes:
        linear: whether the loss is the weighted sum of the tokens' NLL: then the head is run through once, not twice.
        reference: whether rows need the base model's own log-likelihood (`Row.reference`).
        kinds: of examples that it can be of (`sweeper.tasks.preference`).
        score: what a run is judged by on validation, where nothing else is asked for.
    """

    linear: bool = False
    reference: bool = False
    kinds: tuple[str, ...] = ("plain", "pairs")
    score: str = "nll"

    def rows(self, example: Any) -> Sequence[Tokens]:
        """The token rows that an example becomes, always as many: one, or several that the loss compares."""
        return (example,)

    def rows_of(self, examples: Sequence[Any]) -> Sequence[Sequence[Tokens]]:
        """The rows of all examples of a split; for a loss that compares an example with others, more than `rows`."""
        return [self.rows(example) for example in examples]

    def losses(self, seen: Outputs) -> Tensor:
        """Loss of every lane [L]: a sum over its rows, each with the weight that `seen` gives it."""
        ...
