"""Triton kernels of the grouped low-rank product on CUDA. `lowrank.py` defines what they compute.

Ranks, offsets and slots are read from tensors, so absent adapters cost one early return, and a graph captured once
serves whatever runs hold the slots. All three kernels walk tiles that never cross a lane.

Shapes: N rows, I in, O out, M members, J slots, L lanes, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sweeper.lora.blocks import gate, gate_gradient


@triton.jit
def _mix(value):
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def _keep(seed, salt, rows, features, p):
    # same bits as lowrank.keep_mask; rows [R], features [C], seed int64
    rows = rows.to(tl.uint32) + (seed >> 32).to(tl.uint32) * 65536
    row_key = _mix(rows ^ seed.to(tl.uint32))
    feature = features.to(tl.uint32) * 0x9E3779B1
    bits = _mix((row_key[:, None] ^ feature[None, :]) ^ salt.to(tl.uint32))
    return bits >= (p * 4294967296.0).to(tl.uint32)


@triton.jit
def _pick(member, first, second, third):
    chosen = first
    if member == 1:
        chosen = second
    if member == 2:
        chosen = third
    return chosen


@triton.jit
def _shrink(
    z0, z1, z2, width0, width1, width2, stride0, stride1, stride2, flat, table, scale, lanes, dropout, seeds, salts, h,
    share, tokens, h_stride,
    M: tl.constexpr, B_SIDE: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """h[rows of a lane, member] = scale * z[rows] @ (A or B of the slot and member)^T."""
    tiles = tl.cdiv(share, ROWS)
    member = tl.program_id(0) % M  # members that read the same rows run side by side
    tile = tl.program_id(0) // M
    lane = tile // tiles
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    entry = table + (slot * M + member) * 4
    rank = tl.load(entry)
    first = tl.program_id(1) * RANKS
    if first >= rank:
        return
    if B_SIDE:
        z = _pick(member, z0, z1, z2)
        width = _pick(member, width0, width1, width2)
        stride = _pick(member, stride0, stride1, stride2)
        offset = tl.multiple_of(tl.load(entry + 2), 16)
    else:
        z = z0
        width = width0
        stride = stride0
        offset = tl.multiple_of(tl.load(entry + 1), 16)
    local = tile % tiles * ROWS + tl.arange(0, ROWS)
    inside = local < share
    row = lane.to(tl.int64) * share + local
    r = first + tl.arange(0, RANKS)
    if DROP:
        p = tl.load(dropout + slot)
        seed = tl.load(seeds + slot)
        salt = tl.load(salts + member)
        index = local // tokens * 65536 + local % tokens
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        values = tl.load(z + row[:, None] * stride + c[None, :], mask=inside[:, None] & (c[None, :] < width), other=0.0)
        if DROP:
            if p > 0:
                values = tl.where(_keep(seed, salt, index, c, p), values, 0.0)
        matrix = tl.load(
            flat + offset + r[:, None] * width + c[None, :], mask=(r[:, None] < rank) & (c[None, :] < width), other=0.0
        )
        total = tl.dot(values, tl.trans(matrix.to(values.dtype)), total, input_precision="ieee")
    factor = tl.load(scale + slot * M + member)
    if DROP:
        factor = factor / (1 - p)
    where = tl.multiple_of(tl.load(entry + 3), 16)
    tl.store(
        h + row[:, None] * h_stride + where + r[None, :],
        (total * factor).to(h.dtype.element_ty),
        mask=inside[:, None] & (r[None, :] < rank),
    )


@triton.jit
def _shrink_shared(
    x, width, flat, table, scale, lanes, h, share, h_stride,
    M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """h[rows of a lane, every member] = scale * x[rows] @ (A of the slot and member)^T, ALL columns in one."""
    tiles = tl.cdiv(share, ROWS)
    lane = tl.program_id(0) // tiles
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    column = tl.arange(0, ALL)
    member = column // RANKS
    r = column % RANKS
    known = member < M
    entry = table + (slot * M + member) * 4
    adapted = known & (r < tl.load(entry, mask=known, other=0))
    if tl.max(adapted.to(tl.int32), 0) == 0:
        return
    offset = tl.multiple_of(tl.load(entry + 1, mask=known, other=0), 16)
    local = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = local < share
    row = lane.to(tl.int64) * share + local
    total = tl.zeros((ROWS, ALL), dtype=tl.float32)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        values = tl.load(x + row[:, None] * width + c[None, :], mask=inside[:, None] & (c[None, :] < width), other=0.0)
        matrix = tl.load(
            flat + (offset + r * width)[:, None] + c[None, :], mask=adapted[:, None] & (c[None, :] < width), other=0.0
        )
        total = tl.dot(values, tl.trans(matrix.to(values.dtype)), total, input_precision="ieee")
    factor = tl.load(scale + slot * M + member, mask=known, other=0.0)
    where = tl.load(entry + 3, mask=known, other=0) + r
    tl.store(
        h + row[:, None] * h_stride + where[None, :],
        (total * factor[None, :]).to(h.dtype.element_ty),
        mask=inside[:, None] & adapted[None, :],
    )


@triton.jit
def _expand(
    h, flat, table, lanes, dropout, seeds, salts, y0, y1, y2, width0, width1, width2, stride0, stride1, stride2,
    share, tokens, h_stride,
    M: tl.constexpr, B_SIDE: tl.constexpr, DROP: tl.constexpr, HOIST: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y of each member += h @ B (B_SIDE), or y0 += the sum over members of mask * (h @ A)."""
    tiles = tl.cdiv(share, ROWS * SPAN)
    lane = tl.program_id(0) // tiles
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    if B_SIDE:
        first_member = tl.program_id(2)
        last_member = first_member + 1
        y = _pick(first_member, y0, y1, y2)
        width = _pick(first_member, width0, width1, width2)
        stride = _pick(first_member, stride0, stride1, stride2)
    else:
        first_member = 0
        last_member = M
        y = y0
        width = width0
        stride = stride0
    if tl.program_id(1) * COLS >= width:
        return
    adapted = 0
    for member in range(first_member, last_member):
        adapted += tl.load(table + (slot * M + member) * 4)
    if adapted == 0:
        return
    if HOIST:  # one member and one tile of ranks: its matrix is read once for SPAN tiles of rows
        entry = table + (slot * M + first_member) * 4
        rank = tl.load(entry)
        if B_SIDE:
            offset = tl.multiple_of(tl.load(entry + 2), 16)
        else:
            offset = tl.multiple_of(tl.load(entry + 1), 16)
        where = tl.multiple_of(tl.load(entry + 3), 16)
        r = tl.arange(0, RANKS)
        c = tl.program_id(1) * COLS + tl.arange(0, COLS)
        matrix = tl.load(
            flat + offset + r[:, None] * width + c[None, :], mask=(r[:, None] < rank) & (c[None, :] < width), other=0.0
        ).to(h.dtype.element_ty)
        for tile in tl.range(0, SPAN, num_stages=3):
            local = (tl.program_id(0) % tiles * SPAN + tile) * ROWS + tl.arange(0, ROWS)
            inside = local < share
            row = lane.to(tl.int64) * share + local
            hidden = tl.load(
                h + row[:, None] * h_stride + where + r[None, :], mask=inside[:, None] & (r[None, :] < rank), other=0.0
            )
            pointer = y + row[:, None] * stride + c[None, :]
            mask = inside[:, None] & (c[None, :] < width)
            total = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
            total = tl.dot(hidden, matrix, total, input_precision="ieee")
            tl.store(pointer, total.to(y.dtype.element_ty), mask=mask)
    else:
        local = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
        inside = local < share
        row = lane.to(tl.int64) * share + local
        c = tl.program_id(1) * COLS + tl.arange(0, COLS)
        pointer = y + row[:, None] * stride + c[None, :]
        mask = inside[:, None] & (c[None, :] < width)
        total = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        for member in range(first_member, last_member):
            entry = table + (slot * M + member) * 4
            rank = tl.load(entry)
            if B_SIDE:
                offset = tl.multiple_of(tl.load(entry + 2), 16)
            else:
                offset = tl.multiple_of(tl.load(entry + 1), 16)
            where = tl.multiple_of(tl.load(entry + 3), 16)
            if DROP:
                part = tl.zeros((ROWS, COLS), dtype=tl.float32)
            else:
                part = total
            for first in range(0, rank, RANKS):
                r = first + tl.arange(0, RANKS)
                hidden = tl.load(
                    h + row[:, None] * h_stride + where + r[None, :],
                    mask=inside[:, None] & (r[None, :] < rank),
                    other=0.0,
                )
                matrix = tl.load(
                    flat + offset + r[:, None] * width + c[None, :],
                    mask=(r[:, None] < rank) & (c[None, :] < width),
                    other=0.0,
                )
                part = tl.dot(hidden, matrix.to(hidden.dtype), part, input_precision="ieee")
            if DROP:
                p = tl.load(dropout + slot)
                if p > 0:
                    index = local // tokens * 65536 + local % tokens
                    keep = _keep(tl.load(seeds + slot), tl.load(salts + member), index, c, p)
                    part = tl.where(keep, part / (1 - p), 0.0)
                total += part
            else:
                total = part
        tl.store(pointer, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    h, dh, x, z0, z1, z2, fan_in, width0, width1, width2, stride0, stride1, stride2, dflat, table, lanes,
    dropout, seeds, salts, share, tokens, h_stride,
    M: tl.constexpr, DROP: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gradients of one slot and member, over the rows of its lane: h^T @ dy for B, or dh^T @ (mask * x) for A.

    ADD: added to what is there; else in its place.
    """
    b_side = tl.program_id(1) % 2 == 0
    lane = tl.program_id(1) // 2 // M
    member = tl.program_id(1) // 2 % M
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    entry = table + (slot * M + member) * 4
    rank = tl.load(entry)
    first = tl.program_id(2) * RANKS
    if first >= rank:
        return
    z = x
    width = fan_in
    stride = fan_in
    hidden_rows = dh
    place = entry + 1
    if b_side:
        z = _pick(member, z0, z1, z2)
        width = _pick(member, width0, width1, width2)
        stride = _pick(member, stride0, stride1, stride2)
        hidden_rows = h
        place = entry + 2
    if tl.program_id(0) * COLS >= width:
        return
    offset = tl.multiple_of(tl.load(place), 16)
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    where = tl.multiple_of(tl.load(entry + 3), 16)
    r = first + tl.arange(0, RANKS)
    p = 0.0
    if DROP:
        if not b_side:
            p = tl.load(dropout + slot)
        seed = tl.load(seeds + slot)
        salt = tl.load(salts + member)
    total = tl.zeros((RANKS, COLS), dtype=tl.float32)
    for start in range(0, share, ROWS):
        local = start + tl.arange(0, ROWS)
        row = lane.to(tl.int64) * share + local
        hidden = tl.load(
            hidden_rows + row[:, None] * h_stride + where + r[None, :],
            mask=(local[:, None] < share) & (r[None, :] < rank),
            other=0.0,
        )
        values = tl.load(
            z + row[:, None] * stride + c[None, :], mask=(local[:, None] < share) & (c[None, :] < width), other=0.0
        )
        if DROP:
            if p > 0:
                values = tl.where(_keep(seed, salt, local // tokens * 65536 + local % tokens, c, p), values, 0.0)
        total = tl.dot(tl.trans(hidden), values, total, input_precision="ieee")
    if DROP:
        total = total / (1 - p)
    place = dflat + offset + r[:, None] * width + c[None, :]
    mask = (r[:, None] < rank) & (c[None, :] < width)
    if ADD:
        total += tl.load(place, mask=mask, other=0.0)
    tl.store(place, total.to(dflat.dtype.element_ty), mask=mask)


@triton.jit
def _squares(grads, rates, squares, blocks, RATED: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Every block's sum of squares."""
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = block < blocks
    where = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(grads + where, mask=inside[:, None], other=0.0)
    if RATED:
        values = tl.where(tl.load(rates + where, mask=inside[:, None], other=0.0) > 0, values, 0.0)
    tl.store(squares + block, tl.sum(values * values, 1), mask=inside)


@triton.jit
def _add_up(squares, order, bounds, sums, SHARES: tl.constexpr, COUNT: tl.constexpr):
    """One share of one slot's squares. In an order of their own: atomic sums differ from run to run in their last bits,
    and what is clipped by them soon in every bit."""
    slot = tl.program_id(0)
    first = tl.load(bounds + slot)
    last = tl.load(bounds + slot + 1)
    size = tl.cdiv(last - first, SHARES)
    start = first + tl.program_id(1) * size
    stop = tl.minimum(start + size, last)
    total = tl.zeros((COUNT,), dtype=tl.float32)
    for place in range(start, stop, COUNT):
        i = place + tl.arange(0, COUNT)
        block = tl.load(order + i, mask=i < stop, other=0)
        total += tl.load(squares + block, mask=i < stop, other=0.0)
    tl.store(sums + slot * SHARES + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def _adamw(
    flat, work, grads, exp_avg, exp_avg_sq, rates, block_slot, table, norms, blocks,
    COPY: tl.constexpr, RATED: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """AdamW of every block with its slot's row of the table; zeroes the gradient. `norms` holds squared norms."""
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = block < blocks
    slot = tl.load(block_slot + block, mask=inside, other=0)
    row = table + slot * 8
    lr = tl.load(row)
    decay = tl.load(row + 1)
    beta1 = tl.load(row + 2)
    beta2 = tl.load(row + 3)
    eps = tl.load(row + 4)
    correction1 = tl.load(row + 5)
    correction2 = tl.load(row + 6)
    norm = tl.sqrt(tl.load(norms + slot))
    clip = tl.minimum(tl.load(row + 7) / (norm + 1e-6), 1.0)
    live = (norm < float("inf")) & (lr == lr) & inside
    where = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (tl.arange(0, BLOCK)[None, :] < BLOCK)
    gradient = tl.load(grads + where, mask=mask, other=0.0) * clip[:, None]
    value = tl.load(flat + where, mask=mask, other=0.0)
    rate = lr[:, None]
    if RATED:
        share = tl.load(rates + where, mask=mask, other=0.0)
        gradient = tl.where(share > 0, gradient, 0.0)
        rate = rate * share
    first = tl.load(exp_avg + where, mask=mask, other=0.0)
    second = tl.load(exp_avg_sq + where, mask=mask, other=0.0)
    first = first + (gradient - first) * (1 - beta1)[:, None]
    second = second * beta2[:, None] + gradient * gradient * (1 - beta2)[:, None]
    step = first / correction1[:, None] / (tl.sqrt(second) / correction2[:, None] + eps[:, None])
    value = value * (1 - rate * decay[:, None]) - rate * step
    tl.store(flat + where, value, mask=mask)
    if COPY:
        tl.store(work + where, value.to(work.dtype.element_ty), mask=mask)
    tl.store(exp_avg + where, first, mask=mask)
    tl.store(exp_avg_sq + where, second, mask=mask)
    tl.store(grads + where, tl.zeros_like(value), mask=inside[:, None] & (tl.arange(0, BLOCK)[None, :] < BLOCK))


class Squares:
    """Sums of squares by slot, the same bits whenever they are of the same gradients.

    Shapes: P blocks, J slots, S shares of a slot.
    """

    SHARES = 256

    def __init__(self, block_slot: Tensor, slots: int) -> None:
        device = block_slot.device
        ordered, order_P = torch.sort(block_slot, stable=True)
        self.order_P = order_P.int()
        self.bounds_J1 = torch.searchsorted(ordered, torch.arange(slots + 1, device=device)).int()
        self.squares_P = torch.empty(len(block_slot), device=device)
        self.sums_JS = torch.empty(slots, self.SHARES, device=device)

    def add_up(self, grads: Tensor, rates: Tensor | None, out: Tensor) -> None:
        """Sums [J] into `out`; of the values that have a rate above 0, where there are rates."""
        blocks, count = len(self.squares_P), 32
        block = grads.shape[0] // max(blocks, 1)
        _squares[(triton.cdiv(blocks, count),)](
            grads, grads if rates is None else rates, self.squares_P, blocks,
            RATED=rates is not None, BLOCK=block, COUNT=count,
        )  # fmt: skip
        _add_up[tuple(self.sums_JS.shape)](
            self.squares_P, self.order_P, self.bounds_J1, self.sums_JS, SHARES=self.SHARES, COUNT=512
        )
        torch.sum(self.sums_JS, 1, out=out)


def adamw(flat, work, grads, exp_avg, exp_avg_sq, rates, block_slot, table, norms, squares: Squares) -> None:
    """CUDA implementation of `optimizer.PackedAdamW.step`; leaves the gradient norms [J] in `norms`.

    Without `rates` every value learns at its run's own rate.
    """
    squares.add_up(grads, rates, norms)
    rated = rates is not None
    rates = rates if rated else flat
    blocks, count = block_slot.shape[0], 32
    block = grads.shape[0] // max(blocks, 1)
    _adamw[(triton.cdiv(blocks, count),)](
        flat, work, grads, exp_avg, exp_avg_sq, rates, block_slot, table, norms, blocks,
        COPY=work is not flat, RATED=rated, BLOCK=block, COUNT=count,
    )  # fmt: skip
    norms.sqrt_()


@triton.jit
def _accumulate_sensitivity(flat, grads, found, block_slot, memory, blocks, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """found = memory * found + (1 - memory) * |value * gradient| in every block of a slot whose memory is no NaN."""
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    slot = tl.load(block_slot + block, mask=block < blocks, other=0)
    kept = tl.load(memory + slot)
    live = (kept == kept) & (block < blocks)
    where = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (tl.arange(0, BLOCK)[None, :] < BLOCK)
    gradient = tl.load(grads + where, mask=mask, other=0.0)
    now = tl.abs(tl.load(flat + where, mask=mask, other=0.0) * gradient)
    now = tl.where(tl.abs(gradient) < float("inf"), now, 0.0)
    before = tl.load(found + where, mask=mask, other=0.0)
    tl.store(found + where, before + (now - before) * (1 - kept)[:, None], mask=mask)


def accumulate_sensitivity(flat: Tensor, grads: Tensor, found: Tensor, block_slot: Tensor, memory: Tensor) -> None:
    """CUDA implementation of `sparse.accumulate_sensitivity`; `memory` [J] is NaN for a slot that learns no pattern."""
    blocks, count = block_slot.shape[0], 32
    block = grads.shape[0] // max(blocks, 1)
    _accumulate_sensitivity[(triton.cdiv(blocks, count),)](
        flat, grads, found, block_slot, memory, blocks, BLOCK=block, COUNT=count
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes and warps of one kernel; what was fastest on an H200 (docs/performance.md)."""

    rows: int
    cols: int
    warps: int
    stages: int = 3


SPAN = 4  # tiles of rows for which `_expand` keeps its matrix
SHRINK, SHARED = Tiles(32, 128, 4), Tiles(64, 64, 4)
EXPAND, OUTER = Tiles(64, 128, 4, 2), Tiles(128, 64, 4, 2)


def _launch(kernel, tiles: Tiles, grid, *arguments, **constants) -> None:
    kernel[grid](
        *arguments, ROWS=tiles.rows, COLS=tiles.cols, num_warps=tiles.warps, num_stages=tiles.stages, **constants
    )


def _three(values: Sequence[Any]) -> tuple[Any, ...]:
    """Of one to three members three, the last repeated: kernels take as many arguments whatever there is."""
    return tuple(values[min(i, len(values) - 1)] for i in range(3))


def _matrices(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Three matrices with their widths and the strides of their rows: they may be columns of one that is wider."""
    return *_three(tensors), *_three([one.shape[1] for one in tensors]), *_three([one.stride(0) for one in tensors])


@dataclass(frozen=True, slots=True)
class Adapters:
    """A group's adapters as the kernels read them; `lowrank.adapted_linear` says what each is.

    Attributes:
        hidden: H. share: rows of a lane. tokens: padded length of a sequence, for dropout.
    """

    work: Tensor
    table: Tensor
    scale: Tensor
    lanes: Tensor
    dropout: Tensor
    seeds: Tensor
    salts: Tensor
    hidden: int
    share: int
    tokens: int

    @property
    def members(self) -> int:
        return self.table.shape[1]

    @property
    def count(self) -> int:
        """Lanes."""
        return self.lanes.shape[0]

    @property
    def ranks(self) -> int:
        """Ranks of a tile."""
        widest = self.hidden // self.members
        return 16 if widest <= 16 else 32 if widest <= 32 else 64

    @property
    def chunks(self) -> int:
        """Tiles of ranks."""
        return triton.cdiv(self.hidden // self.members, self.ranks)

    @property
    def chance(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dropout, self.seeds, self.salts


def shrink(x: Tensor, own: Adapters, *, drop: bool = False) -> Tensor:
    """Scaled hidden s (mask * x) A^T [N, H] of x [N, I]; what no adapter has is left as memory was."""
    h = x.new_empty(x.shape[0], own.hidden)
    together = triton.next_power_of_2(own.members * own.ranks)
    if own.members > 1 and own.chunks == 1 and together <= 64 and not drop:
        _launch(
            _shrink_shared, SHARED, (own.count * triton.cdiv(own.share, SHARED.rows),),
            x, x.shape[1], own.work, own.table, own.scale, own.lanes, h, own.share, own.hidden,
            M=own.members, RANKS=own.ranks, ALL=together,
        )  # fmt: skip
    else:
        _shrink_into(h, [x], own, b_side=False, drop=drop)
    return h


def shrink_back(dys: Sequence[Tensor], own: Adapters) -> Tensor:
    """Scaled s dy B^T [N, H] of the gradients [N, O] of each member."""
    dh = dys[0].new_empty(dys[0].shape[0], own.hidden)
    _shrink_into(dh, dys, own, b_side=True, drop=False)
    return dh


def _shrink_into(h: Tensor, zs: Sequence[Tensor], own: Adapters, *, b_side: bool, drop: bool) -> None:
    _launch(
        _shrink, SHRINK, (own.members * own.count * triton.cdiv(own.share, SHRINK.rows), own.chunks),
        *_matrices(zs), own.work, own.table, own.scale, own.lanes, *own.chance, h, own.share, own.tokens, own.hidden,
        M=own.members, B_SIDE=b_side, DROP=drop, RANKS=own.ranks,
    )  # fmt: skip


def expand(h: Tensor, ys: Sequence[Tensor], own: Adapters) -> None:
    """Adds h B to the outputs [N, O] of each member, in place."""
    _expand_into(h, ys, own, b_side=True, hoist=own.chunks == 1, drop=False)


def expand_back(dh: Tensor, dx: Tensor, own: Adapters, *, drop: bool = False) -> None:
    """Adds the sum over members of mask * (dh A) to dx [N, I], in place."""
    hoist = own.chunks == 1 and own.members == 1 and not drop
    _expand_into(dh, [dx], own, b_side=False, hoist=hoist, drop=drop)


def _expand_into(h: Tensor, ys: Sequence[Tensor], own: Adapters, *, b_side: bool, hoist: bool, drop: bool) -> None:
    span = SPAN if hoist else 1
    rows, cols = own.count * triton.cdiv(own.share, EXPAND.rows * span), max(y.shape[1] for y in ys)
    _launch(
        _expand, EXPAND, (rows, triton.cdiv(cols, EXPAND.cols), own.members if b_side else 1),
        h, own.work, own.table, own.lanes, *own.chance, *_matrices(ys), own.share, own.tokens, own.hidden,
        M=own.members, B_SIDE=b_side, DROP=drop, HOIST=hoist, SPAN=span, RANKS=own.ranks,
    )  # fmt: skip


def outer(
    h: Tensor, dh: Tensor, x: Tensor, dys: Sequence[Tensor], gradient: Tensor, own: Adapters, *, drop: bool = False,
    add: bool = False,
) -> None:  # fmt: skip
    """Gradients of A and B into `gradient` [F] float32, in place of what is there or added to it."""
    widest = max(x.shape[1], *(dy.shape[1] for dy in dys))
    _launch(
        _outer, OUTER, (triton.cdiv(widest, OUTER.cols), 2 * own.count * own.members, own.chunks),
        h, dh, x, *_three(dys), x.shape[1], *_matrices(dys)[3:], gradient, own.table, own.lanes, *own.chance,
        own.share, own.tokens, own.hidden, M=own.members, DROP=drop, ADD=add, RANKS=own.ranks,
    )  # fmt: skip


def forward(x, ys, work, table, scale, lanes, dropout, seeds, salts, gates, gate_rows, hidden, tokens, drop):
    """Adds every lane's low-rank product to the frozen products `ys` in place; returns the scaled hidden [N, H]."""
    x = x.contiguous()
    own = Adapters(work, table, scale, lanes, dropout, seeds, salts, hidden, x.shape[0] // lanes.shape[0], tokens)
    h = shrink(x, own, drop=drop)
    gate(h, gates, gate_rows)
    expand(h, ys, own)
    return h


def backward(
    dys, x, dx, work, dparams, dgates, h, table, scale, lanes, dropout, seeds, salts, gates, gate_rows, tokens, drop
) -> None:
    """Adds the adapters' share to `dx` in place; fills `dparams`, which must be zero, and `dgates`."""
    x, dys = x.contiguous(), [dy.contiguous() for dy in dys]
    share = x.shape[0] // lanes.shape[0]
    own = Adapters(work, table, scale, lanes, dropout, seeds, salts, h.shape[1], share, tokens)
    dh = shrink_back(dys, own)
    if gates is not None and gate_rows is None:
        dgates.copy_(gate_gradient(h, dh, gates, scale, lanes))
    gate(dh, gates, gate_rows)
    outer(h, dh, x, dys, dparams, own, drop=drop)
    expand_back(dh, dx, own, drop=drop)
