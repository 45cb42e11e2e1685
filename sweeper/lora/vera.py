"""VeRA's shared matrices: A and B of every module are those of its run, times a factor for each rank and output.

    A = d * A0[:, :in],  B = b * B0[:out]        (Kopiczko et al. 2024, eq. 2; A0 and B0 random, shared and frozen)

The products are made before the forward pass, in the places where a LoRA has its A and B, so that the same kernels
serve both; after the backward pass the gradients of A and B become those of d and b.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.models.architecture import Target


def draw(rank: int, targets: Sequence[Target], seed: int) -> tuple[Tensor, Tensor]:
    """A0 [rank, widest in] and B0 [widest out, rank] for some modules, as PEFT draws them from its projection key."""
    wide_in, wide_out = max(t.in_features for t in targets), max(t.out_features for t in targets)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.empty(rank, wide_in), torch.empty(wide_out, rank)
    for matrix in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))  # kaiming_uniform_ with a = 0
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b


@dataclass
class Shared:
    """The shared matrices of one slot, with room for its capacity: a [R, in], b transposed [R, out]; zero beyond."""

    a: Tensor
    b: Tensor
    on: Tensor

    @classmethod
    def empty(cls, rank: int, targets: Sequence[Target], device: torch.device) -> "Shared":
        return cls(
            torch.zeros(rank, max(t.in_features for t in targets), device=device),
            torch.zeros(rank, max(t.out_features for t in targets), device=device),
            torch.zeros((), dtype=torch.bool, device=device),
        )

    def fill(self, a: Tensor, b: Tensor) -> None:
        """Takes a run's A0 and B0, and is on."""
        self.clear()
        self.a[: a.shape[0], : a.shape[1]] = a
        self.b[: b.shape[1], : b.shape[0]] = b.t()
        self.on.fill_(True)

    def clear(self) -> None:
        for tensor in (self.a, self.b, self.on):
            tensor.zero_()

    def derive(self, a: Tensor, b: Tensor, d: Tensor, g: Tensor) -> None:
        """Writes d * A0 to a [R, in] and g * B0 to b [R, out], where the slot holds a VeRA."""
        a.copy_(torch.where(self.on, d[:, None] * self._a(a), a))
        b.copy_(torch.where(self.on, self._b(b) * g, b))

    def project(self, da: Tensor, db: Tensor, dd: Tensor, dg: Tensor) -> None:
        """Adds the gradients of a and b, as those of d and g, to `dd` and `dg`; clears them."""
        dd += torch.where(self.on, (da * self._a(da)).sum(1), 0.0)
        dg += torch.where(self.on, (db * self._b(db)).sum(0), 0.0)
        for gradient in (da, db):
            gradient.copy_(torch.where(self.on, 0.0, gradient))

    def _a(self, like: Tensor) -> Tensor:
        return self.a[: like.shape[0], : like.shape[1]]

    def _b(self, like: Tensor) -> Tensor:
        return self.b[: like.shape[0], : like.shape[1]]
