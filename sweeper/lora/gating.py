"""Gates that are learnt: a softmax over experts, the few that are kept of it, and the pull towards using all alike.

Shapes: L lanes, n rows of a lane (tokens, or prompts), K experts, D values that a router reads.
"""

from typing import Any

import torch
from torch import Tensor

WIDTH = 128  # values of a prompt that a router reads
_SEED = 0


def gates(probabilities: Tensor, kept: Tensor) -> Tensor:
    """Gates [L, n, K]: the `kept` [L] highest probabilities of each row, divided by their sum; all others are 0."""
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    among = order.argsort(dim=-1) < kept[:, None, None]
    chosen = torch.where(among, probabilities, 0.0)
    return chosen / chosen.sum(-1, keepdim=True)


def shares(probabilities: Tensor, found: Tensor, kept: Tensor, valid: Tensor) -> Tensor:
    """Share of the valid rows that goes to each expert [L, K]: how often it is kept, or its mean gate where all are.

    Args:
        found: gates [L, n, K]. kept: [L] of how many experts. valid: [L, n] 1 for rows that count, 0 for padding.
    """
    every = kept[:, None, None] >= probabilities.shape[-1]
    sent = torch.where(every, found, (found > 0).to(found.dtype) / kept[:, None, None])
    counted = valid.sum(1).clamp(min=1)
    return (sent * valid[..., None]).sum(1) / counted[:, None]


class Balance(torch.autograd.Function):
    """Probabilities as they are; their gradient has that of weight * K * sum over experts of share * mean probability.

    This is the load-balancing loss of Fedus et al. (2022, eq. 4) and MixLoRA (Li et al. 2024, eq. 8): the shares count
    as constants, so it adds `weight * K * share / rows` to the gradient of every probability, and no loss has to be
    carried out of the layers.
    """

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, share: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(share, weight, valid)
        return probabilities.view_as(probabilities)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        share, weight, valid = ctx.saved_tensors
        per_row = valid / valid.sum(1, keepdim=True).clamp(min=1)
        pull = weight[:, None, None] * share.shape[-1] * share[:, None, :] * per_row[..., None]
        return gradient + pull, None, None, None


def balanced(probabilities: Tensor, share: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """`Balance` of probabilities [L, n, K]: share [L, K], weight [L], valid [L, n]."""
    apply: Any = Balance.apply
    found: Tensor = apply(probabilities, share, weight, valid)
    return found


def balance(probabilities: Tensor, share: Tensor, valid: Tensor) -> Tensor:
    """K * sum over experts of share * mean probability [L]; 1 where all experts have as much."""
    counted = valid.sum(1).clamp(min=1)
    mean = (probabilities * valid[..., None]).sum(1) / counted[:, None]
    found: Tensor = probabilities.shape[-1] * (share * mean).sum(-1)
    return found


def projection(width: int) -> Tensor:
    """A fixed random matrix [width, WIDTH] that nearly keeps angles (Johnson & Lindenstrauss 1984)."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn: Tensor = torch.randn(width, WIDTH, generator=generator) / width**0.5
    return drawn


def read(hidden: Tensor, lengths: Tensor, projected: Tensor) -> Tensor:
    """What a router reads of prompts [rows, WIDTH]: their mean hidden state, standardised, through the projection.

    Args:
        hidden: the bare base model's last hidden states [rows, T, D]. lengths: [rows] tokens of each prompt.
    """
    inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    mean = (hidden.float() * inside[..., None]).sum(1) / lengths[:, None].clamp(min=1)
    centred = mean - mean.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return (centred / spread) @ projected
