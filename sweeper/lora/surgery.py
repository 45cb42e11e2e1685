"""Gradient surgery: from the gradient of each task what goes against another's is taken away (PCGrad, Yu et al. 2020).

Algorithm 1 of the paper, for every task i: g_i starts as the task's own gradient; for every other task j in a random
order, where g_i . g_j < 0, g_i becomes g_i - (g_i . g_j) / |g_j|^2 g_j, with the untouched g_j. The step goes along
the sum of all g_i. Where an adapter has rank blocks, i and j meet in the blocks that both of them train, and there
alone.

Every g_i stays a combination of the tasks' own gradients, so all that the loop needs are their products, summed once:
the loop itself is over a few small numbers, on the device, for all slots at once.

Shapes: J slots, B clocks of a slot (rank blocks, or 1), C = J * B clocks, P tasks, Q = P - 1, F values of the store,
N blocks of 64 values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweeper.lora.blocks import Block
from sweeper.lora.flat import Flat
from sweeper.lora.layout import BLOCK
from sweeper.lora.transfer import send

SHARE = 256  # blocks that are added up first


def order(seed: int, step: int, tasks: int) -> np.ndarray:
    """For every task the others in a random order [P, Q], of a run's own seed and step (from 0)."""
    rng = np.random.default_rng([seed, step, 0x9C6])
    others = [[other for other in range(tasks) if other != task] for task in range(tasks)]
    return np.stack([rng.permutation(own) for own in others])


def combination(products_JBPP: Tensor, shared_JBPP: Tensor, order_JPQ: Tensor) -> Tensor:
    """The factor on each task's own gradient in the sum of all projected ones, by block [J, B, P].

    Args:
        products_JBPP: g_i . g_j within each block. shared_JBPP: 1 where both tasks train it, else 0.
        order_JPQ: for every task the others, in the order in which they are met.
    """
    slots, blocks, tasks, _ = products_JBPP.shape
    found = torch.eye(tasks, dtype=products_JBPP.dtype, device=products_JBPP.device)
    found = found.expand(slots, blocks, tasks, tasks).clone()  # row i: g_i in terms of the tasks' own
    for other_JP in order_JPQ.unbind(2):
        one = other_JP[:, None, :, None].expand(slots, blocks, tasks, 1)
        with_other = products_JBPP.gather(2, one.expand(slots, blocks, tasks, tasks))
        meet = shared_JBPP.gather(3, one)
        dot = (meet * (found * with_other).sum(3, keepdim=True)).sum(1, keepdim=True)
        square = (meet * with_other.gather(3, one)).sum(1, keepdim=True)
        against = torch.where((dot < 0) & (square > 0), dot / square, 0.0)
        found = found.scatter_add(3, one, -meet * against)
    return found.sum(2)


