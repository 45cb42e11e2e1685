"""Triton kernels of the grouped low-rank product on CUDA. `lowrank.py` defines what they compute.

Ranks, offsets and slots are read from tensors, so absent adapters cost one early return, and a graph captured once
serves whatever runs hold the slots. All three kernels walk tiles that never cross a lane.

Shapes: N rows, I in, O out, M members, J slots, L lanes, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 64


@triton.jit
def _mix(value):
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def _keep(seed, salt, rows, features, p):
    # same bits as lowrank.keep_mask; rows [R], features [C]
    row_key = _mix(rows.to(tl.uint32) ^ seed.to(tl.uint32))
    feature = features.to(tl.uint32) * 0x9E3779B1
    bits = _mix((row_key[:, None] ^ feature[None, :]) ^ salt.to(tl.uint32))
    return bits >= (p * 4294967296.0).to(tl.uint32)


@triton.jit
def _shrink(
    z, params, table, scale, lanes, dropout, seeds, salts, starts, h,
    share, tokens, z_stride, h_stride, width_all,
    M: tl.constexpr, B_SIDE: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """h[rows of a lane, member] = scale * z[rows, columns of the member] @ (A or B of the slot)^T."""
    tiles = tl.cdiv(share, ROWS)
    lane = tl.program_id(0) // tiles
    member = tl.program_id(1)
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    entry = table + (slot * M + member) * 4
    rank = tl.load(entry)
    first = tl.program_id(2) * RANKS
    if first >= rank:
        return
    local = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = local < share
    row = lane.to(tl.int64) * share + local
    r = first + tl.arange(0, RANKS)
    if B_SIDE:
        column = tl.load(starts + member)
        width = tl.load(starts + member + 1) - column
        offset = tl.load(entry + 2)
    else:
        column = 0
        width = width_all
        offset = tl.load(entry + 1)
    if DROP:
        p = tl.load(dropout + slot)
        seed = tl.load(seeds + slot)
        salt = tl.load(salts + member)
        index = local // tokens * 65536 + local % tokens
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        values = tl.load(
            z + row[:, None] * z_stride + column + c[None, :], mask=inside[:, None] & (c[None, :] < width), other=0.0
        )
        if DROP:
            if p > 0:
                values = tl.where(_keep(seed, salt, index, c, p), values, 0.0)
        matrix = tl.load(
            params + offset + r[None, :] * width + c[:, None], mask=(r[None, :] < rank) & (c[:, None] < width), other=0.0
        )
        total = tl.dot(values, matrix.to(values.dtype), total, input_precision="ieee")
    factor = tl.load(scale + slot * M + member)
    if DROP:
        factor = factor / (1 - p)
    where = tl.load(entry + 3)
    tl.store(
        h + row[:, None] * h_stride + where + r[None, :],
        (total * factor).to(h.dtype.element_ty),
        mask=inside[:, None] & (r[None, :] < rank),
    )


@triton.jit
def _expand(
    h, params, table, lanes, dropout, seeds, salts, starts, out,
    share, tokens, h_stride, out_stride, width_all,
    M: tl.constexpr, B_SIDE: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """out[rows of a lane] += h @ B, a member's columns each (B_SIDE), or += the sum over members of mask * (h @ A)."""
    tiles = tl.cdiv(share, ROWS)
    lane = tl.program_id(0) // tiles
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    local = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = local < share
    row = lane.to(tl.int64) * share + local
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if B_SIDE:
        first_member = tl.program_id(2)
        last_member = first_member + 1
        column = tl.load(starts + first_member)
        width = tl.load(starts + first_member + 1) - column
    else:
        first_member = 0
        last_member = M
        column = 0
        width = width_all
    if tl.program_id(1) * COLS >= width:
        return
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    adapted = 0
    for member in range(first_member, last_member):
        entry = table + (slot * M + member) * 4
        rank = tl.load(entry)
        adapted += rank
        if B_SIDE:
            offset = tl.load(entry + 2)
        else:
            offset = tl.load(entry + 1)
        where = tl.load(entry + 3)
        part = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for first in range(0, rank, RANKS):
            r = first + tl.arange(0, RANKS)
            hidden = tl.load(
                h + row[:, None] * h_stride + where + r[None, :], mask=inside[:, None] & (r[None, :] < rank), other=0.0
            )
            matrix = tl.load(
                params + offset + r[:, None] * width + c[None, :],
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
    if adapted == 0:
        return
    pointer = out + row[:, None] * out_stride + column + c[None, :]
    mask = inside[:, None] & (c[None, :] < width)
    tl.store(pointer, (tl.load(pointer, mask=mask, other=0.0).to(tl.float32) + total).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    h, z, dparams, table, lanes, dropout, seeds, salts, starts,
    share, tokens, h_stride, z_stride, width_all,
    M: tl.constexpr, B_SIDE: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gradient of A or B of one slot and member: h^T @ z over the rows of the slot's lane."""
    chunks = tl.cdiv(width_all, COLS)
    lane = tl.program_id(0) // chunks
    member = tl.program_id(1)
    slot = tl.load(lanes + lane)
    if slot < 0:
        return
    entry = table + (slot * M + member) * 4
    rank = tl.load(entry)
    first = tl.program_id(2) * RANKS
    if first >= rank:
        return
    if B_SIDE:
        column = tl.load(starts + member)
        width = tl.load(starts + member + 1) - column
        offset = tl.load(entry + 2)
    else:
        column = 0
        width = width_all
        offset = tl.load(entry + 1)
    c = tl.program_id(0) % chunks * COLS + tl.arange(0, COLS)
    if tl.program_id(0) % chunks * COLS >= width:
        return
    where = tl.load(entry + 3)
    r = first + tl.arange(0, RANKS)
    if DROP:
        p = tl.load(dropout + slot)
        seed = tl.load(seeds + slot)
        salt = tl.load(salts + member)
    total = tl.zeros((RANKS, COLS), dtype=tl.float32)
    for start in range(0, share, ROWS):
        local = start + tl.arange(0, ROWS)
        row = lane.to(tl.int64) * share + local
        hidden = tl.load(
            h + row[None, :] * h_stride + where + r[:, None],
            mask=(local[None, :] < share) & (r[:, None] < rank),
            other=0.0,
        )
        values = tl.load(
            z + row[:, None] * z_stride + column + c[None, :],
            mask=(local[:, None] < share) & (c[None, :] < width),
            other=0.0,
        )
        if DROP:
            if p > 0:
                values = tl.where(_keep(seed, salt, local // tokens * 65536 + local % tokens, c, p), values, 0.0)
        total = tl.dot(hidden, values, total, input_precision="ieee")
    if DROP:
        total = total / (1 - p)
    tl.store(
        dparams + offset + r[:, None] * width + c[None, :],
        total.to(dparams.dtype.element_ty),
        mask=(r[:, None] < rank) & (c[None, :] < width),
    )


@triton.jit
def _token_loss(
    logits, targets, weights, nll, correct, width, stride, softcap,
    CAP: tl.constexpr, GRAD: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Per row: NLL of the target and whether it is the argmax; overwrites the logits by weight * d NLL / d logits."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    target = tl.load(targets + row)
    high = -float("inf")
    total = 0.0
    best = -1
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        value = tl.load(base + c, mask=c < width, other=-float("inf")).to(tl.float32)
        if CAP:
            value = softcap * (2 / (1 + tl.exp(-2 * value / softcap)) - 1)
            value = tl.where(c < width, value, -float("inf"))
        peak = tl.max(value, 0)
        if peak > high:
            best = start + tl.argmax(value, 0)
        top = tl.maximum(high, peak)
        total = total * tl.exp(high - top) + tl.sum(tl.exp(value - top), 0)
        high = top
    log_total = high + tl.log(total)
    chosen = tl.load(base + target).to(tl.float32)
    if CAP:
        chosen = softcap * (2 / (1 + tl.exp(-2 * chosen / softcap)) - 1)
    tl.store(nll + row, log_total - chosen)
    tl.store(correct + row, (best == target).to(tl.int8))
    if GRAD:
        weight = tl.load(weights + row)
        for start in range(0, width, COLS):
            c = start + tl.arange(0, COLS)
            raw = tl.load(base + c, mask=c < width, other=0.0).to(tl.float32)
            slope = 1.0
            if CAP:
                squashed = 2 / (1 + tl.exp(-2 * raw / softcap)) - 1
                slope = 1 - squashed * squashed
                raw = softcap * squashed
            gradient = (tl.exp(raw - log_total) - (c == target).to(tl.float32)) * weight * slope
            # a row of weight 0 is padding and must stay 0 even where its logits overflow
            gradient = tl.where(weight == 0, 0.0, gradient)
            tl.store(base + c, gradient.to(logits.dtype.element_ty), mask=c < width)


@triton.jit
def _squares(grads, block_slot, norms, blocks, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Adds every block's sum of squares to its slot: one atomic where all blocks of a program are of one slot."""
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = block < blocks
    values = tl.load(
        grads + block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :], mask=inside[:, None], other=0.0
    )
    squares = tl.sum(values * values, 1)
    first = tl.load(block_slot + tl.program_id(0) * COUNT)
    slot = tl.load(block_slot + block, mask=inside, other=0)
    slot = tl.where(inside, slot, first)
    if tl.max(slot, 0) == tl.min(slot, 0):
        tl.atomic_add(norms + first, tl.sum(squares, 0))
    else:
        tl.atomic_add(norms + slot, squares, mask=inside)


@triton.jit
def _adamw(params, grads, exp_avg, exp_avg_sq, block_slot, table, norms, blocks, BLOCK: tl.constexpr, COUNT: tl.constexpr):
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
    value = tl.load(params + where, mask=mask, other=0.0)
    first = tl.load(exp_avg + where, mask=mask, other=0.0)
    second = tl.load(exp_avg_sq + where, mask=mask, other=0.0)
    first = first + (gradient - first) * (1 - beta1)[:, None]
    second = second * beta2[:, None] + gradient * gradient * (1 - beta2)[:, None]
    step = first / correction1[:, None] / (tl.sqrt(second) / correction2[:, None] + eps[:, None])
    value = value * (1 - lr * decay)[:, None] - lr[:, None] * step
    tl.store(params + where, value, mask=mask)
    tl.store(exp_avg + where, first, mask=mask)
    tl.store(exp_avg_sq + where, second, mask=mask)
    tl.store(grads + where, tl.zeros_like(value), mask=inside[:, None] & (tl.arange(0, BLOCK)[None, :] < BLOCK))


def adamw(params, grads, exp_avg, exp_avg_sq, block_slot, table, norms) -> None:
    """CUDA implementation of `optimizer.PackedAdamW.step`; leaves the gradient norms [J] in `norms`."""
    blocks, count = block_slot.shape[0], 32
    block = grads.shape[0] // max(blocks, 1)
    norms.zero_()
    grid = (triton.cdiv(blocks, count),)
    _squares[grid](grads, block_slot, norms, blocks, BLOCK=block, COUNT=count)
    _adamw[grid](params, grads, exp_avg, exp_avg_sq, block_slot, table, norms, blocks, BLOCK=block, COUNT=count)
    norms.sqrt_()


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor, softcap: float | None, *, grad: bool):
    """NLL [K] and argmax correctness [K] of `logits` [K, V]; with `grad`, the logits become weight * gradient."""
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    correct = torch.empty(logits.shape[0], dtype=torch.int8, device=logits.device)
    _token_loss[(logits.shape[0],)](
        logits, targets, weights, nll, correct, logits.shape[1], logits.stride(0), softcap or 1.0,
        CAP=softcap is not None, GRAD=grad, COLS=min(4096, triton.next_power_of_2(logits.shape[1])), num_warps=8,
    )  # fmt: skip
    return nll, correct


def _ranks(hidden: int) -> int:
    return 16 if hidden <= 16 else 32 if hidden <= 32 else 64


def _starts(widths: list[int], device: torch.device) -> Tensor:
    key = (tuple(widths), device)
    if key not in _STARTS:
        starts = [0]
        for width in widths:
            starts.append(starts[-1] + width)
        _STARTS[key] = torch.tensor(starts, dtype=torch.int32, device=device)
    return _STARTS[key]


_STARTS: dict[tuple, Tensor] = {}


def forward(x, weight, bias, params, table, scale, lanes, dropout, seeds, salts, widths, hidden, tokens, drop):
    """CUDA implementation of `lowrank.adapted_linear`."""
    x = x.contiguous()
    y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    h = x.new_empty(x.shape[0], hidden)
    members, share, starts = len(widths), x.shape[0] // lanes.shape[0], _starts(widths, x.device)
    tiles = lanes.shape[0] * triton.cdiv(share, BLOCK_ROWS)
    ranks = _ranks(hidden // members)
    chunks = triton.cdiv(hidden // members, ranks)
    constants = {"M": members, "DROP": drop, "ROWS": BLOCK_ROWS, "RANKS": ranks}
    _shrink[(tiles, members, chunks)](
        x, params, table, scale, lanes, dropout, seeds, salts, starts, h,
        share, tokens, x.stride(0), h.stride(0), x.shape[1], B_SIDE=False, COLS=64, **constants,
    )  # fmt: skip
    _expand[(tiles, triton.cdiv(max(widths), 64), members)](
        h, params, table, lanes, dropout, seeds, salts, starts, y,
        share, tokens, h.stride(0), y.stride(0), y.shape[1], B_SIDE=True, COLS=64, **(constants | {"DROP": False}),
    )  # fmt: skip
    return y, h


def backward(dy, x, weight, params, h, table, scale, lanes, dropout, seeds, salts, widths, tokens, drop):
    """CUDA implementation of `lowrank.adapted_linear_backward`."""
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.mm(dy, weight.t())
    dh, dparams = torch.empty_like(h), torch.zeros_like(params)
    members, share, starts = len(widths), x.shape[0] // lanes.shape[0], _starts(widths, x.device)
    tiles = lanes.shape[0] * triton.cdiv(share, BLOCK_ROWS)
    ranks = _ranks(h.shape[1] // members)
    chunks = triton.cdiv(h.shape[1] // members, ranks)
    constants = {"M": members, "ROWS": BLOCK_ROWS, "COLS": 64, "RANKS": ranks}
    shared = (table, lanes, dropout, seeds, salts, starts)
    _shrink[(tiles, members, chunks)](
        dy, params, table, scale, lanes, dropout, seeds, salts, starts, dh,
        share, tokens, dy.stride(0), dh.stride(0), dy.shape[1], B_SIDE=True, DROP=False, **constants,
    )  # fmt: skip
    _outer[(lanes.shape[0] * triton.cdiv(max(widths), 64), members, chunks)](
        h, dy, dparams, *shared,
        share, tokens, h.stride(0), dy.stride(0), max(widths), B_SIDE=True, DROP=False, **constants,
    )  # fmt: skip
    _outer[(lanes.shape[0] * triton.cdiv(x.shape[1], 64), members, chunks)](
        dh, x, dparams, *shared,
        share, tokens, dh.stride(0), x.stride(0), x.shape[1], B_SIDE=False, DROP=drop, **constants,
    )  # fmt: skip
    _expand[(tiles, triton.cdiv(x.shape[1], 64), 1)](
        dh, params, *shared[:5], starts, dx,
        share, tokens, dh.stride(0), dx.stride(0), x.shape[1], B_SIDE=False, DROP=drop, **constants,
    )  # fmt: skip
    return dx, dparams
