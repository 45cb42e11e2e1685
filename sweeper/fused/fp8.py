"""Frozen products in 8-bit floats (e4m3): a scale for each row of what goes in and for each output of a matrix.

The adapters, norms, attention and the loss keep their precision; so does what they read. A product is then off by a
few per cent, at random (Micikevicius et al. 2022 describe the format).

Shapes: N rows, I inputs, O outputs.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sweeper.fused import kernels

WORTHWHILE = 1024  # outputs of a product from which on making the codes of its input takes less than they spare


@dataclass(frozen=True, slots=True)
class Rows8:
    """Values [N, I] as `codes` times a scale [N, 1] for each row."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "Rows8":
        codes = torch.empty_like(like, dtype=torch.float8_e4m3fn)
        return cls(codes, torch.empty(like.shape[0], 1, dtype=torch.float32, device=like.device))

    @classmethod
    def of(cls, x: Tensor) -> "Rows8":
        found = cls.empty(x)
        rows, width = x.shape
        cols = min(4096, triton.next_power_of_2(width))
        own = max(1, min(8, 2048 // cols))
        kernels.quantise[(triton.cdiv(rows, own),)](
            x, found.codes, found.scales, rows, width, ROWS=own, COLS=cols, num_warps=8 if cols > 2048 else 4
        )
        return found


class Matrix8:
    """A frozen matrix [O, I] for products with it and with its transpose: each has scales along its own outputs."""

    def __init__(self, weight: Tensor) -> None:
        self.there, self.back = Rows8.of(weight.contiguous()), Rows8.of(weight.t().contiguous())

    def product(self, x: Rows8, dtype: torch.dtype) -> Tensor:
        """x W^T [N, O] of x [N, I]."""
        return _product(x, self.there, dtype)

    def product_back(self, dy: Rows8, dtype: torch.dtype) -> Tensor:
        """dy W [N, I] of dy [N, O]."""
        return _product(dy, self.back, dtype)


def _product(x: Rows8, matrix: Rows8, dtype: torch.dtype) -> Tensor:
    found: Tensor = torch._scaled_mm(
        x.codes, matrix.codes.t(), scale_a=x.scales, scale_b=matrix.scales.t(), out_dtype=dtype, use_fast_accum=True
    )
    return found
