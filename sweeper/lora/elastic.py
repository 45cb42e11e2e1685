"""Elastic weights (EWC, Kirkpatrick et al. 2017, eq. 3): what a slot's values may not move far from, and how far.

The loss of a later task has lambda / 2 times the sum, over earlier tasks t, of F_t (theta - theta_t)^2, with the
diagonal F_t of the Fisher information at the values theta_t that task t ended with. Its gradient is
lambda (theta sum_t F_t - sum_t F_t theta_t), so two sums are all that is kept, however many tasks there are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sweeper.lora.flat import Flat

FISHER, ANCHOR = STORES = ("fisher", "anchor")
"""Stores of a flat store's layout: the sum of F_t, and that of F_t theta_t."""


@torch.no_grad()
def pull(flat: Flat[Any], slot: int, weight: Tensor) -> None:
    """Adds to a slot's gradients those of its elasticity, times a `weight` [] on the device; part of captured steps."""
    held = torch._foreach_mul(flat.pieces(slot, flat.copies[FISHER]), flat.pieces(slot, flat.params))
    torch._foreach_sub_(held, flat.pieces(slot, flat.copies[ANCHOR]))
    torch._foreach_mul_(held, weight)
    torch._foreach_add_(flat.pieces(slot, flat.grads), list(held))


@torch.no_grad()
def take_squares(flat: Flat[Any], slot: int, sums: Sequence[Tensor]) -> None:
    """Moves a slot's squared gradients into `sums`, a tensor for each of its pieces; the gradients are then zero."""
    gradients = flat.pieces(slot, flat.grads)
    torch._foreach_addcmul_(list(sums), gradients, gradients)
    torch._foreach_zero_(gradients)


@torch.no_grad()
def remember(flat: Flat[Any], slot: int, sums: Sequence[Tensor], count: int) -> None:
    """Has a slot keep to the values it has now, by the mean of `count` squared gradients, whose sums these are."""
    stores = (flat.copies[FISHER], flat.copies[ANCHOR], flat.params)
    for own, fisher, anchor, value in zip(sums, *(flat.pieces(slot, store) for store in stores), strict=True):
        information = own / count
        fisher += information
        anchor += information * value
