"""The adapters of a pack: one flat store of parameters, and the wrappers that put them on the frozen base."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.engine.lowrank import A_OFFSET, B_OFFSET, H_COLUMN, RANK, adapted_linear
from sweeper.placement import Target

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

    def attach(self, params: Tensor, work: Tensor, table: Tensor, scale: Tensor, hidden: int) -> None:
        self.params, self.work, self.table, self.scale, self.hidden = params, work, table, scale, hidden
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
            x.reshape(-1, x.shape[-1]), self.weights, self.biases, self.params, self.work, self.table,
            self.scale, lanes.slots, lanes.dropout, lanes.seeds, self.salts, self.hidden, tokens,
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


class AdapterBank:
    """Parameters, gradients and Adam moments of every slot, and the wrappers on the base model.

    Args:
        targets: all adaptable modules of the base.
        capacities: for each slot, module name -> highest rank it may ever hold. What is absent takes no memory.

    The flat store holds, group by group, slot by slot and member by member, A `[rank, in]` then B `[rank, out]`. `work`
    is what the products read: that store, or on CUDA its copy in the base model's precision, kept by the optimiser.
    """

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
        self._dropout = [0.0] * count
        used = set().union(*capacities) if capacities else set()
        self.member_targets = _groups(targets, used)
        self.segments: list[Segment] = []
        bounds = self._lay_out()
        size = bounds[-1]
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        dtype = next(model.parameters()).dtype
        copied = device.type == "cuda" and dtype != torch.float32
        self.work = torch.zeros(size, dtype=dtype, device=device) if copied else self.params
        self.block_slot = self._block_slots(size).to(device)
        self.tables = _Mirrored([count * len(members) * 4 for members in self.member_targets], torch.int32, device)
        self.scales = _Mirrored([count * len(members) for members in self.member_targets], torch.float32, device)
        self.wrappers: dict[str, Adapted | AdaptedEmbedding] = {}
        self.groups: list[Group | AdaptedEmbedding] = []
        for index, members in enumerate(self.member_targets):
            self._attach(index, members, bounds[index], bounds[index + 1], count, device)
        self._upload()
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
        for segment in own:
            row = self.tables.host[index].view(count, len(members), 4)[segment.slot, segment.member]
            row[A_OFFSET], row[B_OFFSET] = segment.a - start, segment.b - start
            row[H_COLUMN] = segment.member * widest
        table = self.tables.device[index].view(count, len(members), 4)
        scale = self.scales.device[index].view(count, len(members))
        self.groups.append(group)
        group.attach(params, self.work[start:stop], table, scale, widest * len(members))

    def install(self) -> None:
        """Puts the wrappers on the base model. The frozen weights are untouched."""
        for name, wrapper in self.wrappers.items():
            _replace(self.model, name, wrapper)

    def uninstall(self) -> None:
        """Gives the base model its own modules back."""
        for name, wrapper in self.wrappers.items():
            _replace(self.model, name, wrapper.base)

    @property
    def graphable(self) -> bool:
        return not any(isinstance(group, AdaptedEmbedding) for group in self.groups)

    def fits(self, slot: int, adapter: AdapterSpec) -> bool:
        capacity = self.capacities[slot]
        return all(rank <= capacity.get(name, 0) for name, rank in adapter.ranks.items())

    @torch.no_grad()
    def assign(self, slot: int, adapter: AdapterSpec) -> None:
        """Gives a slot to a run with a fresh adapter: A uniform as PEFT draws it, B zero, moments zero.

        The draw depends on the run's seed and the module's name only, so arms that share a module share its start.
        """
        self._empty(slot)
        # drawn on the host into one piece: a GPU is given few long copies, not a handful for each module
        staged = torch.zeros(sum(stop - start for start, stop in self.spans[slot]))
        place = 0
        for segment in self.by_slot[slot]:
            rank = adapter.ranks.get(segment.target.name, 0)
            if rank:
                _draw(segment, rank, staged[place:], adapter.seed)
                self._entry(segment, rank, adapter.scales[segment.target.name])
            place += segment.end - segment.a
        moved, place = staged.to(self.params.device), 0
        for start, stop in self.spans[slot]:
            self.params[start:stop] = moved[place : place + stop - start]
            place += stop - start
        self.refresh(slot)
        self._upload()
        self._drop(slot, adapter.dropout)

    def release(self, slot: int) -> None:
        """Empties a slot; the others keep every bit of their state."""
        self._empty(slot)
        self._upload()
        self._drop(slot, 0.0)

    @torch.no_grad()
    def _empty(self, slot: int) -> None:
        for store in (self.params, self.grads, self.exp_avg, self.exp_avg_sq):
            for start, stop in self.spans[slot]:
                store[start:stop] = 0
        for segment in self.by_slot[slot]:
            self._entry(segment, 0, 0.0)

    def _entry(self, segment: Segment, rank: int, scale: float) -> None:
        members = len(self.member_targets[segment.group])
        row = segment.slot * members + segment.member
        self.tables.host[segment.group][4 * row + RANK] = rank
        self.scales.host[segment.group][row] = scale

    def _upload(self) -> None:
        self.tables.upload()
        self.scales.upload()

    def _drop(self, slot: int, dropout: float) -> None:
        self._dropout[slot] = dropout
        self.lanes.dropout[slot] = dropout
        self.lanes.drop = any(self._dropout)

    @torch.no_grad()
    def refresh(self, slot: int) -> None:
        """Brings the working copy up to date, after parameters were written by anything but the optimiser."""
        if self.work is not self.params:
            for start, stop in self.spans[slot]:
                self.work[start:stop] = self.params[start:stop]

    def views(self, segment: Segment, rank: int, store: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A [rank, in] and transposed B [rank, out] of a segment, in the parameters or a store of their layout."""
        store = self.params if store is None else store
        fan_in, fan_out = segment.target.in_features, segment.target.out_features
        return (
            store[segment.a : segment.a + rank * fan_in].view(rank, fan_in),
            store[segment.b : segment.b + rank * fan_out].view(rank, fan_out),
        )

    @torch.no_grad()
    def saved(self, slot: int, adapter: AdapterSpec) -> dict[str, tuple[Tensor, Tensor]]:
        """As `adapter`, copied to the host all at once."""
        spans = self.spans[slot]
        moved = torch.cat([self.params[start:stop] for start, stop in spans] or [self.params[:0]]).cpu()
        found, place = {}, 0
        for segment in self.by_slot[slot]:
            rank = adapter.ranks.get(segment.target.name, 0)
            if rank:
                own = moved[place : place + segment.end - segment.a]
                fan_in, fan_out = segment.target.in_features, segment.target.out_features
                b = own[segment.b - segment.a :]
                found[segment.target.name] = (
                    own[: rank * fan_in].view(rank, fan_in), b[: rank * fan_out].view(rank, fan_out)
                )  # fmt: skip
            place += segment.end - segment.a
        return found

    def adapter(self, slot: int, adapter: AdapterSpec, store: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> (A [rank, in], B transposed [rank, out]) of the run that holds a slot; views, not copies."""
        return {
            segment.target.name: self.views(segment, adapter.ranks[segment.target.name], store)
            for segment in self.by_slot[slot]
            if segment.target.name in adapter.ranks
        }


class _Mirrored:
    """Small tensors that the host writes and the device reads, moved there all at once."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(sum(sizes), dtype=dtype)
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        self.host, self.device = self._host.split(list(sizes)), self._device.split(list(sizes))

    def upload(self) -> None:
        if self._device is not self._host:
            self._device.copy_(self._host)


def _draw(segment: Segment, rank: int, values: Tensor, seed: int) -> None:
    """Fresh A and B of a segment whose memory begins at `values[0]`."""
    fan_in, fan_out = segment.target.in_features, segment.target.out_features
    generator = torch.Generator().manual_seed(_hash(f"{seed}/{segment.target.name}"))
    if segment.target.kind == "embedding":
        values[segment.b - segment.a :][: rank * fan_out].normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(fan_in)
        values[: rank * fan_in].uniform_(-bound, bound, generator=generator)


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
