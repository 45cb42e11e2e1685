"""The adapters of a pack: one flat store of parameters, and the wrappers that put them on the frozen base."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sweeper.engine.lowrank import A_OFFSET, B_OFFSET, H_COLUMN, RANK, adapted_linear
from sweeper.placement import Target

if TYPE_CHECKING:
    from sweeper.engine.optimizer import PackedAdamW

BLOCK = 64  # values; a segment starts at a multiple of it, so a block belongs to one slot

MOST_MEMBERS = 3  # of a group: the kernels take that many output tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """What one run puts on the base: module name -> rank and -> scale (alpha / rank, or what the method says)."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dropout: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Where one slot's adapter of one module lies in the flat store: A `[rank, in]` at `a`, B `[rank, out]` at `b`."""

    target: Target
    slot: int
    group: int
    member: int
    capacity: int
    a: int
    b: int

    @property
    def end(self) -> int:
        return self.b + _padded(self.capacity * self.target.out_features)


@dataclass
class Lanes:
    """How the rows of the present batch are shared out; one object that every adapted module reads.

    `slots` [L] int32 is the slot of each lane (-1: the bare base), `tokens` the padded length of a sequence.
    """

    slots: Tensor
    dropout: Tensor
    seeds: Tensor
    tokens: int = 1
    drop: bool = False
    host_slots: tuple[int, ...] = field(default=())


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

    def attach(self, params: Tensor, table: Tensor, scale: Tensor, hidden: int) -> None:
        self.params, self.table, self.scale, self.hidden = params, table, scale, hidden
        salts = [_hash(target.name) for target in self.targets]
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
            x.reshape(-1, x.shape[-1]), self.weights, self.biases, self.params, self.table, self.scale,
            lanes.slots, lanes.dropout, lanes.seeds, self.salts, self.hidden, tokens,
            lanes.drop and self.training,
        )  # fmt: skip
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

    def attach(self, params: Tensor, table: Tensor, scale: Tensor, hidden: int) -> None:
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


