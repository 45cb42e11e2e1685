"""What an objective is to the trainer: an entry of the table `sweeper.objectives.OBJECTIVES`."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sweeper.tasks.example import Tokens


class Objective(Protocol):
    """What a run minimises, from the log-probabilities of the target tokens of its rows.

    Shapes: L lanes, K target tokens of a lane (padded).
    """

    @property
    def linear(self) -> bool:
        """Whether the loss is the weighted sum of the tokens' NLL: then the head is run through once, not twice."""
        ...

    def rows(self, example: Any) -> Sequence[Tokens]:
        """The token rows that an example becomes, always as many: one, or several that the loss compares."""
        ...

    def losses(self, nll: Tensor, weights: Tensor, rows: Tensor, count: int) -> Tensor:
        """Loss of every lane [L], differentiable in `nll`; lanes are runs and do not depend on one another.

        Args:
            nll: [L, K] NLL of each target token, in nats.
            weights: [L, K] 1 / (target tokens of the run's whole step); 0 for padding.
            rows: [L, K] which of the `count` rows of its lane a token is of; 0 for padding.
        """
        ...
