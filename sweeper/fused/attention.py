"""Causal attention over rows of many lengths that lie one after another, without padding.

A row attends to the rows of its own sequence, from the first of it to itself; `starts` [N] says where each row's
sequence begins and `stops` [N] where it ends. Tiles are of rows, whatever sequences they hold: short ones share a tile.
Softmax in one pass, and the backward pass from the log-sum-exp, after Dao et al. 2022 (FlashAttention).

Queries, keys and values are the columns of one matrix, the heads side by side; several heads of queries may share one
of keys and values. They come turned by their positions, and their gradients go out turned back.

Shapes: N rows, Q query heads, K heads of keys and values, C channels of a head.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sweeper.lora.kernels import Tiles


@triton.jit
def _forward(
    qkv, starts, out, sums, rows, stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Weighted values [N, Q * C], and the log-sum-exp [Q, N] in powers of two."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    kv_head = head // (HEADS // KV_HEADS)
    c = tl.arange(0, HEAD)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    start = tl.load(starts + row, mask=inside, other=rows)
    at = row.to(tl.int64)[:, None] * stride + c[None, :]
    q = tl.load(qkv + at + head * HEAD, mask=inside[:, None], other=0.0)
    keys = qkv + (HEADS + kv_head) * HEAD
    values = keys + KV_HEADS * HEAD
    most = tl.full((ROWS,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    sought = tl.zeros((ROWS, HEAD), dtype=tl.float32)
    for first in range(tl.min(start) // COLS * COLS, tl.minimum((tile + 1) * ROWS, rows), COLS):
        col = first + tl.arange(0, COLS)
        there = col.to(tl.int64)[:, None] * stride + c[None, :]
        k = tl.load(keys + there, mask=col[:, None] < rows, other=0.0)
        seen = (col[None, :] <= row[:, None]) & (col[None, :] >= start[:, None])
        score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1.0e30)
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrunk = tl.exp2(most - higher)
        total = total * shrunk + tl.sum(weight, 1)
        v = tl.load(values + there, mask=col[:, None] < rows, other=0.0)
        sought = tl.dot(weight.to(v.dtype), v, sought * shrunk[:, None], input_precision="ieee")
        most = higher
    result = sought / total[:, None]
    where = row.to(tl.int64)[:, None] * (HEADS * HEAD) + head * HEAD + c[None, :]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(sums + head.to(tl.int64) * rows + row, most + tl.log2(total), mask=inside)


@triton.jit
def _turned_back(gradient, position, cosines, sines, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """A gradient [ROWS, C] turned against its rows' positions, as two halves."""
    half: tl.constexpr = HEAD // 2
    low = tl.arange(0, half)
    first, second = tl.split(tl.permute(tl.reshape(gradient, (ROWS, 2, half)), (0, 2, 1)))
    angle = position[:, None] * half + low[None, :]
    cosine = tl.load(cosines + angle).to(tl.float32)
    sine = tl.load(sines + angle).to(tl.float32)
    return first * cosine + second * sine, second * cosine - first * sine


