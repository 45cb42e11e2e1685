"""What stands in the base model for the modules that are adapted, and the lanes that all of it reads."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.lora.dora import Gain
from sweeper.lora.lowrank import ROW_STRIDE, adapted_linear
from sweeper.lora.seeds import seed_of
from sweeper.models.architecture import Target


@dataclass
class Lanes:
    """How the rows of the present batch are shared out; one object that every adapted module reads.

    `slots` [L] int32 is the slot of each lane (-1: the bare base), `tokens` the padded length of a sequence.
    """

    slots: Tensor
    dropout: Tensor
    seeds: Tensor
    noise: Tensor
    tokens: int = 1
    drop: bool = False
    gain: bool = False
    share: bool = False
    noisy: bool = False
    penalised: tuple[int, ...] = ()
    host_slots: tuple[int, ...] = field(default=())

    @property
    def flags(self) -> tuple[Any, ...]:
        """What a step looks at on the host: one that was captured under other flags does other things."""
        return self.drop, self.gain, self.share, self.noisy, self.penalised


class Group(nn.Module):
    """Up to three frozen matrices on the same input, computed in one go with every lane's adapters."""

    def __init__(self, targets: Sequence[Target], modules: Sequence[Any], lanes: Lanes) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.lanes = lanes
        self.weights = [
            module.weight.data if target.kind == "conv1d" else module.weight.data.t()
            for target, module in zip(targets, modules, strict=True)
        ]
        self.biases = _biases(modules)
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()
        self.waiting = 0
        self.gain: Gain | None = None

    def attach(self, params: Tensor, work: Tensor, table: Tensor, scale: Tensor, hidden: int) -> None:
        self.params, self.work, self.table, self.scale, self.hidden = params, work, table, scale, hidden
        salts = [seed_of(target.name) for target in self.targets]
        self.salts = torch.tensor(salts, dtype=torch.int64, device=params.device)

    def forward(self, x: Tensor, member: int) -> Tensor:
        """Output of one member. The first that is asked computes all; the siblings fetch theirs."""
        if self.waiting == 0 or self.input is not x:
            self.parts = self.products(x)
            self.input, self.waiting = x, len(self.parts)
        part = self.parts[member]
        self.waiting -= 1
        if self.waiting == 0:
            self.input, self.parts = None, ()
        return part

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        lanes = self.lanes
        # from the shape where it can be: a plain number would be a constant of the compiled layer, one for each length
        tokens = x.shape[1] if x.dim() == 3 else lanes.tokens
        *ys, _ = adapted_linear(
            x.reshape(-1, x.shape[-1]), self.weights, self.biases, self.params, self.work, self.table,
            self.scale, lanes.slots, lanes.dropout, lanes.seeds, self.salts, self.hidden, tokens,
            lanes.drop and self.training,
        )  # fmt: skip
        if self.gain is not None and lanes.gain:
            ys = self.gain.apply(ys, self.biases, lanes.slots)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class Adapted(nn.Module):
    """Stands in for one linear module of the base; `base` is the module it replaces."""

    base: Any

    def __init__(self, base: nn.Module, group: Group, member: int) -> None:
        super().__init__()
        self.base, self.group, self.member = base, group, member

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @contextlib.contextmanager
    def one_sequence(self) -> Iterator[None]:
        """Within it a lane's rows are target tokens: dropout counts them as one sequence, whatever the padding."""
        lanes = self.group.lanes
        tokens, lanes.tokens = lanes.tokens, ROW_STRIDE
        try:
            yield
        finally:
            lanes.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.group(x, self.member)


class _EmbeddingLookup(torch.autograd.Function):
    """Frozen embedding rows plus s * A[:, id]^T B of each lane's slot."""

    @staticmethod
    def forward(ctx, ids, weight, params, group, slots):
        y = weight[ids]
        hidden = []
        for rows, a, b, scale in group.walk(params, slots, len(ids)):
            part = (a[:, ids[rows]].t() * scale).to(y.dtype)
            y[rows] += part @ b.to(y.dtype)
            hidden.append(part)
        ctx.save_for_backward(ids, params, *hidden)
        ctx.group, ctx.slots = group, slots
        return y

    @staticmethod
    def backward(ctx, dy):
        ids, params, *hidden = ctx.saved_tensors
        dparams = torch.zeros_like(params)
        walk = zip(
            ctx.group.walk(params, ctx.slots, len(ids)),
            ctx.group.walk(dparams, ctx.slots, len(ids)),
            hidden,
            strict=True,
        )
        for (rows, _, b, scale), (_, grad_a, grad_b, _), part in walk:
            grad_b.copy_(part.t() @ dy[rows])
            grad_a.index_add_(1, ids[rows], (dy[rows] @ b.to(dy.dtype).t() * scale).t().to(grad_a.dtype))
        return None, None, dparams, None, None


class AdaptedEmbedding(nn.Module):
    """Stands in for the token embedding. Its lanes are walked on the host, so such a pack runs without CUDA graphs."""

    def __init__(self, base: nn.Embedding, target: Target, lanes: Lanes) -> None:
        super().__init__()
        self.base, self.target, self.lanes = base, target, lanes

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def attach(self, params: Tensor, _work: Tensor, table: Tensor, scale: Tensor, _hidden: int) -> None:
        self.params, self.table, self.scale = params, table, scale

    def walk(self, params: Tensor, slots: Sequence[int], rows: int) -> Iterator[tuple[slice, Tensor, Tensor, float]]:
        share = rows // len(slots)
        for lane, slot in enumerate(slots):
            rank, a, b, _ = self.table[slot, 0].tolist() if slot >= 0 else (0, 0, 0, 0)
            if rank:
                yield (
                    slice(lane * share, (lane + 1) * share),
                    params[a : a + rank * self.target.in_features].view(rank, -1),
                    params[b : b + rank * self.target.out_features].view(rank, -1),
                    float(self.scale[slot, 0]),
                )

    def forward(self, ids: Tensor) -> Tensor:
        flat = _EmbeddingLookup.apply(ids.reshape(-1), self.base.weight, self.params, self, self.lanes.host_slots)
        return flat.view(*ids.shape, -1) * getattr(self.base, "embed_scale", 1.0)


def _biases(modules: Sequence[Any]) -> list[Tensor]:
    """Bias of every module, zero where one has none; empty where none has one."""
    if all(getattr(module, "bias", None) is None for module in modules):
        return []
    return [m.weight.new_zeros(m.weight.shape[0]) if m.bias is None else m.bias.data for m in modules]
