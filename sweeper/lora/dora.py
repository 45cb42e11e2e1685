"""DoRA's gain: every output of a module times its magnitude over the norm of its adapted weights.

    y = m / ||W + s B A|| * (x W^T + s x A^T B) + bias        (Liu et al. 2024, eq. 5, norm of every row of W)

The norm counts as a constant in the backward pass (section 4.3). It comes from the Gram matrix of A, never from the
sum of the two matrices: ||W + s B A||^2 = ||W||^2 + 2 s B (A W^T) + s^2 B (A A^T) B^T, row by row.

Shapes: L lanes, J slots, X columns of a group's extra values, I in, O out, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class Gain:
    """The gains of one group of modules, for every slot; exactly 1 for a slot whose adapter is no DoRA.

    Args:
        weights: [I, O] of each member. magnitude: [J, X] leaf, member after member.
        columns: of each member, where its values begin among the X.
    """

    def __init__(self, weights: Sequence[Tensor], magnitude: Tensor, columns: Sequence[int]) -> None:
        self.weights, self.magnitude, self.columns = list(weights), magnitude, tuple(columns)
        self.squares = [torch.linalg.vector_norm(w, dim=0, dtype=torch.float32).square() for w in weights]
        self.norm = torch.ones_like(magnitude, requires_grad=False)
        self.on = torch.zeros_like(magnitude, dtype=torch.bool)

    def switch(self, slot: int, member: int, on: bool) -> None:
        """Says whether a slot's adapter of a member is a DoRA."""
        part = self._part(slot, member)
        self.on[part], self.norm[part] = on, 1.0

    def measure(self, slot: int, member: int, a: Tensor, b: Tensor, scale: Tensor) -> None:
        """Takes the norms of W + s B A; a [R, I], b [R, O]."""
        part = self._part(slot, member)
        norm = self.adapted_norm(member, a, b, scale)
        self.norm[part] = torch.where(self.on[part], norm, 1.0)

    def adapted_norm(self, member: int, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Norms [O] of the rows of W + s B A."""
        weight = self.weights[member]
        cross = torch.mm(a.to(weight.dtype), weight).float()
        squares = self.squares[member] + scale * (b * (2 * cross + scale * torch.mm(torch.mm(a, a.t()), b))).sum(0)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def apply(self, ys: Sequence[Tensor], biases: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
        """Outputs [N, O] of each member times the gain of the slot of their lane; the bias is left as it is."""
        excess = torch.where(self.on, self.magnitude / self.norm - 1, 0.0)
        excess = functional.pad(excess, (0, 0, 0, 1))  # the last row is for slot -1, the base
        excess = excess.index_select(0, slots % excess.shape[0])
        gained = []
        for member, y in enumerate(ys):
            first = self.columns[member]
            rows = y.view(excess.shape[0], -1, y.shape[-1])
            linear = rows - biases[member] if biases else rows
            part = excess[:, None, first : first + y.shape[-1]]
            gained.append((rows + part * linear).to(y.dtype).view(y.shape))
        return gained

    def _part(self, slot: int, member: int) -> tuple[int, slice]:
        first = self.columns[member]
        return slot, slice(first, first + self.weights[member].shape[1])
