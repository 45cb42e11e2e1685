"""Triton kernels of DoRA's norms and VeRA's factors on CUDA; the files of these forms define what they compute.

A pack of hundreds of modules would else launch a dozen small kernels for each, which take longer than the step itself.

Shapes: J slots, M members, X columns of a group's extra values, S segments, R ranks, I in, O out.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norms(
    weight, stride_in, stride_out, flat, table, scale, squares, on, norm, fan_in, width, column, columns, member,
    M: tl.constexpr, RANKS: tl.constexpr, INNER: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """norm[slot, outputs of a member] = |W + D| row by row, D = s B A: |W|^2 and what D adds, the sum of D (2 W + D)"""
    slot = tl.program_id(1)
    if tl.load(on + slot * columns + column) == 0:
        return
    entry = table + (slot * M + member) * 4
    rank = tl.load(entry)
    a = flat + tl.load(entry + 1)
    b = flat + tl.load(entry + 2)
    factor = tl.load(scale + slot * M + member)
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.load(squares + c, mask=c < width, other=0.0)
    for start in range(0, fan_in, INNER):
        k = start + tl.arange(0, INNER)
        added = tl.zeros((INNER, COLS), dtype=tl.float32)
        for first in range(0, rank, RANKS):
            r = first + tl.arange(0, RANKS)
            rows = tl.load(
                a + r[None, :] * fan_in + k[:, None], mask=(r[None, :] < rank) & (k[:, None] < fan_in), other=0.0
            )
            outputs = tl.load(
                b + r[:, None] * width + c[None, :], mask=(r[:, None] < rank) & (c[None, :] < width), other=0.0
            )
            added = tl.dot(rows, outputs, added, input_precision="ieee")
        added *= factor
        part = tl.load(
            weight + k[:, None] * stride_in + c[None, :] * stride_out,
            mask=(k[:, None] < fan_in) & (c[None, :] < width),
            other=0.0,
        )
        total += tl.sum(added * (2 * part.to(tl.float32) + added), 0)
    # a row that the adapter cancels must not be divided by
    total = tl.maximum(total, 1.1754943508222875e-38)
    tl.store(norm + slot * columns + column + c, tl.sqrt(total), mask=c < width)


def norms(
    weights: Sequence[Tensor], squares: Sequence[Tensor], columns: Sequence[int], on: Tensor, norm: Tensor,
    params: Tensor, table: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """Norms of the DoRAs of one group, for every slot that has one, into `norm` [J, X].

    Args:
        weights: [I, O] of each member. squares: [O] squared norms of its rows. columns: where its values begin in X.
        on: [J, X] bool. params: the values of the group. table: [J, M, 4]. scale: [J, M].
    """
    slots, members = scale.shape
    cols = 32  # narrow: one slot must fill a GPU
    for member, weight in enumerate(weights):
        fan_in, width = weight.shape
        _norms[(triton.cdiv(width, cols), slots)](
            weight, weight.stride(0), weight.stride(1), params, table, scale, squares[member], on.view(torch.int8),
            norm, fan_in, width, columns[member], norm.shape[1], member,
            M=members, RANKS=16, INNER=128, COLS=cols, num_warps=4,
        )  # fmt: skip


@triton.jit
def _derive(flat, work, shared_a, shared_b, on, segments, stride_a, stride_b, COPY: tl.constexpr, COLS: tl.constexpr):
    """One row of A or of B of one segment: the shared row times the factor of its rank, or those of its outputs."""
    if tl.load(on) == 0:
        return
    segment = segments + tl.program_id(0) * 6
    row = tl.program_id(1) // 2
    capacity = tl.load(segment + 5).to(tl.int32)
    if row >= capacity:
        return
    factors = flat + tl.load(segment + 2)
    if tl.program_id(1) % 2 == 0:
        width = tl.load(segment + 3).to(tl.int32)
        place = tl.load(segment) + row * width
        factor = tl.load(factors + row)
        for start in range(0, width, COLS):
            c = start + tl.arange(0, COLS)
            value = tl.load(shared_a + row * stride_a + c, mask=c < width, other=0.0) * factor
            tl.store(flat + place + c, value, mask=c < width)
            if COPY:
                tl.store(work + place + c, value.to(work.dtype.element_ty), mask=c < width)
    else:
        width = tl.load(segment + 4).to(tl.int32)
        place = tl.load(segment + 1) + row * width
        for start in range(0, width, COLS):
            c = start + tl.arange(0, COLS)
            value = tl.load(shared_b + row * stride_b + c, mask=c < width, other=0.0)
            value *= tl.load(factors + capacity + c, mask=c < width, other=0.0)
            tl.store(flat + place + c, value, mask=c < width)
            if COPY:
                tl.store(work + place + c, value.to(work.dtype.element_ty), mask=c < width)


@triton.jit
def _project_ranks(grads, shared_a, on, segments, stride_a, COLS: tl.constexpr):
    """Gradient of the factor of one rank of one segment; clears the row of A's gradient that it came from."""
    if tl.load(on) == 0:
        return
    segment = segments + tl.program_id(0) * 6
    row = tl.program_id(1)
    if row >= tl.load(segment + 5):
        return
    width = tl.load(segment + 3).to(tl.int32)
    place = tl.load(segment) + row * width
    total = tl.zeros((COLS,), dtype=tl.float32)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        gradient = tl.load(grads + place + c, mask=c < width, other=0.0)
        total += gradient * tl.load(shared_a + row * stride_a + c, mask=c < width, other=0.0)
    tl.debug_barrier()  # a value may be cleared by another thread than the one that read it
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        tl.store(grads + place + c, tl.zeros_like(total), mask=c < width)
    where = grads + tl.load(segment + 2) + row
    tl.store(where, tl.load(where) + tl.sum(total, 0))