class AdapterBank:
    """Parameters, gradients and Adam moments of every slot, and the wrappers on the base model.

    Args:
        targets: all adaptable modules of the base.
        capacities: for each slot, module name -> highest rank it may ever hold. What is absent takes no memory.

    The flat store holds, group by group, slot by slot and member by member, A `[rank, in]` then B `[rank, out]`.
    """

    mixes = True

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], capacities: Sequence[Mapping[str, int]], device: torch.device
    ) -> None:
        self.model, self.capacities = model, tuple(dict(capacity) for capacity in capacities)
        count = len(capacities)
        self.lanes = Lanes(
            torch.full((count,), -1, dtype=torch.int32, device=device),
            torch.zeros(count, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
        )
        used = set().union(*capacities) if capacities else set()
        self.member_targets = _groups(targets, used)
        self.segments: list[Segment] = []
        bounds = self._lay_out()
        size = bounds[-1]
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        self.block_slot = self._block_slots(size).to(device)
        self.wrappers: dict[str, Adapted | AdaptedEmbedding] = {}
        self.groups: list[Group | AdaptedEmbedding] = []
        for index, members in enumerate(self.member_targets):
            self._attach(index, members, bounds[index], bounds[index + 1], count, device)
        self.by_slot = [[segment for segment in self.segments if segment.slot == slot] for slot in range(count)]
        self.spans = [_merged([(s.a, s.end) for s in own]) for own in self.by_slot]

    def _lay_out(self) -> list[int]:
        bounds, offset = [0], 0
        for group, members in enumerate(self.member_targets):
            for slot, capacity in enumerate(self.capacities):
                for member, target in enumerate(members):
                    rank = capacity.get(target.name, 0)
                    if not rank:
                        continue
                    a, b = offset, offset + _padded(rank * target.in_features)
                    offset = b + _padded(rank * target.out_features)
                    self.segments.append(
                        Segment(target=target, slot=slot, group=group, member=member, capacity=rank, a=a, b=b)
                    )
            bounds.append(offset)
        return bounds

    def _block_slots(self, size: int) -> Tensor:
        slots = torch.zeros(size // BLOCK, dtype=torch.int64)
        for segment in self.segments:
            slots[segment.a // BLOCK : segment.end // BLOCK] = segment.slot
        return slots

    def _attach(self, index: int, members, start: int, stop: int, count: int, device) -> None:
        modules = [_base_of(self.model.get_submodule(target.name)) for target in members]
        group: Group | AdaptedEmbedding
        if members[0].kind == "embedding":
            group = self.wrappers[members[0].name] = AdaptedEmbedding(modules[0], members[0], self.lanes)
        else:
            group = linear = Group(members, modules, self.lanes)
            for member, (target, module) in enumerate(zip(members, modules, strict=True)):
                self.wrappers[target.name] = Adapted(module, linear, member)
        params = self.params[start:stop].detach().requires_grad_()
        params.grad = self.grads[start:stop]
        own = [segment for segment in self.segments if segment.group == index]
        widest = -(-max(segment.capacity for segment in own) // 16) * 16
        table = torch.zeros(count, len(members), 4, dtype=torch.int32)
        for segment in own:
            row = table[segment.slot, segment.member]
            row[A_OFFSET], row[B_OFFSET] = segment.a - start, segment.b - start
            row[H_COLUMN] = segment.member * widest
        scale = torch.zeros(count, len(members), device=device)
        self.groups.append(group)
        group.attach(params, table.to(device), scale, widest * len(members))

    def install(self) -> None:
        """Puts the wrappers on the base model. The frozen weights are untouched."""
        for name, wrapper in self.wrappers.items():
            _replace(self.model, name, wrapper)

    def uninstall(self) -> None:
        """Gives the base model its own modules back."""
        for name, wrapper in self.wrappers.items():
            _replace(self.model, name, wrapper.base)

    def make_optimizer(self) -> "PackedAdamW":
        from sweeper.engine.optimizer import PackedAdamW

        return PackedAdamW(self)

    @property
    def serving(self) -> Any:
        """The model that the present lanes run through."""
        return self.model

    @property
    def decoder(self) -> Any:
        """Its inner model, which gives hidden states."""
        return self.model.base_model

    @property
    def state_bytes(self) -> int:
        """Of adapters, gradients and moments."""
        return 16 * self.params.numel()

    @property
    def draws(self) -> bool:
        """Whether the coming step draws random numbers."""
        return self.lanes.drop

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass."""
        self.lanes.seeds.copy_(torch.tensor(seeds), non_blocking=True)

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # masks are counter-based: nothing is drawn from torch's generator

    def penalty(self) -> Tensor | None:
        return None

    @torch.no_grad()
    def snapshot(self, slot: int, adapter: AdapterSpec) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> A, B, and their Adam moments, on the host."""
        parts = [self.adapter(slot, adapter, store) for store in (self.params, self.exp_avg, self.exp_avg_sq)]
        return {name: tuple(t.to("cpu", copy=True) for part in parts for t in part[name]) for name in parts[0]}

    @torch.no_grad()
    def restore(self, slot: int, adapter: AdapterSpec, state: Mapping[str, tuple[Tensor, ...]], step: int) -> None:
        """Puts a snapshot, taken after `step` steps, back into a slot."""
        for place, store in enumerate((self.params, self.exp_avg, self.exp_avg_sq)):
            for name, views in self.adapter(slot, adapter, store).items():
                for view, saved in zip(views, state[name][2 * place : 2 * place + 2], strict=True):
                    view.copy_(saved)

    @property
    def graphable(self) -> bool:
        return not any(isinstance(group, AdaptedEmbedding) for group in self.groups)

    def fits(self, slot: int, adapter: Any) -> bool:
        capacity = self.capacities[slot]
        return isinstance(adapter, AdapterSpec) and all(rank <= capacity.get(name, 0) for name, rank in adapter.ranks.items())

    @torch.no_grad()
    def assign(self, slot: int, adapter: AdapterSpec) -> None:
        """Gives a slot to a run with a fresh adapter: A uniform as PEFT draws it, B zero, moments zero.

        The draw depends on the run's seed and the module's name only, so arms that share a module share its start.
        """
        self.release(slot)
        for segment in self.by_slot[slot]:
            rank = adapter.ranks.get(segment.target.name, 0)
            if not rank:
                continue
            generator = torch.Generator().manual_seed(_hash(f"{adapter.seed}/{segment.target.name}"))
            a, b = self.views(segment, rank)
            if segment.target.kind == "embedding":
                b.copy_(torch.randn(b.shape, generator=generator))
            else:
                bound = 1 / math.sqrt(segment.target.in_features)
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
            self.groups[segment.group].table[slot, segment.member, RANK] = rank
            self.groups[segment.group].scale[slot, segment.member] = adapter.scales[segment.target.name]
        self.lanes.dropout[slot] = adapter.dropout
        self.lanes.drop = bool((self.lanes.dropout > 0).any())

    @torch.no_grad()
    def release(self, slot: int) -> None:
        """Empties a slot; the others keep every bit of their state."""
        for segment in self.by_slot[slot]:
            for store in (self.params, self.grads, self.exp_avg, self.exp_avg_sq):
                store[segment.a : segment.end] = 0
            self.groups[segment.group].table[slot, segment.member, RANK] = 0
        self.lanes.dropout[slot] = 0
        self.lanes.drop = bool((self.lanes.dropout > 0).any())

    def views(self, segment: Segment, rank: int, store: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A [rank, in] and transposed B [rank, out] of a segment, in the parameters or a store of their layout."""
        store = self.params if store is None else store
        fan_in, fan_out = segment.target.in_features, segment.target.out_features
        return (
            store[segment.a : segment.a + rank * fan_in].view(rank, fan_in),
            store[segment.b : segment.b + rank * fan_out].view(rank, fan_out),
        )

    def adapter(self, slot: int, adapter: AdapterSpec, store: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> (A [rank, in], B transposed [rank, out]) of the run that holds a slot; views, not copies."""
        return {
            segment.target.name: self.views(segment, adapter.ranks[segment.target.name], store)
            for segment in self.by_slot[slot]
            if segment.target.name in adapter.ranks
        }


def _groups(targets: Sequence[Target], used: set[str]) -> list[tuple[Target, ...]]:
    """Targets that are computed together: those with one input, if any of them is adapted."""
    found = []
    for _, siblings in itertools.groupby(targets, key=lambda t: t.inputs if t.kind == "linear" else t.name):
        together = list(siblings)
        for start in range(0, len(together), MOST_MEMBERS):
            members = tuple(together[start : start + MOST_MEMBERS])
            if any(target.name in used for target in members):
                found.append(members)
    return found


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjoining spans joined, so that a slot is updated in few long strides."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _biases(modules: Sequence[Any]) -> list[Tensor]:
    """Bias of every module, zero where one has none; empty where none has one."""
    if all(getattr(module, "bias", None) is None for module in modules):
        return []
    return [m.weight.new_zeros(m.weight.shape[0]) if m.bias is None else m.bias.data for m in modules]


def _base_of(module: nn.Module) -> Any:
    return module.base if isinstance(module, Adapted | AdaptedEmbedding) else module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _padded(values: int) -> int:
    return -(-values // BLOCK) * BLOCK


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
