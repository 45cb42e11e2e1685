"""A decoder layer as one operation with a backward pass of its own.

Forward, x and the norms' inputs being [N, D]:

    n = norm(x);  q, k, v = n W^T + s n A^T B, q and k turned by their positions;  x' = x + attention W^T + s ... B
    n = norm(x'); gate, up = n W^T + s n A^T B;  x'' = x' + (silu(gate) * up) W^T + s ... B

Matrices on one input are one product. Gradients of the adapters are added to the store where they belong; the
frozen weights have none.

Shapes: N rows, L lanes, D hidden size, I inner size, O outputs of a product, Q query heads, K of keys and values, C
channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn

from sweeper.fused import attention, kernels
from sweeper.fused.attention import Heads
from sweeper.fused.rows import Rows
from sweeper.lora.kernels import Adapters, Tiles, expand_back, outer, shrink, shrink_back
from sweeper.lora.wrappers import Adapted, Group, Lanes

TILE = Tiles(64, 64, 4)  # of what is added to a product


class Site:
    """Frozen matrices on one input, as one product, and the adapters on them.

    Attributes:
        weight: [O, I]. bias: [O], or None. widths: outputs of each.
        group: None where no slot has an adapter.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        frozen = [module.base if isinstance(module, Adapted) else module for module in modules]
        self.weight = joined([module.weight for module in frozen])
        biases = [module.bias for module in frozen]
        self.bias = None if biases[0] is None else joined(biases)
        self.widths = [module.out_features for module in frozen]
        self.group: Group | None = next((module.group for module in modules if isinstance(module, Adapted)), None)
        assert self.group is None or [id(base) for base in self.group.bases] == [id(module) for module in frozen]

    def product(self, x: Tensor) -> Tensor:
        """[N, O] of x [N, I]."""
        return x @ self.weight.t() if self.bias is None else torch.addmm(self.bias, x, self.weight.t())

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        """The columns of each matrix."""
        return y.split(self.widths, 1)

    def adapters(self, lanes: Lanes, rows: int) -> Adapters | None:
        group = self.group
        if group is None:
            return None
        return Adapters(
            group.work, group.table, group.scale, lanes.slots, lanes.dropout, lanes.seeds, group.salts, group.hidden,
            rows // len(lanes.slots), 1,
        )  # fmt: skip

    def shrink(self, x: Tensor, own: Adapters | None) -> Tensor | None:
        return None if own is None else shrink(x, own)

    def back(self, dy: Tensor, h: Tensor | None, x: Tensor, own: Adapters | None) -> Tensor | None:
        """Gradient of the hidden values; those of A and B are added to the store's."""
        if own is None or h is None:
            return None
        dys = self.parts(dy)
        dh = shrink_back(dys, own)
        assert self.group is not None
        assert self.group.params.grad is not None
        outer(h, dh, x, dys, self.group.params.grad, own, add=True)
        return dh


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Frozen tensors as one, one after another; afterwards each is a part of it, so that memory holds them once."""
    first, step = tensors[0], 0
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or (
            tensor.storage_offset() != first.storage_offset() + step
        ):
            break
        step += tensor.numel()
    else:
        return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
    whole = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return whole


@dataclass(frozen=True, slots=True)
class Turns:
    """Cosines and sines [positions, C / 2] of the angles by which queries and keys are turned."""

    cosines: Tensor
    sines: Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm [N, D], and 1 / rms [N]."""
    rows, width = x.shape
    y, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    grid, tile = _norm_tile(rows, width)
    kernels.norm[grid](x, weight, y, inverse, rows, width, eps, **tile)
    return y, inverse


