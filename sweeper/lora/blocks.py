"""Rank blocks of an adapter: consecutive ranks that act on the rows of some tasks only, y += s B (g * A x).

The gate g of a row is 1 for every block that acts on the row's task, and 0 for the others. A block has a
clock of its own: the optimiser clips, corrects and schedules it by itself, and leaves it as it is in a step that has no
row it trains on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.models.architecture import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive ranks of every module.

    Attributes:
        level: its depth in the tree of tasks, from 0; blocks of one level begin alike, others do not.
        acts: the tasks whose rows run through it. trains: those whose rows it learns from.
        ranks: module name -> its rank there; absent where it has none.
    """

    name: str
    level: int
    acts: frozenset[int]
    trains: frozenset[int]
    ranks: Mapping[str, int]


def rows_of(blocks: Sequence[Block], module: str) -> list[slice]:
    """The ranks of a module that are each block's."""
    found, first = [], 0
    for block in blocks:
        found.append(slice(first, first + block.ranks.get(module, 0)))
        first = found[-1].stop
    return found


def unaligned(blocks: Sequence[Block], targets: Sequence[Target], unit: int) -> Target | None:
    """A module where a block begins amid a unit of values of the flat store; a unit has one clock."""
    for target in targets:
        for rows in rows_of(blocks, target.name):
            begins = rows.start * target.in_features % unit == rows.start * target.out_features % unit == 0
            if rows.start < rows.stop and not begins:
                return target
    return None


def gate(h: Tensor, gates: Tensor | None, gate_rows: Tensor | None) -> None:
    """Multiplies hidden values [N, H] in place by the gates of their shares of rows, if there are any.

    Args:
        gates: [any, H] float32. gate_rows: [G] rows of `gates` for equal shares of h; None: each row has its own.
    """
    if gates is not None and gate_rows is None:
        h.mul_(gates)
    elif gates is not None and gate_rows is not None:
        h.view(len(gate_rows), -1, h.shape[1]).mul_(gates.index_select(0, gate_rows)[:, None])


def gate_gradient(h: Tensor, dh: Tensor, gates: Tensor, scale: Tensor, lanes: Tensor) -> Tensor:
    """Gradient of gates that each row has its own of [N, H]; 0 where a gate is.

    Args:
        h: s g (A x), as the products leave it. dh: s dy B^T, before it is gated. scale: [J, M]. lanes: [L] slots.
    """
    own = scale.index_select(0, lanes.clamp(min=0)).repeat_interleave(h.shape[1] // scale.shape[1], 1)
    factor = gates.view(len(lanes), -1, h.shape[1]) * own[:, None]
    live = (factor != 0).view(h.shape)
    found = h.float() * dh.float() / torch.where(live, factor.reshape(h.shape), 1.0)
    return torch.where(live, found, 0.0)
