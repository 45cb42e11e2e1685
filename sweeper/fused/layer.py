"""Decoder layers as one operation with a backward pass of its own.

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

from sweeper.fused import attention, fp8, kernels
from sweeper.fused.attention import Heads
from sweeper.fused.beside import Beside
from sweeper.fused.fp8 import Matrix8, Rows8
from sweeper.fused.rows import Rows
from sweeper.lora.kernels import Adapters, Tiles, expand_back, outer, shrink, shrink_back
from sweeper.lora.wrappers import Adapted, Group, Lanes

HEAD_TILE, WIDE_TILE = Tiles(64, 64, 4), Tiles(32, 128, 4)  # of what is added to a product; the first a head wide
CLOSE_SPAN, FEW = 4, 8192  # tiles of rows for which `close_gate` keeps its matrix, unless there are so few programs
NARROW, SHORT = 1024, 4096  # hidden size and rows up to which the adapters join a norm's backward pass


class Site:
    """Frozen matrices on one input, as one product, and the adapters on them.

    Attributes:
        weight: [O, I]. bias: [O], or None. widths: outputs of each.
        group: None where no slot has an adapter. matrix8: the weight in 8-bit floats, if there is any.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        frozen = [module.base if isinstance(module, Adapted) else module for module in modules]
        self.weight = joined([module.weight for module in frozen])
        biases = [module.bias for module in frozen]
        self.bias = None if biases[0] is None else joined(biases)
        self.widths = [module.out_features for module in frozen]
        self.group: Group | None = next((module.group for module in modules if isinstance(module, Adapted)), None)
        self.matrix8: Matrix8 | None = None
        assert self.group is None or [id(base) for base in self.group.bases] == [id(module) for module in frozen]

    def product(self, x: Tensor, codes: Rows8 | None = None) -> Tensor:
        """[N, O] of x [N, I]; in 8-bit floats where `codes` are those of x."""
        if codes is not None and self.matrix8 is not None:
            y = self.matrix8.product(codes, x.dtype)
            return y if self.bias is None else y.add_(self.bias)
        return x @ self.weight.t() if self.bias is None else torch.addmm(self.bias, x, self.weight.t())

    def product_back(self, dy: Tensor, codes: Rows8 | None = None) -> Tensor:
        """[N, I] of dy [N, O]."""
        if codes is not None and self.matrix8 is not None:
            return self.matrix8.product_back(codes, dy.dtype)
        return dy @ self.weight

    def codes(self, x: Tensor, wanted: bool) -> Rows8 | None:
        """x [N, I] in 8-bit floats, where the product gains more by them than they take to make."""
        return Rows8.of(x) if wanted and self.weight.shape[0] >= fp8.WORTHWHILE else None

    def codes_back(self, dy: Tensor, wanted: bool) -> Rows8 | None:
        """As `codes`, of dy [N, O]."""
        return Rows8.of(dy) if wanted and self.weight.shape[1] >= fp8.WORTHWHILE else None

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

    def __call__(
        self, x: Tensor, codes: Rows8 | None, own: Adapters | None, beside: Beside
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The frozen product [N, O] of x [N, I], and the hidden values [N, H]."""
        if own is None:
            return self.product(x, codes), None
        with beside.run():
            h = shrink(x, own)
            mark = beside.mark()
        y = self.product(x, codes)
        beside.wait(mark)
        return y, h

    def back(
        self, dy: Tensor, codes: Rows8 | None, h: Tensor | None, x: Tensor, own: Adapters | None, beside: Beside, *,
        further: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x [N, I] through the frozen product, if asked for, and of the hidden values [N, H].

        Those of A and B are added to the store's, beside what comes next.
        """
        if own is None or h is None:
            return self.product_back(dy, codes) if further else None, None
        dys = self.parts(dy)
        assert self.group is not None
        assert self.group.params.grad is not None
        with beside.run():
            dh = shrink_back(dys, own)
            mark = beside.mark()
            outer(h, dh, x, dys, self.group.params.grad, own, add=True)
        dx = self.product_back(dy, codes) if further else None
        beside.wait(mark)
        return dx, dh


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


def norm(x: Tensor, module: Any, *, coded: bool = False) -> tuple[Tensor, Tensor, Rows8 | None]:
    """RMS norm [N, D], 1 / rms [N], and the norm in 8-bit floats if asked for."""
    rows, width = x.shape
    y, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    codes = Rows8.empty(x) if coded else None
    grid, tile = _norm_tile(rows, width)
    kernels.norm[grid](
        x, module.weight, y, inverse, *_codes(codes, x), rows, width, module.variance_epsilon, CODES=coded, **tile
    )
    return y, inverse, codes


def norm_back(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, upstream: Tensor, *, coded: bool = False,
    dh: Tensor | None = None, own: Adapters | None = None,
) -> tuple[Tensor, Rows8 | None]:  # fmt: skip
    """Gradient [N, D] of x, through the norm and past it; and in 8-bit floats if asked for.

    Args:
        dy: [N, D]; what the adapters after the norm give, dh A, is added to it, maybe in place.
    """
    rows, width = x.shape
    dx, codes = torch.empty_like(x), Rows8.empty(x) if coded else None
    if own is None or dh is None or width > NARROW or rows > SHORT:
        if own is not None and dh is not None:
            expand_back(dh, dy, own)
        grid, tile = _norm_tile(rows, width)
        kernels.norm_back[grid](
            dy, x, inverse, weight, upstream, dx, *_codes(codes, x), rows, width, CODES=coded, **tile
        )  # fmt: skip
        return dx, codes
    padded = triton.next_power_of_2(width)
    kernels.expand_norm_back[(own.count * triton.cdiv(own.share, 16),)](
        dh, own.work, own.table, own.lanes, dy, x, inverse, weight, upstream, dx, *_codes(codes, x), own.share, width,
        own.hidden, M=own.members, CODES=coded, ROWS=16, WIDTH=padded, RANKS=min(own.ranks, 32),
        num_warps=max(4, min(16, padded // 64)),
    )  # fmt: skip
    return dx, codes


def _codes(codes: Rows8 | None, other: Tensor) -> tuple[Tensor, Tensor]:
    return (other, other) if codes is None else (codes.codes, codes.scales)


def _norm_tile(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(width)
    own = max(1, min(16, 2048 // padded))
    return (triton.cdiv(rows, own),), {"ROWS": own, "WIDTH": padded, "num_warps": 8 if padded > 2048 else 4}


class Layer:
    """One decoder layer."""

    def __init__(self, module: Any, heads: Heads, turns: Turns, beside: Beside) -> None:
        attention_part, inner = module.self_attn, module.mlp
        self.heads, self.turns, self.beside = heads, turns, beside
        self.before, self.between = module.input_layernorm, module.post_attention_layernorm
        self.qkv = Site([attention_part.q_proj, attention_part.k_proj, attention_part.v_proj])
        self.mixed = Site([attention_part.o_proj])
        self.gate_up = Site([inner.gate_proj, inner.up_proj])
        self.down = Site([inner.down_proj])

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.qkv, self.mixed, self.gate_up, self.down

    def forward(
        self, x: Tensor, rows: Rows, lanes: Lanes, *, coded: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
        """Hidden states [N, D] after the layer, and what the backward pass needs; `coded`: by 8-bit products."""
        own, beside = [site.adapters(lanes, x.shape[0]) for site in self.sites], self.beside
        n, inverse, codes = norm(x, self.before, coded=coded)
        qkv, h = self.qkv(n, codes, own[0], beside)
        self._turn(qkv, h, own[0], rows, lanes)
        mixed, sums = attention.forward(qkv, rows.starts, self.heads)
        y, h_mixed = self.mixed(mixed, self.mixed.codes(mixed, coded), own[1], beside)
        middle = _add_on(x, y, h_mixed, own[1], lanes)
        m, inverse_m, codes = norm(middle, self.between, coded=coded)
        gate_up, h_inner = self.gate_up(m, codes, own[2], beside)
        gated = _close_gate(gate_up, h_inner, own[2], lanes)
        y, h_down = self.down(gated, self.down.codes(gated, coded), own[3], beside)
        y = _add_on(middle, y, h_down, own[3], lanes)
        kept = (x, inverse, n, h, qkv, mixed, sums, h_mixed, middle, inverse_m, m, h_inner, gate_up, gated, h_down)
        return y, kept

    def backward(
        self, dy: Tensor, codes: Rows8 | None, kept: Sequence[Any], rows: Rows, lanes: Lanes, *, further: bool
    ) -> tuple[Tensor | None, Rows8 | None]:  # fmt: skip
        """Gradient [N, D] of x, and its codes if `codes` of dy are given; None where nothing before it is trained.

        Args:
            further: whether something before the layer is.
        """
        x, inverse, n, h, qkv, mixed, sums, h_mixed, middle, inverse_m, m, h_inner, gate_up, gated, h_down = kept
        own, beside = [site.adapters(lanes, dy.shape[0]) for site in self.sites], self.beside
        coded = codes is not None
        # whether anything is trained before a site: in the layer, or before it
        past = [further or any(one is not None for one in own[:site]) for site in range(4)]
        dqkv = d_middle = d_gate_up = dx = codes_x = None
        d_gated, dh_down = self.down.back(dy, codes, h_down, gated, own[3], beside, further=past[3])
        dh_inner = dh_mixed = dh = None
        if d_gated is not None:
            d_gate_up = _open_gate(d_gated, gate_up, dh_down, own[3], lanes)
            codes = self.gate_up.codes_back(d_gate_up, coded and past[2])
            dm, dh_inner = self.gate_up.back(d_gate_up, codes, h_inner, m, own[2], beside, further=past[2])
            if dm is not None:
                d_middle, codes = norm_back(
                    dm, middle, inverse_m, self.between.weight, dy, coded=coded, dh=dh_inner, own=own[2]
                )
        if d_middle is not None:
            d_mixed, dh_mixed = self.mixed.back(d_middle, codes, h_mixed, mixed, own[1], beside, further=past[1])
            if d_mixed is not None:
                products = self._head_gradients(d_mixed, mixed, dh_mixed, own[1], lanes)
                dqkv = attention.backward(
                    qkv, rows.starts, rows.stops, d_mixed, sums, products, self.turns.cosines, self.turns.sines,
                    self.heads,
                )  # fmt: skip
        if dqkv is not None and d_middle is not None:
            codes = self.qkv.codes_back(dqkv, coded and past[0])
            dn, dh = self.qkv.back(dqkv, codes, h, n, own[0], beside, further=past[0])
            if dn is not None:
                dx, codes_x = norm_back(
                    dn, x, inverse, self.before.weight, d_middle, coded=coded, dh=dh, own=own[0]
                )  # fmt: skip
        beside.hold(dy, d_gate_up, d_middle, dqkv, dh, dh_mixed, dh_inner, dh_down)
        return dx, codes_x

    def _turn(self, qkv: Tensor, h: Tensor | None, own: Adapters | None, rows: Rows, lanes: Lanes) -> None:
        heads, share = self.heads, qkv.shape[0] // len(lanes.slots)
        grid, tile = _grid(lanes, share, heads.queries + 2 * heads.keys, HEAD_TILE)
        kernels.turn[grid](
            *_read(h, own, qkv), lanes.slots, qkv, rows.starts, self.turns.cosines, self.turns.sines, share,
            qkv.stride(0), _width(own), HEADS=heads.queries, KV_HEADS=heads.keys, HALF=heads.channels // 2,
            **tile, **_adapted(own),
        )  # fmt: skip

    def _head_gradients(
        self, d_mixed: Tensor, mixed: Tensor, dh: Tensor | None, own: Adapters | None, lanes: Lanes
    ) -> Tensor:  # fmt: skip
        """Adds what the adapters give to `d_mixed` in place; [Q, N] sums of d_mixed * mixed over each head."""
        (rows, width), heads = d_mixed.shape, self.heads
        share = rows // len(lanes.slots)
        products = torch.empty(heads.queries, rows, dtype=torch.float32, device=d_mixed.device)
        grid, tile = _grid(lanes, share, heads.queries, HEAD_TILE)
        kernels.head_gradients[grid](
            *_read(dh, own, d_mixed), lanes.slots, d_mixed, mixed, products, rows, share, width, _width(own),
            HEAD=heads.channels, **tile, **_adapted(own),
        )  # fmt: skip
        return products


def _read(h: Tensor | None, own: Adapters | None, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden values, matrices and table; any tensor where there are no adapters."""
    return (other, other, other) if own is None or h is None else (h, own.work, own.table)


def _width(own: Adapters | None) -> int:
    return 0 if own is None else own.hidden


def _adapted(own: Adapters | None) -> dict[str, Any]:
    if own is None:
        return {"ADAPTED": False, "RANKS": 16, "HOIST": True}
    return {"ADAPTED": True, "RANKS": own.ranks, "HOIST": own.chunks == 1}


def _grid(
    lanes: Lanes, share: int, columns: int, tile: Tiles, span: int = 1
) -> tuple[tuple[int, int], dict[str, int]]:  # fmt: skip
    """Programs over the rows of each lane and so many tiles of columns, and the constants of a kernel's tile."""
    count = len(lanes.slots)
    span = span if count * triton.cdiv(share, tile.rows) * columns >= FEW * span else 1
    grid = (count * triton.cdiv(share, tile.rows * span), columns)
    return grid, {"ROWS": tile.rows, "SPAN": span, "num_warps": tile.warps}


def _add_on(x: Tensor, y: Tensor, h: Tensor | None, own: Adapters | None, lanes: Lanes) -> Tensor:
    """x + y + h B [N, D]."""
    (rows, width), out = x.shape, torch.empty_like(x)
    share = rows // len(lanes.slots)
    grid, tile = _grid(lanes, share, triton.cdiv(width, WIDE_TILE.cols), WIDE_TILE)
    kernels.add_on[grid](
        *_read(h, own, x), lanes.slots, x, y, out, share, width, _width(own), COLS=WIDE_TILE.cols, **tile,
        **_adapted(own),
    )  # fmt: skip
    return out


def _close_gate(y: Tensor, h: Tensor | None, own: Adapters | None, lanes: Lanes) -> Tensor:
    """silu(gate) * up [N, I] of y [N, 2 I], to which h B is added in place."""
    rows, width = y.shape[0], y.shape[1] // 2
    share, out = rows // len(lanes.slots), y.new_empty(rows, width)
    grid, tile = _grid(lanes, share, triton.cdiv(width, WIDE_TILE.cols), WIDE_TILE, CLOSE_SPAN)
    kernels.close_gate[grid](
        *_read(h, own, y), lanes.slots, y, out, share, width, _width(own), COLS=WIDE_TILE.cols, **tile, **_adapted(own)
    )
    return out


def _open_gate(dout: Tensor, y: Tensor, dh: Tensor | None, own: Adapters | None, lanes: Lanes) -> Tensor:
    """Gradients [N, 2 I] of gate and up, which are y, from dout + dh A [N, I]."""
    (rows, width), dy = dout.shape, torch.empty_like(y)
    share = rows // len(lanes.slots)
    grid, tile = _grid(lanes, share, triton.cdiv(width, WIDE_TILE.cols), WIDE_TILE)
    kernels.open_gate[grid](
        *_read(dh, own, y), lanes.slots, y, dout, dy, share, width, _width(own), COLS=WIDE_TILE.cols, **tile,
        **_adapted(own),
    )  # fmt: skip
    return dy


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        y, inverse, _ = norm(x, module)
        ctx.save_for_backward(x, inverse, module.weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inverse, weight = ctx.saved_tensors
        return norm_back(grads[0].contiguous(), x, inverse, weight, torch.zeros_like(x))[0], None


def last_norm(x: Tensor, module: nn.Module) -> Tensor:
    """The norm after the last layer [N, D]."""
    found: Tensor = _Norm.apply(x, module)
    return found


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Layer], rows: Rows, lanes: Lanes, coded: bool, keep: bool, *params: Tensor
    ) -> Tensor:  # fmt: skip
        every: list[Tensor | None] = []
        for layer in layers:
            x, kept = layer.forward(x, rows, lanes, coded=coded)
            every += kept if keep else []  # without gradients nothing is needed again
        ctx.save_for_backward(*every)
        ctx.layers, ctx.rows, ctx.lanes, ctx.coded, ctx.params = layers, rows, lanes, coded, len(params)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        layers, saved = ctx.layers, ctx.saved_tensors
        each = len(saved) // len(layers)
        trained = [any(site.group is not None for site in layer.sites) for layer in layers]
        dx = grads[0].contiguous()
        codes = Rows8.of(dx) if ctx.coded else None
        for number in reversed(range(len(layers))):
            further = ctx.needs_input_grad[0] or any(trained[:number])
            kept = saved[number * each : (number + 1) * each]
            dx, codes = layers[number].backward(dx, codes, kept, ctx.rows, ctx.lanes, further=further)
            if dx is None:
                break
        layers[0].beside.finish()  # which all layers share
        return (dx, *[None] * (5 + ctx.params))


def through(layers: Sequence[Layer], x: Tensor, rows: Rows, lanes: Lanes, *, coded: bool) -> Tensor:
    """Hidden states [N, D] after all layers; the adapters' gradients are added to the store's in the backward pass."""
    params = [site.group.params for layer in layers for site in layer.sites if site.group is not None]
    found: Tensor = _Layers.apply(x, layers, rows, lanes, coded, torch.is_grad_enabled(), *params)
    return found