@triton.jit
def _of_keys(
    qkv, starts, stops, dout, sums, products, dqkv, cosines, sines, rows, stride, scale, natural, tile, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one head."""
    c = tl.arange(0, HEAD)
    half: tl.constexpr = HEAD // 2
    group: tl.constexpr = HEADS // KV_HEADS
    own = tile * TILE + tl.arange(0, TILE)
    inside = own < rows
    at = own.to(tl.int64)[:, None] * stride + (HEADS + kv_head) * HEAD
    k = tl.load(qkv + at + c[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(qkv + at + KV_HEADS * HEAD + c[None, :], mask=inside[:, None], other=0.0)
    stop = tl.load(stops + own, mask=inside, other=0)
    last = tl.max(stop)
    dk = tl.zeros((TILE, HEAD), dtype=tl.float32)
    dv = tl.zeros((TILE, HEAD), dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        for first in range(tile * TILE, last, STEP):
            row = first + tl.arange(0, STEP)
            known = row < rows
            wide = row.to(tl.int64)[:, None]
            q = tl.load(qkv + wide * stride + head * HEAD + c[None, :], mask=known[:, None], other=0.0)
            upstream = tl.load(
                dout + wide * (HEADS * HEAD) + head * HEAD + c[None, :], mask=known[:, None], other=0.0
            )  # fmt: skip
            log = tl.load(sums + head.to(tl.int64) * rows + row, mask=known, other=0.0)
            product = tl.load(products + head.to(tl.int64) * rows + row, mask=known, other=0.0)
            seen = (own[:, None] <= row[None, :]) & (row[None, :] < stop[:, None])
            score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - log[None, :]
            weight = tl.where(seen, tl.exp2(score), 0.0)
            dv = tl.dot(weight.to(upstream.dtype), upstream, dv, input_precision="ieee")
            dweight = tl.dot(v, tl.trans(upstream), input_precision="ieee")
            dscore = weight * (dweight - product[None, :])
            dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="ieee")
    position = tl.where(inside, own - tl.load(starts + own, mask=inside, other=0), 0)
    lower, upper = _turned_back(dk * natural, position, cosines, sines, TILE, HEAD)
    low = tl.arange(0, half)
    tl.store(dqkv + at + low[None, :], lower.to(dqkv.dtype.element_ty), mask=inside[:, None])
    tl.store(dqkv + at + half + low[None, :], upper.to(dqkv.dtype.element_ty), mask=inside[:, None])
    tl.store(dqkv + at + KV_HEADS * HEAD + c[None, :], dv.to(dqkv.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _of_queries(
    qkv, starts, dout, sums, products, dqkv, cosines, sines, rows, stride, scale, natural, tile, head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries of one head."""
    c = tl.arange(0, HEAD)
    half: tl.constexpr = HEAD // 2
    own = tile * TILE + tl.arange(0, TILE)
    inside = own < rows
    start = tl.load(starts + own, mask=inside, other=rows)
    wide = own.to(tl.int64)[:, None]
    at = wide * stride + head * HEAD
    keys = (HEADS + head // (HEADS // KV_HEADS)) * HEAD
    q = tl.load(qkv + at + c[None, :], mask=inside[:, None], other=0.0)
    upstream = tl.load(dout + wide * (HEADS * HEAD) + head * HEAD + c[None, :], mask=inside[:, None], other=0.0)
    log = tl.load(sums + head.to(tl.int64) * rows + own, mask=inside, other=0.0)
    product = tl.load(products + head.to(tl.int64) * rows + own, mask=inside, other=0.0)
    dq = tl.zeros((TILE, HEAD), dtype=tl.float32)
    for first in range(tl.min(start) // STEP * STEP, tl.minimum((tile + 1) * TILE, rows), STEP):
        col = first + tl.arange(0, STEP)
        there = col.to(tl.int64)[:, None] * stride + keys + c[None, :]
        k = tl.load(qkv + there, mask=col[:, None] < rows, other=0.0)
        v = tl.load(qkv + there + KV_HEADS * HEAD, mask=col[:, None] < rows, other=0.0)
        seen = (col[None, :] <= own[:, None]) & (col[None, :] >= start[:, None])
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - log[:, None]
        weight = tl.where(seen, tl.exp2(score), 0.0)
        dweight = tl.dot(upstream, tl.trans(v), input_precision="ieee")
        dscore = weight * (dweight - product[:, None])
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision="ieee")
    position = tl.where(inside, own - start, 0)
    lower, upper = _turned_back(dq * natural, position, cosines, sines, TILE, HEAD)
    low = tl.arange(0, half)
    tl.store(dqkv + at + low[None, :], lower.to(dqkv.dtype.element_ty), mask=inside[:, None])
    tl.store(dqkv + at + half + low[None, :], upper.to(dqkv.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _backward(
    qkv, starts, stops, dout, sums, products, dqkv, cosines, sines, rows, stride, scale, natural,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and values, the first two turned back. One program a tile and head of either kind."""
    part = tl.program_id(1)
    if part < KV_HEADS:
        _of_keys(
            qkv, starts, stops, dout, sums, products, dqkv, cosines, sines, rows, stride, scale, natural,
            tl.program_id(0), part, HEADS, KV_HEADS, HEAD, TILE, STEP,
        )  # fmt: skip
    else:
        _of_queries(
            qkv, starts, dout, sums, products, dqkv, cosines, sines, rows, stride, scale, natural,
            tl.program_id(0), part - KV_HEADS, HEADS, KV_HEADS, HEAD, TILE, STEP,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, heads of keys and values, channels of one, and the factor on scores before the softmax."""

    queries: int
    keys: int
    channels: int
    scale: float


LOG2_E = 1.4426950408889634
# of up to 64 channels a head, and of more
FORWARD = Tiles(64, 64, 4), Tiles(64, 32, 4)
BACKWARD = Tiles(64, 64, 4), Tiles(64, 64, 4, 2)


def forward(qkv: Tensor, starts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Attention's output [N, Q * C] and the log-sum-exp [Q, N], in powers of two, of qkv [N, (Q + 2 K) * C]."""
    rows, tile = qkv.shape[0], FORWARD[heads.channels >= 128]
    out = qkv.new_empty(rows, heads.queries * heads.channels)
    sums = torch.empty(heads.queries, rows, dtype=torch.float32, device=qkv.device)
    _forward[(triton.cdiv(rows, tile.rows) * heads.queries,)](
        qkv, starts, out, sums, rows, qkv.stride(0), heads.scale * LOG2_E,
        HEADS=heads.queries, KV_HEADS=heads.keys, HEAD=heads.channels, ROWS=tile.rows, COLS=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, sums


def backward(
    qkv: Tensor, starts: Tensor, stops: Tensor, dout: Tensor, sums: Tensor, products: Tensor, cosines: Tensor,
    sines: Tensor, heads: Heads,
) -> Tensor:  # fmt: skip
    """Gradient [N, (Q + 2 K) * C] of the queries, keys and values before they were turned.

    Args:
        dout: [N, Q * C]. products: [Q, N], the sum over each head of dout * out. cosines, sines: [positions, C / 2].
    """
    rows, dqkv, tile = qkv.shape[0], torch.empty_like(qkv), BACKWARD[heads.channels >= 128]
    _backward[(triton.cdiv(rows, tile.rows), heads.keys + heads.queries)](
        qkv, starts, stops, dout, sums, products, dqkv, cosines, sines, rows, qkv.stride(0), heads.scale * LOG2_E,
        heads.scale, HEADS=heads.queries, KV_HEADS=heads.keys, HEAD=heads.channels, TILE=tile.rows, STEP=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dqkv
