"""The grouped low-rank product: one frozen linear map over the rows of many runs, plus each run's own adapter.

Rows of the pack lie run after run; a *lane* is the equal share of rows of one run, and `lanes[l]` names the slot
(adapter) it meets, -1 for none. A *group* is one or more frozen matrices applied to the same input (q, k and v of a
block), multiplied as one; each *member* of a group has its own adapter. With s = alpha / rank the output is

    y = x W^T + bias + s (mask * x) A^T B        (Hu et al. 2021, eq. 3; B is stored transposed)

Everything that distinguishes the runs (rank, scale, offsets, dropout) is data in tensors, never a shape, so a slot can
change hands under a compiled layer or a CUDA graph.

Shapes: N rows in all lanes, I in, O out (all members), F adapter values of the group, J slots, M members, H hidden
(sum of member ranks).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# columns of a group's table, one row for each (slot, member)
RANK, A_OFFSET, B_OFFSET, H_COLUMN = range(4)
MIX_1, MIX_2 = 0x85EBCA6B, 0xC2B2AE35
ROW_STRIDE = 1 << 16


@dataclass(frozen=True, slots=True)
class Lane:
    """Rows `start:stop` of one member's adapter of one slot, with views of its parameters."""

    slot: int
    member: int
    rows: slice
    columns: slice
    hidden: slice
    a: Tensor  # [rank, I]
    b: Tensor  # [rank, O of the member]


def keep_mask(seed: int, salt: int, rows: Tensor, features: int, p: float) -> Tensor:
    """Counter-based dropout mask [rows, features]: True where the value is kept.

    Depends on the run's own seed (with its step), the module's salt, the row's own index and the feature only, so the
    mask is the same whoever shares the pack. Two rounds of the 32-bit finaliser of MurmurHash3.
    """
    row_key = _mix((rows.to(torch.int64) ^ seed) & 0xFFFFFFFF)
    feature = torch.arange(features, device=rows.device, dtype=torch.int64) * 0x9E3779B1 & 0xFFFFFFFF
    bits = _mix((row_key[:, None] ^ feature[None, :] ^ salt) & 0xFFFFFFFF)
    return bits >= int(p * 2**32)


def _mix(value: Tensor) -> Tensor:
    value = ((value ^ (value >> 16)) * MIX_1) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * MIX_2) & 0xFFFFFFFF
    return value ^ (value >> 16)


def row_index(count: int, tokens: int, device: torch.device) -> Tensor:
    """Index of each row inside its run, from its sequence and its position; independent of the padded length."""
    n = torch.arange(count, device=device)
    return n // tokens * ROW_STRIDE + n % tokens


def lanes_of(
    params: Tensor, table: Tensor, lanes: Tensor, widths: list[int], rows: int, in_features: int
) -> list[Lane]:
    """Host-side walk over the lanes and members that have an adapter."""
    entries, slots = table.tolist(), lanes.tolist()
    share = rows // max(len(slots), 1)
    walked = []
    for lane, slot in enumerate(slots):
        if slot < 0:
            continue
        column = 0
        for member, width in enumerate(widths):
            rank, a, b, hidden = entries[slot][member]
            if rank:
                walked.append(
                    Lane(
                        slot,
                        member,
                        slice(lane * share, (lane + 1) * share),
                        slice(column, column + width),
                        slice(hidden, hidden + rank),
                        params[a : a + rank * in_features].view(rank, in_features),
                        params[b : b + rank * width].view(rank, width),
                    )
                )
            column += width
    return walked


