"""Several members' adapters as one, the same for every token: by update, or in the form of LoRAHub."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, Task
from sweeper.adapters.library.experts import Experts, Factors, Folded
from sweeper.adapters.library.made import Made

UPDATES, FACTORS = "sum of updates", "product of sums"


def uniform(bench: Bench, asked: Asked, task: Task) -> Made:
    """The mean of the members' updates."""
    count = len(bench.members)
    return Made(by_update(bench.experts, torch.full((count,), 1 / count)), {"form": UPDATES})


def by_update(experts: Sequence[Experts], weights_K: Tensor) -> Folded:
    """Sum of w_k s_k B_k A_k, exactly: the members' ranks side by side, whatever their number and placement."""
    found: dict[str, Factors] = {}
    for one in experts:
        w_S = weights_K.to(one.b_SO)[one.owner_S]
        found[one.target.name] = (one.a_SI, w_S[:, None] * one.b_SO)
    return Folded(found)


def by_factor(experts: Sequence[Experts], weights_K: Tensor) -> Folded:
    """s (sum of w_k B_k) (sum of w_k A_k), as LoRAHub combines (Huang et al. 2023): of the members' rank.

    Not a sum of updates: B of one member also meets A of another. The members must be `alike`.
    """
    found: dict[str, Factors] = {}
    for one in experts:
        w = weights_K.to(one.b_SO)[:, None, None]
        a_KRI = one.a_SI.view(len(weights_K), -1, one.a_SI.shape[1])
        b_KRO = one.b_SO.view(len(weights_K), -1, one.b_SO.shape[1])
        found[one.target.name] = ((w * a_KRI).sum(0), (w * b_KRO).sum(0))
    return Folded(found)


def alike(experts: Sequence[Experts]) -> bool:
    """Whether all members have the same rank and scale in every module."""
    return all(len(set(one.ranks)) == 1 and bool((one.scale_K == one.scale_K[0]).all()) for one in experts)
