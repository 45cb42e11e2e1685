"""Penalties on an adapter, as gradients that are added to those of the loss.

    update         |s B A|^2 = s^2 tr(A A^T B^T B), the size of what is added to the weights
    orthogonality  |A A^T - I|^2 + |B^T B - I|^2, for the rows of A and the columns of B (AdaLoRA: Zhang et al. 2023,
                   eq. 4)
    norm           |A|^2 + |B|^2

All norms are Frobenius. The last two are of what trains; the update is the whole one.
"""

import torch
from torch import Tensor


def gradients(
    a: Tensor, b: Tensor, live_a: Tensor, live_b: Tensor, scale: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients for A [rank, in] and transposed B [rank, out] of the weighted sum of the penalties.

    Args:
        live_a, live_b: A and B with the rows that do not train at zero.
        scale: factor on B A. weights: of update, orthogonality and norm.
    """
    update, orthogonality, norm = weights[0], weights[1], weights[2]
    found = []
    for matrix, live, other in ((a, live_a, b), (b, live_b, a)):
        gram = torch.mm(live, live.t())
        gram.diagonal().sub_(1)
        gradient = 2 * update * scale.square() * torch.mm(torch.mm(other, other.t()), matrix)
        found.append(gradient + 4 * orthogonality * torch.mm(gram, live) + 2 * norm * live)
    return found[0], found[1]
