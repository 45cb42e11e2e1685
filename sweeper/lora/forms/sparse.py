"""Which values of A and B are not zero: a random pattern, or one learnt by pruning (RoseLoRA, Wang et al. 2024).

Rows of A and columns of B are pruned one by one, each to the same share, so that no direction is lost altogether. What
counts is the sensitivity |w dL/dw|, smoothed over the steps (equations 6 and 7), and the share falls from 1 by a cubic
between two steps. After the last of them the pattern stays as it is, and what was pruned is frozen at zero.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.lora.flat import Flat
from sweeper.lora.layout import Part
from sweeper.lora.seeds import seed_of
from sweeper.lora.transfer import send

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

    def masks(self, sensitivities: Sequence[Tensor], step: int) -> list[Tensor]:
        """For every part of an adapter that learns its pattern: 1 where it is not zero after some steps."""
        return patterns(sensitivities, [self.kept(part.shape[1], step) for part in sensitivities])

    def thin_out(self, parts: Sequence[Part], values: Sequence[Tensor], key: str) -> None:
        """Sets to zero, on the host, what a random pattern leaves out of a module's A and B."""
        if self.learnt:
            return
        for part, value in zip(parts, values, strict=True):
            if part.by_rank:
                count = self.kept(value.shape[1], 0)
                value *= random_pattern(len(value), value.shape[1], count, f"{key}/{part.rate}")


def kept(width: int, density: float) -> int:
    """Values of a row that are not zero; at least one."""
    return max(1, round(width * density))


def patterns(weights: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """For each weight 1 for the `counts` largest of every row and 0 for the rest; those of one shape are taken at once.

    A GPU is given a few long operations, not a handful for each of hundreds of modules.
    """
    alike: dict[tuple[torch.Size, int], list[int]] = defaultdict(list)
    for place, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        alike[weight.shape, count].append(place)
    found: dict[int, Tensor] = {}
    for (_, count), places in alike.items():
        together = torch.stack([weights[place] for place in places])
        masks = torch.zeros_like(together).scatter_(-1, together.topk(count).indices, 1.0)
        found.update(zip(places, masks, strict=True))
    return [found[place] for place in range(len(weights))]


def random_pattern(rows: int, width: int, count: int, key: str) -> Tensor:
    """1 for `count` values of every row, drawn from a key alone, and 0 for the rest."""
    (found,) = patterns([torch.rand(rows, width, generator=torch.Generator().manual_seed(seed_of(key)))], [count])
    return found


def sensitivity(value: Tensor, gradient: Tensor) -> Tensor:
    """|w dL/dw|; 0 where the gradient is not finite, since such a step moves nothing."""
    return torch.where(gradient.isfinite(), value * gradient, 0.0).abs()


@torch.no_grad()
def accumulate_sensitivity(flat: Flat[Any], memory: Mapping[int, float]) -> None:
    """Smooths over the steps how sensitive the loss is to the values of some slots, which each keep a share of it."""
    found = flat.copies["sensitivity"]
    if flat.params.is_cuda:
        from sweeper.lora import kernels

        shares = send(torch.tensor([memory.get(slot, math.nan) for slot in range(flat.slots)]), flat.params.device)
        kernels.accumulate_sensitivity(flat.params, flat.grads, found, flat.block_slot, shares)
        return
    for slot, share in memory.items():
        for start, stop in flat.spans[slot]:
            now = sensitivity(flat.params[start:stop], flat.grads[start:stop])
            found[start:stop].lerp_(now, 1 - share)