class TaskGradients:
    """The gradients of a store by task, and what surgery makes of them; all slots have runs of `tasks` tasks.

    Attributes:
        kept: [P, F] of each task.
    """

    def __init__(self, flat: Flat[Any], tasks: int) -> None:
        self.flat, self.tasks = flat, tasks
        self.kept = torch.zeros(tasks, *flat.grads.shape, device=flat.grads.device)
        self._trained: list[Sequence[frozenset[int]]] = [()] * flat.slots
        self._renew()

    @property
    def bytes(self) -> int:
        """Memory of all that is kept."""
        return self.kept.numel() * self.kept.element_size()

    def assign(self, slot: int, blocks: Sequence[Block]) -> None:
        """A slot has been given to a run with these rank blocks."""
        self._trained[slot] = [block.trains for block in blocks]
        self._renew()

    def _renew(self) -> None:
        """Which values of the store belong to which clock, and which tasks meet there."""
        flat, each = self.flat, self.flat.clocks_each
        shared = np.ones((flat.slots, each, self.tasks, self.tasks))
        for slot, trained in enumerate(self._trained):
            for number, own in enumerate(trained):
                there = np.array([task in own for task in range(self.tasks)])
                shared[slot, number] = np.outer(there, there)
        self._shared = send(torch.from_numpy(shared), flat.grads.device)
        blocks = [
            np.concatenate([np.arange(start // BLOCK, stop // BLOCK) for start, stop in spans] or [np.arange(0)])
            for spans in flat.clock_spans
        ]
        first, second = _shares(blocks, flat.grads.numel() // BLOCK)
        self._first, self._second = (send(torch.from_numpy(one), flat.grads.device) for one in (first, second))

    @torch.no_grad()
    def keep(self, task: int) -> None:
        """Sets the gradients aside as those of a task, and clears them."""
        self.kept[task].copy_(self.flat.grads)
        if self.flat.rates is not None:
            self.kept[task].masked_fill_(self.flat.rates == 0, 0.0)  # what is frozen is no part of the products
        self.flat.grads.zero_()

    @torch.no_grad()
    def combine(self, orders: Sequence[np.ndarray | None]) -> None:
        """Puts the sum of the projected gradients in place of the gradients.

        Args:
            orders: of each slot, as `order` has it; None of one whose run does not move.
        """
        flat, still = self.flat, order(0, 0, self.tasks)
        every = np.stack([still if one is None else one for one in orders])
        order_JPQ = send(torch.from_numpy(every), self._shared.device)
        each = (flat.slots, flat.clocks_each, self.tasks)
        factors = combination(self.products().view(*each, self.tasks), self._shared, order_JPQ)
        factors_NP = factors.float().view(-1, self.tasks).index_select(0, flat.block_clock)
        grads = flat.grads.view(-1, BLOCK)
        grads.zero_()
        for task in range(self.tasks):
            grads.addcmul_(self.kept[task].view(-1, BLOCK), factors_NP[:, task, None])

    def products(self) -> Tensor:
        """g_i . g_j within each clock [C, P, P], float64; the same bits whenever they are of the same gradients."""
        blocks = self.kept.view(self.tasks, -1, BLOCK)
        found = blocks.new_zeros(self.tasks, self.tasks, blocks.shape[1] + 1)  # and one that is empty
        for i in range(self.tasks):
            for j in range(i + 1):
                torch.sum(blocks[i] * blocks[j], 1, out=found[i, j, :-1])
                found[j, i] = found[i, j]
        pairs = found.view(self.tasks**2, -1)
        shares = pairs.index_select(1, self._first.flatten()).view(-1, *self._first.shape).sum(2, dtype=torch.float64)
        shares = torch.cat([shares, shares.new_zeros(len(shares), 1)], 1)
        sums = shares.index_select(1, self._second.flatten()).view(-1, *self._second.shape).sum(2)
        return sums.t().reshape(-1, self.tasks, self.tasks)


def _shares(blocks: Sequence[np.ndarray], empty: int) -> tuple[np.ndarray, np.ndarray]:
    """How blocks are added up by clock without a scatter, whose order of sums is of chance on a GPU.

    Args:
        blocks: those of each clock. empty: the number of a block of zeros.

    Returns:
        The blocks of each share [shares, SHARE], and the shares of each clock [C, most], filled up with what is empty.
    """
    parts = [_rows(own, SHARE, empty) for own in blocks]
    counts = np.array([len(part) for part in parts])
    first = np.concatenate(parts) if counts.sum() else np.full((1, SHARE), empty)
    starts = np.cumsum(counts) - counts
    second = np.full((len(blocks), max(1, int(counts.max(initial=0)))), len(first))
    for clock, (start, count) in enumerate(zip(starts, counts, strict=True)):
        second[clock, :count] = np.arange(start, start + count)
    return first, second


def _rows(values: np.ndarray, width: int, empty: int) -> np.ndarray:
    padded = np.full(-(-len(values) // width) * width, empty)
    padded[: len(values)] = values
    return padded.reshape(-1, width)