def norm_back(dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
    """Gradient [N, D] of x, through the norm and past it."""
    rows, width = x.shape
    dx = torch.empty_like(x)
    grid, tile = _norm_tile(rows, width)
    kernels.norm_back[grid](dy, x, inverse, weight, upstream, dx, rows, width, **tile)
    return dx


def _norm_tile(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(width)
    own = max(1, min(16, 2048 // padded))
    return (triton.cdiv(rows, own),), {"ROWS": own, "WIDTH": padded, "num_warps": 8 if padded > 2048 else 4}


class Layer:
    """One decoder layer."""

    def __init__(self, module: Any, heads: Heads, turns: Turns) -> None:
        attention_part, inner = module.self_attn, module.mlp
        self.heads, self.turns = heads, turns
        self.before, self.between = module.input_layernorm, module.post_attention_layernorm
        self.qkv = Site([attention_part.q_proj, attention_part.k_proj, attention_part.v_proj])
        self.mixed = Site([attention_part.o_proj])
        self.gate_up = Site([inner.gate_proj, inner.up_proj])
        self.down = Site([inner.down_proj])

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.qkv, self.mixed, self.gate_up, self.down

    def __call__(self, x: Tensor, rows: Rows, lanes: Lanes) -> Tensor:
        """Hidden states [N, D] after the layer."""
        params = [site.group.params for site in self.sites if site.group is not None]
        found: Tensor = _Apply.apply(x, self, rows, lanes, *params)
        return found

    def forward(self, x: Tensor, rows: Rows, lanes: Lanes) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The result, and what the backward pass needs."""
        count = x.shape[0]
        own = [site.adapters(lanes, count) for site in self.sites]
        n, inverse = norm(x, self.before.weight, self.before.variance_epsilon)
        qkv, h = self.qkv.product(n), self.qkv.shrink(n, own[0])
        self._turn(qkv, h, own[0], rows, lanes)
        mixed, sums = attention.forward(qkv, rows.starts, self.heads)
        h_mixed = self.mixed.shrink(mixed, own[1])
        middle = _add_on(x, self.mixed.product(mixed), h_mixed, own[1], lanes)
        m, inverse_m = norm(middle, self.between.weight, self.between.variance_epsilon)
        gate_up, h_inner = self.gate_up.product(m), self.gate_up.shrink(m, own[2])
        gated = _close_gate(gate_up, h_inner, own[2], lanes)
        h_down = self.down.shrink(gated, own[3])
        y = _add_on(middle, self.down.product(gated), h_down, own[3], lanes)
        kept = (x, inverse, n, h, qkv, mixed, sums, h_mixed, middle, inverse_m, m, h_inner, gate_up, gated, h_down)
        return y, kept

    def backward(
        self, dy: Tensor, kept: Sequence[Any], rows: Rows, lanes: Lanes, *, further: bool
    ) -> Tensor | None:  # fmt: skip
        """Gradient [N, D] of x; None where nothing before the layer is trained (`further`)."""
        x, inverse, n, h, qkv, mixed, sums, h_mixed, middle, inverse_m, m, h_inner, gate_up, gated, h_down = kept
        own = [site.adapters(lanes, dy.shape[0]) for site in self.sites]
        dh = self.down.back(dy, h_down, gated, own[3])
        if not further and own[0] is own[1] is own[2] is None:
            return None
        d_gate_up = _open_gate(dy @ self.down.weight, gate_up, dh, own[3], lanes)
        dh = self.gate_up.back(d_gate_up, h_inner, m, own[2])
        if not further and own[0] is own[1] is None:
            return None
        dm = d_gate_up @ self.gate_up.weight
        if dh is not None and own[2] is not None:
            expand_back(dh, dm, own[2])
        d_middle = norm_back(dm, middle, inverse_m, self.between.weight, dy)
        dh = self.mixed.back(d_middle, h_mixed, mixed, own[1])
        if not further and own[0] is None:
            return None
        d_mixed = d_middle @ self.mixed.weight
        products = self._head_gradients(d_mixed, mixed, dh, own[1], lanes)
        dqkv = attention.backward(
            qkv, rows.starts, rows.stops, d_mixed, sums, products, self.turns.cosines, self.turns.sines, self.heads
        )
        dh = self.qkv.back(dqkv, h, n, own[0])
        if not further:
            return None
        dn = dqkv @ self.qkv.weight
        if dh is not None and own[0] is not None:
            expand_back(dh, dn, own[0])
        return norm_back(dn, x, inverse, self.before.weight, d_middle)

    def _turn(self, qkv: Tensor, h: Tensor | None, own: Adapters | None, rows: Rows, lanes: Lanes) -> None:
        heads, share = self.heads, qkv.shape[0] // len(lanes.slots)
        grid = (len(lanes.slots) * triton.cdiv(share, TILE.rows), heads.queries + 2 * heads.keys)
        kernels.turn[grid](
            *_read(h, own, qkv), lanes.slots, qkv, rows.starts, self.turns.cosines, self.turns.sines, share,
            qkv.stride(0), _hidden(own), ADAPTED=own is not None, HEADS=heads.queries, KV_HEADS=heads.keys,
            HALF=heads.channels // 2, ROWS=TILE.rows, RANKS=_ranks(own), num_warps=TILE.warps,
        )  # fmt: skip

    def _head_gradients(
        self, d_mixed: Tensor, mixed: Tensor, dh: Tensor | None, own: Adapters | None, lanes: Lanes
    ) -> Tensor:  # fmt: skip
        """Adds what the adapters give to `d_mixed` in place; [Q, N] sums of d_mixed * mixed over each head."""
        (rows, width), heads = d_mixed.shape, self.heads
        share = rows // len(lanes.slots)
        products = torch.empty(heads.queries, rows, dtype=torch.float32, device=d_mixed.device)
        kernels.head_gradients[(len(lanes.slots) * triton.cdiv(share, TILE.rows), heads.queries)](
            *_read(dh, own, d_mixed), lanes.slots, d_mixed, mixed, products, rows, share, width, _hidden(own),
            ADAPTED=own is not None, HEAD=heads.channels, ROWS=TILE.rows, RANKS=_ranks(own), num_warps=TILE.warps,
        )  # fmt: skip
        return products


def _read(h: Tensor | None, own: Adapters | None, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden values, matrices and table; any tensor where there are no adapters."""
    return (other, other, other) if own is None or h is None else (h, own.work, own.table)


def _hidden(own: Adapters | None) -> int:
    return 0 if own is None else own.hidden


def _ranks(own: Adapters | None) -> int:
    return 16 if own is None else own.ranks


def _add_on(x: Tensor, y: Tensor, h: Tensor | None, own: Adapters | None, lanes: Lanes) -> Tensor:
    """x + y + h B [N, D]."""
    (rows, width), out = x.shape, torch.empty_like(x)
    share = rows // len(lanes.slots)
    grid = (len(lanes.slots) * triton.cdiv(share, TILE.rows), triton.cdiv(width, TILE.cols))
    kernels.add_on[grid](
        *_read(h, own, x), lanes.slots, x, y, out, share, width, _hidden(own),
        ADAPTED=own is not None, ROWS=TILE.rows, COLS=TILE.cols, RANKS=_ranks(own), num_warps=TILE.warps,
    )  # fmt: skip
    return out


def _close_gate(y: Tensor, h: Tensor | None, own: Adapters | None, lanes: Lanes) -> Tensor:
    """silu(gate) * up [N, I] of y [N, 2 I], to which h B is added in place."""
    rows, width = y.shape[0], y.shape[1] // 2
    share, out = rows // len(lanes.slots), y.new_empty(rows, width)
    grid = (len(lanes.slots) * triton.cdiv(share, TILE.rows), triton.cdiv(width, TILE.cols))
    kernels.close_gate[grid](
        *_read(h, own, y), lanes.slots, y, out, share, width, _hidden(own),
        ADAPTED=own is not None, ROWS=TILE.rows, COLS=TILE.cols, RANKS=_ranks(own), num_warps=TILE.warps,
    )  # fmt: skip
    return out


def _open_gate(dout: Tensor, y: Tensor, dh: Tensor | None, own: Adapters | None, lanes: Lanes) -> Tensor:
    """Gradients [N, 2 I] of gate and up."""
    (rows, width), dy = dout.shape, torch.empty_like(y)
    share = rows // len(lanes.slots)
    grid = (len(lanes.slots) * triton.cdiv(share, TILE.rows), triton.cdiv(width, TILE.cols))
    kernels.open_gate[grid](
        *_read(dh, own, y), lanes.slots, y, dout, dy, share, width, _hidden(own),
        ADAPTED=own is not None, ROWS=TILE.rows, COLS=TILE.cols, RANKS=_ranks(own), num_warps=TILE.warps,
    )  # fmt: skip
    return dy


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, rows: Rows, lanes: Lanes, *params: Tensor) -> Tensor:
        y, kept = layer.forward(x, rows, lanes)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*kept)
            ctx.layer, ctx.rows, ctx.lanes, ctx.params = layer, rows, lanes, len(params)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx = ctx.layer.backward(
            grads[0].contiguous(), ctx.saved_tensors, ctx.rows, ctx.lanes, further=ctx.needs_input_grad[0]
        )
        return (dx, *[None] * (3 + ctx.params))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        eps: Any = module.variance_epsilon
        weight: Any = module.weight
        y, inverse = norm(x, weight, eps)
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inverse, weight = ctx.saved_tensors
        return norm_back(grads[0].contiguous(), x, inverse, weight, torch.zeros_like(x)), None


def last_norm(x: Tensor, module: nn.Module) -> Tensor:
    """The norm after the last layer [N, D]."""
    found: Tensor = _Norm.apply(x, module)
    return found
