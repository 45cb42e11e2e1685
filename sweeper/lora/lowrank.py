"""The grouped low-rank product: one frozen linear map over the rows of many runs, plus each run's own adapter.

Rows of the pack lie run after run; a *lane* is the equal share of rows of one run, and `lanes[l]` names the slot
(adapter) it meets, -1 for none. A *group* is up to three frozen matrices applied to the same input (q, k and v of a
block): their low-rank kernels run as one. Each *member* of a group has its own adapter. With s = alpha / rank, its
output is

    y = x W^T + bias + s (mask * x) A^T B        (Hu et al. 2021, eq. 3; B is stored transposed)

An adapter of rank blocks has a gate g for each task: s (g * (mask * x) A^T) B, with g constant over an equal share of
the rows.

Everything that distinguishes the runs (rank, scale, offsets, dropout) is data in tensors, never a shape, so a slot can
change hands under a compiled layer or a CUDA graph.

Shapes: N rows in all lanes, I in, O out (of a member), F adapter values of the group, J slots, M members, H hidden
columns (M times the widest rank, in multiples of 16), G shares of rows that have a gate each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.lora.blocks import gate, gate_gradient

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
    hidden: slice
    a: Tensor  # [rank, I]
    b: Tensor  # [rank, O of the member]


def keep_mask(seed: int, salt: int, rows: Tensor, features: int, p: float) -> Tensor:
    """Counter-based dropout mask [rows, features]: True where the value is kept.

    Depends on the run's own seed (with its step), the module's salt, the row's own index and the feature only, so the
    mask is the same whoever shares the pack, and however a step is cut into passes: the upper half of the seed is the
    number of sequences before these (`seeds.for_rows`). Two rounds of the 32-bit finaliser of MurmurHash3.
    """
    row_key = mix(((rows.to(torch.int64) + (seed >> 32) * ROW_STRIDE) ^ seed) & 0xFFFFFFFF)
    feature = torch.arange(features, device=rows.device, dtype=torch.int64) * 0x9E3779B1 & 0xFFFFFFFF
    bits = mix((row_key[:, None] ^ feature[None, :] ^ salt) & 0xFFFFFFFF)
    return bits >= int(p * 2**32)


def mix(value: Tensor) -> Tensor:
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
        for member, width in enumerate(widths):
            rank, a, b, hidden = entries[slot][member]
            if rank:
                walked.append(
                    Lane(
                        slot,
                        member,
                        slice(lane * share, (lane + 1) * share),
                        slice(hidden, hidden + rank),
                        params[a : a + rank * in_features].view(rank, in_features),
                        params[b : b + rank * width].view(rank, width),
                    )
                )
    return walked


@torch.library.custom_op("sweeper::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    params: Tensor,
    work: Tensor,
    table: Tensor,
    scale: Tensor,
    lanes: Tensor,
    dropout: Tensor,
    seeds: Tensor,
    salts: Tensor,
    gates: Tensor | None,
    gate_rows: Tensor | None,
    hidden: int,
    tokens: int,
    drop: bool,
) -> list[Tensor]:
    """Frozen products of a group plus every lane's adapters.

    Args:
        x: [N, I], rows of the lanes one after another, the same number for each.
        weights: [I, O] of each member, frozen. biases: [O] of each, or none at all.
        params: [F] float32, the group's adapters of all slots; they get the gradient. work: [F], the same values in
            the precision that the products are computed in, which are what is read.
        table: [J, M, 4] int32 (rank, offset of A, offset of B, hidden column). scale: [J, M] float32.
        lanes: [L] int32, slot of each lane. dropout: [J] float32. seeds: [J] int64. salts: [M] int64.
        gates: [any, H] float32, what hidden values are multiplied by. gate_rows: [G] int64, its row for each of G
            equal shares of x; None where there are no gates, or every row has its own, which then get a gradient.
        hidden: H. tokens: padded length of a sequence. drop: whether dropout is on.

    Returns:
        y [N, O] of each member, and the scaled hidden s (mask * x) A^T [N, H], which the backward pass needs.
    """
    ys = [torch.addmm(b, x, w) for b, w in zip(biases, weights, strict=True)] if biases else [x @ w for w in weights]
    if x.is_cuda:
        from sweeper.lora import kernels

        h = kernels.forward(
            x, ys, work, table, scale, lanes, dropout, seeds, salts, gates, gate_rows, hidden, tokens, drop
        )
        return [*ys, h]
    h = x.new_zeros(x.shape[0], hidden)
    scales = scale.tolist()
    walked = lanes_of(work, table, lanes, [w.shape[1] for w in weights], x.shape[0], x.shape[1])
    for lane in walked:
        rows = x[lane.rows]
        if drop:
            rows = rows * _lane_mask(lane, dropout, seeds, salts, rows.shape[0], x.shape[1], tokens, rows)
        h[lane.rows, lane.hidden] = torch.mm(rows, lane.a.to(x.dtype).t()) * scales[lane.slot][lane.member]
    gate(h, gates, gate_rows)
    for lane in walked:
        ys[lane.member][lane.rows].addmm_(h[lane.rows, lane.hidden], lane.b.to(x.dtype))
    return [*ys, h]


@adapted_linear.register_fake
def _(
    x, weights, biases, params, work, table, scale, lanes, dropout, seeds, salts, gates, gate_rows, hidden, tokens, drop
):
    return [x.new_empty(x.shape[0], weight.shape[1]) for weight in weights] + [x.new_empty(x.shape[0], hidden)]


@torch.library.custom_op("sweeper::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    work: Tensor,
    h: Tensor,
    table: Tensor,
    scale: Tensor,
    lanes: Tensor,
    dropout: Tensor,
    seeds: Tensor,
    salts: Tensor,
    gates: Tensor | None,
    gate_rows: Tensor | None,
    tokens: int,
    drop: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `adapted_linear` for x [N, I], params [F] and gates [N, H] (float32); frozen weights get none.

    That of the gates is empty, but where each row has its own.
    """
    dx = frozen_gradient(dys, weights)
    dparams = torch.zeros_like(work, dtype=torch.float32)
    dgates = _gates_like(h, gates, gate_rows)
    if x.is_cuda:
        from sweeper.lora import kernels

        kernels.backward(
            dys, x, dx, work, dparams, dgates, h, table, scale, lanes, dropout, seeds, salts, gates, gate_rows, tokens,
            drop,
        )  # fmt: skip
        return dx, dparams, dgates
    widths = [w.shape[1] for w in weights]
    walked = lanes_of(work, table, lanes, widths, x.shape[0], x.shape[1])
    grads = lanes_of(dparams, table, lanes, widths, x.shape[0], x.shape[1])
    scales, dh = scale.tolist(), torch.zeros_like(h)
    for lane in walked:
        upstream = torch.mm(dys[lane.member][lane.rows], lane.b.to(x.dtype).t())
        dh[lane.rows, lane.hidden] = upstream * scales[lane.slot][lane.member]
    if gates is not None and gate_rows is None:
        dgates.copy_(gate_gradient(h, dh, gates, scale, lanes))
    gate(dh, gates, gate_rows)
    for lane, grad in zip(walked, grads, strict=True):
        rows, own = x[lane.rows], dh[lane.rows, lane.hidden]
        back = torch.mm(own, lane.a.to(x.dtype))
        if drop:
            mask = _lane_mask(lane, dropout, seeds, salts, rows.shape[0], x.shape[1], tokens, rows)
            rows, back = rows * mask, back * mask
        grad.b.copy_(torch.mm(h[lane.rows, lane.hidden].t(), dys[lane.member][lane.rows]))
        grad.a.copy_(torch.mm(own.t(), rows))
        dx[lane.rows] += back
    return dx, dparams, dgates


