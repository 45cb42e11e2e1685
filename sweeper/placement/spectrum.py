"""Numbers about singular values and vectors: of weights, of their updates, of the one against the other.

Shapes: O out, I in, K a few vectors. Matrices are [O, I], as y = W x has them. Decompositions go by the Gram matrix of
the smaller side in float64: several times faster than a singular value decomposition, and exact but for singular
values below 1e-8 of the largest, which are rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NOISE = 1e-7  # of the largest singular value; what is below has no direction


@dataclass(frozen=True, slots=True)
class Singular:
    """Thin singular value decomposition, largest first: `left` [O, K], `values` [K], `right` [I, K], float32."""

    left: Tensor
    values: Tensor
    right: Tensor

    def top(self, count: int) -> "Singular":
        return Singular(self.left[:, :count], self.values[:count], self.right[:, :count])


@torch.no_grad()
def weight_of(module: Any) -> Tensor:
    """A module's weight as [out, in] (of an embedding [dimension, entries]), float32, dequantised where it must be."""
    weight = module.weight
    if not weight.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(module)
    return as_matrix(module, weight.detach().float())


def as_matrix(module: Any, weight: Tensor) -> Tensor:
    """A weight in the layout of its module, as [out, in]: Conv1D and embeddings keep theirs the other way round."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return weight
    if isinstance(module, Conv1D | nn.Embedding):
        return weight.t()
    raise TypeError(f"{type(module).__name__} has no matrix of known layout")


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, largest first, float64 [min(O, I)]."""
    if min(matrix.shape) == 0:
        return matrix.new_zeros(0, dtype=torch.float64)
    squares: Tensor = torch.linalg.eigvalsh(_gram(matrix))
    return squares.clamp_min(0).sqrt().flip(0)


def decompose(matrix: Tensor) -> Singular:
    """Singular vectors and values of a matrix, without those that are rounding."""
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    values, vectors = squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    keep = values > NOISE * values[:1].clamp_min(torch.finfo(torch.float64).tiny)
    values, vectors = values[keep], vectors[:, keep]
    big = matrix.double()
    other = (big.t() @ vectors if wide else big @ vectors) / values
    left, right = (vectors, other) if wide else (other, vectors)
    return Singular(left.float(), values.float(), right.float())


def decompose_product(b_OR: Tensor, a_RI: Tensor) -> Singular:
    """As `decompose`, of the product B A, which is never made: QR of both factors, and the small matrix between."""
    left, inner_left = torch.linalg.qr(b_OR.double())
    right, inner_right = torch.linalg.qr(a_RI.double().t())
    u, values, vh = torch.linalg.svd(inner_left @ inner_right.t())
    keep = values > NOISE * values[:1].clamp_min(torch.finfo(torch.float64).tiny)
    return Singular((left @ u[:, keep]).float(), values[keep].float(), (right @ vh.t()[:, keep]).float())


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007); 0 of a zero matrix."""
    total = values.double().sum()
    if not total > 0:
        return 0.0
    p = values.double() / total
    return float(torch.special.entr(p).sum().exp())


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm (Rudelson & Vershynin 2007); 0 of a zero matrix."""
    if values.numel() == 0 or not values.max() > 0:
        return 0.0
    return float(values.double().square().sum() / values.double().max().square())


def frobenius(values: Tensor) -> float:
    """Frobenius norm, from the singular values."""
    return float(values.double().square().sum().sqrt())


def overlap(one_NK: Tensor, other_NK: Tensor) -> float:
    """Share of one subspace that lies in another, 0 to 1; both are given by orthonormal columns.

    |X^T Y|_F^2 over the smaller dimension (Hu et al. 2021, eq. 4).
    """
    least = min(one_NK.shape[1], other_NK.shape[1])
    return float((one_NK.t() @ other_NK).double().square().sum()) / least if least else 0.0


def amplification(update: Singular, weight_OI: Tensor) -> float:
    """How much an update is larger than what the weight has in the update's directions (Hu et al. 2021, section 7.3).

    |dW|_F / |U^T W V|_F, with the update's own singular vectors U and V; infinite where the weight has nothing there.
    """
    within = float((update.left.t() @ weight_OI.float() @ update.right).double().norm())
    size = frobenius(update.values)
    return size / within if within > 0 else float("inf") if size > 0 else 0.0


def intruders(tuned_OK: Tensor, base_ON: Tensor, *, epsilon: float) -> int:
    """Number of a tuned weight's top left singular vectors that are new (Shuttleworth et al. 2024, algorithm 1).

    One is an intruder where its cosine to every left singular vector of the base is below `epsilon` in magnitude.
    """
    if tuned_OK.shape[1] == 0:
        return 0
    return int(((tuned_OK.t() @ base_ON).abs().amax(1) < epsilon).sum())


def _gram(matrix: Tensor) -> Tensor:
    double = matrix.double()
    return double @ double.t() if matrix.shape[0] <= matrix.shape[1] else double.t() @ double