@torch.library.custom_op("sweeper::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Tensor,
    table: Tensor,
    scale: Tensor,
    lanes: Tensor,
    dropout: Tensor,
    seeds: Tensor,
    salts: Tensor,
    widths: list[int],
    hidden: int,
    tokens: int,
    drop: bool,
) -> tuple[Tensor, Tensor]:
    """Frozen product of a group plus every lane's adapters.

    Args:
        x: [N, I], rows of the lanes one after another, the same number for each.
        weight: [I, O], frozen, members side by side. bias: [O] or None.
        params: [F] float32, the group's adapters of all slots.
        table: [J, M, 4] int32 (rank, offset of A, offset of B, hidden column). scale: [J, M] float32.
        lanes: [L] int32, slot of each lane. dropout: [J] float32. seeds: [J] int64. salts: [M] int64.
        widths: O of each member. hidden: H. tokens: padded length of a sequence. drop: whether dropout is on.

    Returns:
        y [N, O] and the scaled hidden s (mask * x) A^T [N, H], which the backward pass needs.
    """
    if x.is_cuda:
        from sweeper.engine import kernels

        return kernels.forward(
            x, weight, bias, params, table, scale, lanes, dropout, seeds, salts, widths, hidden, tokens, drop
        )
    y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    h = x.new_zeros(x.shape[0], hidden)
    scales = scale.tolist()
    for lane in lanes_of(params, table, lanes, widths, x.shape[0], x.shape[1]):
        rows = x[lane.rows]
        if drop:
            rows = rows * _lane_mask(lane, dropout, seeds, salts, rows.shape[0], x.shape[1], tokens, rows)
        part = torch.mm(rows, lane.a.to(x.dtype).t()) * scales[lane.slot][lane.member]
        h[lane.rows, lane.hidden] = part
        y[lane.rows, lane.columns].addmm_(part, lane.b.to(x.dtype))
    return y, h


@adapted_linear.register_fake
def _(x, weight, bias, params, table, scale, lanes, dropout, seeds, salts, widths, hidden, tokens, drop):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], hidden)


@torch.library.custom_op("sweeper::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    params: Tensor,
    h: Tensor,
    table: Tensor,
    scale: Tensor,
    lanes: Tensor,
    dropout: Tensor,
    seeds: Tensor,
    salts: Tensor,
    widths: list[int],
    tokens: int,
    drop: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `adapted_linear` for x [N, I] and params [F]; the frozen weight gets none."""
    if dy.is_cuda:
        from sweeper.engine import kernels

        return kernels.backward(
            dy, x, weight, params, h, table, scale, lanes, dropout, seeds, salts, widths, tokens, drop
        )
    dx = torch.mm(dy, weight.t())
    dparams = torch.zeros_like(params)
    grads = lanes_of(dparams, table, lanes, widths, x.shape[0], x.shape[1])
    scales = scale.tolist()
    for lane, grad in zip(lanes_of(params, table, lanes, widths, x.shape[0], x.shape[1]), grads, strict=True):
        rows, upstream = x[lane.rows], dy[lane.rows, lane.columns]
        dh = torch.mm(upstream, lane.b.to(x.dtype).t()) * scales[lane.slot][lane.member]
        back = torch.mm(dh, lane.a.to(x.dtype))
        if drop:
            mask = _lane_mask(lane, dropout, seeds, salts, rows.shape[0], x.shape[1], tokens, rows)
            rows, back = rows * mask, back * mask
        grad.b.copy_(torch.mm(h[lane.rows, lane.hidden].t(), upstream))
        grad.a.copy_(torch.mm(dh.t(), rows))
        dx[lane.rows] += back
    return dx, dparams


@adapted_linear_backward.register_fake
def _(dy, x, weight, params, h, table, scale, lanes, dropout, seeds, salts, widths, tokens, drop):
    return torch.empty_like(x), torch.empty_like(params)


def _lane_mask(lane: Lane, dropout, seeds, salts, count: int, features: int, tokens: int, like: Tensor) -> Tensor:
    p = float(dropout[lane.slot])
    rows = row_index(count, tokens, like.device)
    mask = keep_mask(int(seeds[lane.slot]), int(salts[lane.member]), rows, features, p)
    return mask.to(like.dtype) / (1 - p)


def _setup(ctx, inputs, output):
    x, weight, _, params, *rest = inputs
    ctx.save_for_backward(x, weight, params, output[1], *rest[:6])
    ctx.widths, _, ctx.tokens, ctx.drop = rest[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _dh):
    if dy is None:
        return (None,) * 14
    x, weight, params, h, *tensors = ctx.saved_tensors
    dx, dparams = adapted_linear_backward(
        dy.contiguous(), x, weight, params, h, *tensors, ctx.widths, ctx.tokens, ctx.drop
    )
    return dx, None, None, dparams, *([None] * 10)


adapted_linear.register_autograd(_backward, setup_context=_setup)