@adapted_linear_backward.register_fake
def _(dys, x, weights, work, h, table, scale, lanes, dropout, seeds, salts, gates, gate_rows, tokens, drop):
    return torch.empty_like(x), torch.empty_like(work, dtype=torch.float32), _gates_like(h, gates, gate_rows)


def _gates_like(h: Tensor, gates: Tensor | None, gate_rows: Tensor | None) -> Tensor:
    each = gates is not None and gate_rows is None
    return h.new_empty(h.shape if each else (0,), dtype=torch.float32)


def frozen_gradient(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Sum over members of dy W^T [N, I]."""
    dx = torch.mm(dys[0], weights[0].t())
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight.t())
    return dx


def _lane_mask(lane: Lane, dropout, seeds, salts, count: int, features: int, tokens: int, like: Tensor) -> Tensor:
    p = float(dropout[lane.slot])
    rows = row_index(count, tokens, like.device)
    mask = keep_mask(int(seeds[lane.slot]), int(salts[lane.member]), rows, features, p)
    return mask.to(like.dtype) / (1 - p)


def _setup(ctx, inputs, output):
    x, weights, biases, _params, work, *tensors, gates, gate_rows, _hidden, tokens, drop = inputs
    ctx.save_for_backward(x, work, output[-1], *tensors, gates, gate_rows, *weights)
    ctx.biases, ctx.tokens, ctx.drop = len(biases), tokens, drop
    ctx.routed = gates is not None and gate_rows is None


def _backward(ctx, grads):
    x, work, h, *rest = ctx.saved_tensors
    tensors, weights = rest[:8], rest[8:]
    dys = [g.contiguous() for g in grads[:-1]]
    dx, dparams, dgates = adapted_linear_backward(dys, x, weights, work, h, *tensors, ctx.tokens, ctx.drop)
    own = dgates if ctx.routed else None
    return dx, [None] * len(weights), [None] * ctx.biases, dparams, *([None] * 7), own, *([None] * 4)


adapted_linear.register_autograd(_backward, setup_context=_setup)
