"""Merge-and-restart (ReLoRA, Lialin et al. 2023): an adapter is frozen, and a fresh one goes on beside it.

The base of a pack is shared and stays as it is, so what would be merged lives on as frozen ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.lora.flat import Flat
from sweeper.lora.forms.sparse import patterns
from sweeper.lora.layout import Placed
from sweeper.lora.transfer import send
from sweeper.models.architecture import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarts:
    """After every `every` steps, `count` times, a fresh adapter.

    The learning rate climbs again from 0 within `warmup` steps, and `prune` is the share of the optimiser's moments,
    the smallest ones, that is forgotten.
    """

    every: int
    count: int
    warmup: int
    prune: float

    def block(self, step: int) -> int:
        """Which of the `count` + 1 adapters trains at a step (from 0)."""
        return min(step // self.every, self.count)

    def due(self, step: int) -> bool:
        """Whether a fresh adapter begins with a step."""
        return step > 0 and self.block(step) > self.block(step - 1)

    def pace(self, step: int) -> tuple[int, float]:
        """The step whose learning rate counts, and the factor on it: the jagged schedule of the paper's figure 2."""
        since = step - self.block(step) * self.every
        if step < self.every or since >= self.warmup:
            return step, 1.0
        return step - since + self.warmup, since / self.warmup

    def kept(self, values: int) -> int:
        """How many of some moments are not forgotten."""
        return round(values * (1 - self.prune))


@torch.no_grad()
def restart(
    flat: Flat[Any], placed: Placed, restarts: Restarts, before: Sequence[slice], now: Sequence[slice],
    begin: Callable[[Target, Tensor, Tensor], None], copies: Sequence[Tensor],
) -> None:  # fmt: skip
    """Begins the next adapter of a run; the one before stays, frozen.

    Args:
        before, now: of each module, the ranks of the adapter that ends and of the one that begins.
        begin: fills A and B of a module, of zeros. copies: what else holds the values, as the average.
    """

    def blocks(rows: Sequence[slice], store: Tensor) -> list[Tensor]:
        """What the adapter in some ranks has in a store, part by part."""
        views = zip(placed.parts, placed.views(store).values(), rows, strict=True)
        return [
            value[own]
            for parts, values, own in views
            for (part, _), value in zip(parts, values, strict=True)
            if part.by_rank
        ]

    begun = [torch.zeros(part.shape) for part in blocks(now, flat.params)]
    for segment, a, b in zip(placed.segments, begun[::2], begun[1::2], strict=True):
        begin(segment.target, a, b)
    sent = send(torch.cat([part.flatten() for part in begun]), flat.params.device)
    for store in (flat.params, *copies):
        new = [part.view(-1) for part in blocks(now, store)]
        torch._foreach_copy_(new, sent.split([part.numel() for part in new]))
    means = [part.reshape(1, -1) for part in blocks(before, flat.exp_avg)]
    masks = patterns([part.abs() for part in means], [restarts.kept(part.numel()) for part in means])
    for moments in (flat.exp_avg, flat.exp_avg_sq):
        old, new = ([part.view(1, -1) for part in blocks(rows, moments)] for rows in (before, now))
        torch._foreach_copy_(new, torch._foreach_mul(old, masks))
        torch._foreach_zero_(old)
