"""Which values of A and B are not zero: a random pattern, or one learnt by pruning (RoseLoRA, Wang et al. 2024).

Rows of A and columns of B are pruned one by one, each to the same share, so that no direction is lost altogether. What
counts is the sensitivity |w dL/dw|, smoothed over the steps (equations 6 and 7), and the share falls from 1 by a cubic
between two steps. After the last of them the pattern stays as it is, and what was pruned is frozen at zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.engine.bank.seeds import seed_of

ROUNDS = 20  # of pruning; each looks at every value


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """How sparse an adapter becomes. `density` is the share of values that are not zero in the end.

    `first` and `last` are the steps between which it is pruned, `memory` is the share of the sensitivity that is kept
    from step to step. A random pattern is there from the start: `learnt` false.
    """

    density: float
    learnt: bool
    first: int = 0
    last: int = 0
    memory: float = 0.85

    def kept(self, width: int, step: int) -> int:
        """Values of a row of `width` that are not zero after `step` steps."""
        share = self.density
        if self.learnt and step < self.last:
            progress = max(0.0, (step - self.first) / max(1, self.last - self.first))
            share += (1 - self.density) * (1 - progress) ** 3
        return kept(width, share)

    def due(self, step: int) -> bool:
        """Whether the adapter is pruned after `step` steps: about `ROUNDS` times, the last one at `last`."""
        if not self.learnt or not self.first < step <= self.last:
            return False
        return step == self.last or (step - self.first) % max(1, (self.last - self.first) // ROUNDS) == 0

    def settled(self, step: int) -> bool:
        """Whether the pattern is final after `step` steps."""
        return not self.learnt or step >= self.last


def kept(width: int, density: float) -> int:
    """Values of a row that are not zero; at least one."""
    return max(1, round(width * density))


def pattern(weight: Tensor, count: int) -> Tensor:
    """True for the `count` largest of every row."""
    chosen = weight.topk(count, dim=1).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, chosen, True)


def random_pattern(rows: int, width: int, count: int, key: str) -> Tensor:
    """`count` values of every row, drawn from a key alone."""
    return pattern(torch.rand(rows, width, generator=torch.Generator().manual_seed(seed_of(key))), count)


def sensitivity(value: Tensor, gradient: Tensor) -> Tensor:
    """|w dL/dw|; 0 where the gradient is not finite, since such a step moves nothing."""
    return torch.where(gradient.isfinite(), value * gradient, 0.0).abs()