@triton.jit
def _project_outputs(grads, shared_b, on, segments, stride_b, COLS: tl.constexpr):
    """Gradients of the factors of COLS outputs of one segment; clears those columns of B's gradient."""
    if tl.load(on) == 0:
        return
    segment = segments + tl.program_id(0) * 6
    capacity = tl.load(segment + 5).to(tl.int32)
    width = tl.load(segment + 4).to(tl.int32)
    first = tl.load(segment + 1)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), dtype=tl.float32)
    for row in range(capacity):
        gradient = tl.load(grads + first + row * width + c, mask=c < width, other=0.0)
        total += gradient * tl.load(shared_b + row * stride_b + c, mask=c < width, other=0.0)
    tl.debug_barrier()  # as above
    for row in range(capacity):
        tl.store(grads + first + row * width + c, tl.zeros_like(total), mask=c < width)
    where = grads + tl.load(segment + 2) + capacity + c
    tl.store(where, tl.load(where, mask=c < width, other=0.0) + total, mask=c < width)


def derive(params: Tensor, work: Tensor, a: Tensor, b: Tensor, on: Tensor, segments: Tensor) -> None:
    """A and B of every segment [S, 6] of a slot from the shared a [R, I], b [R, O] and the factors, in the flat store;
    nothing where `on` [] is false.
    """
    _derive[(segments.shape[0], 2 * a.shape[0])](
        params, work, a, b, on.view(torch.int8), segments, a.stride(0), b.stride(0), COPY=work is not params, COLS=256
    )


def project(grads: Tensor, a: Tensor, b: Tensor, on: Tensor, segments: Tensor) -> None:
    """Gradients of the factors from those of A and B, which are cleared."""
    on, cols = on.view(torch.int8), 256
    count, (ranks, _) = segments.shape[0], a.shape
    _project_ranks[(count, ranks)](grads, a, on, segments, a.stride(0), COLS=cols)
    outputs = triton.cdiv(b.shape[1], cols)
    _project_outputs[(count, outputs)](grads, b, on, segments, b.stride(0), COLS=cols)
