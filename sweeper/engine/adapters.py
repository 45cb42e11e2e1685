"""The adapters of a pack: one flat store of parameters, and the wrappers that put them on the frozen base."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.engine import starts
from sweeper.engine.forms import AdapterSpec, Capacity
from sweeper.engine.gain import Gain
from sweeper.engine.lowrank import A_OFFSET, B_OFFSET, H_COLUMN, RANK, adapted_linear
from sweeper.engine.shared import Shared, draw
from sweeper.placement import Target

__all__ = ["AdapterBank", "AdapterSpec", "Capacity"]

BLOCK = 64  # values; a segment starts at a multiple of it, so a block belongs to one slot

MOST_MEMBERS = 3  # of a group: the kernels take that many output tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Where one slot's adapter of one module lies in the flat store: A `[rank, in]` at `a`, B `[rank, out]` at `b`.

    `extras` values at `x` are DoRA's magnitudes, or VeRA's factors of `capacity` ranks and of the outputs.
    """

    target: Target
    slot: int
    group: int
    member: int
    capacity: int
    a: int
    b: int
    x: int = 0
    extras: int = 0

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
    gain: bool = False
    share: bool = False
    host_slots: tuple[int, ...] = field(default=())

    @property
    def flags(self) -> tuple[bool, ...]:
        """What the layers look at on the host: a step that was captured under others does other things."""
        return self.drop, self.gain, self.share


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

    def attach(self, params: Tensor, table: Tensor, scale: Tensor, hidden: int) -> None:
        self.params, self.table, self.scale, self.hidden = params, table, scale, hidden
        salts = [starts.seed_of(target.name) for target in self.targets]
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
        capacities: for each slot, module name -> highest rank it may ever hold, or what else it may hold. What is
            absent takes no memory.

    The flat store holds, group by group, slot by slot and member by member, A `[rank, in]` then B `[rank, out]`, and
    after each group, where a slot of it may hold a DoRA or VeRA, a table `[slot, values]` of their extra values.
    `rates` is each value's learning rate over its run's (0: frozen), None where every value of every slot has its
    run's.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        capacities: Sequence[Capacity | Mapping[str, int]],
        device: torch.device,
    ) -> None:
        self.model, self.capacities = model, tuple(Capacity.of(capacity) for capacity in capacities)
        count = len(capacities)
        self.lanes = Lanes(
            torch.full((count,), -1, dtype=torch.int32, device=device),
            torch.zeros(count, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
        )
        used = {name for capacity in self.capacities for name in capacity.ranks}
        self.member_targets = _groups(targets, used)
        self.segments: list[Segment] = []
        bounds = self._lay_out()
        size = bounds[-1]
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        stores = frozenset[str]().union(*(capacity.stores for capacity in self.capacities))
        self.rates = torch.ones(size, device=device) if "rates" in stores else None
        self.rated = [False] * count
        self.held: list[AdapterSpec | None] = [None] * count
        self.block_slot = self._block_slots(size).to(device)
        self.wrappers: dict[str, Adapted | AdaptedEmbedding] = {}
        self.groups: list[Group | AdaptedEmbedding] = []
        for index, members in enumerate(self.member_targets):
            self._attach(index, members, bounds[2 * index], bounds[2 * index + 1], count, device)
        self.by_slot = [[segment for segment in self.segments if segment.slot == slot] for slot in range(count)]
        self.spans = [_merged([span for s in own for span in _spans(s)]) for own in self.by_slot]
        self.shared = {
            slot: Shared.empty(
                max(s.capacity for s in self.by_slot[slot]),
                [s.target for s in self.by_slot[slot] if s.target.kind != "embedding"],
                device,
            )
            for slot, own in enumerate(self.capacities)
            if "vera" in own.forms
        }

    def _lay_out(self) -> list[int]:
        bounds, offset = [0], 0
        self.extras: list[tuple[int, int, list[int]]] = []
        for group, members in enumerate(self.member_targets):
            found = []
            for slot, capacity in enumerate(self.capacities):
                for member, target in enumerate(members):
                    rank = capacity.ranks.get(target.name, 0)
                    if not rank:
                        continue
                    a, b = offset, offset + _padded(rank * target.in_features)
                    offset = b + _padded(rank * target.out_features)
                    found.append(Segment(target=target, slot=slot, group=group, member=member, capacity=rank, a=a, b=b))
            bounds.append(offset)
            columns, width = self._columns(members)
            self.extras.append((offset, width, columns))
            for segment in found:
                x = offset + segment.slot * width + columns[segment.member]
                extras = self.capacities[segment.slot].extra(segment.target)
                self.segments.append(replace(segment, x=x, extras=extras))
            offset += width * len(self.capacities)
            bounds.append(offset)
        return bounds

    def _columns(self, members: Sequence[Target]) -> tuple[list[int], int]:
        """Where each member's extra values begin in its group's table, and the width of that."""
        widths = [_padded(max(capacity.extra(target) for capacity in self.capacities)) for target in members]
        return [sum(widths[:member]) for member in range(len(members))], sum(widths)

    def _block_slots(self, size: int) -> Tensor:
        slots = torch.zeros(size // BLOCK, dtype=torch.int64)
        for segment in self.segments:
            slots[segment.a // BLOCK : segment.end // BLOCK] = segment.slot
        for start, width, _ in self.extras:
            for slot in range(len(self.capacities)):
                slots[(start + slot * width) // BLOCK : (start + (slot + 1) * width) // BLOCK] = slot
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
        if isinstance(group, Group) and any("dora" in self.capacities[segment.slot].forms for segment in own):
            group.gain = Gain(group.weights, self._magnitude(index), self.extras[index][2])
        group.attach(params, table.to(device), scale, widest * len(members))

    def _magnitude(self, index: int) -> Tensor:
        """The table [slot, values] of a group's extra values as a leaf of its own."""
        start, width, _ = self.extras[index]
        part = slice(start, start + width * len(self.capacities))
        magnitude = self.params[part].view(-1, width).detach().requires_grad_()
        magnitude.grad = self.grads[part].view(-1, width)
        return magnitude

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
        return self.capacities[slot].holds(adapter.capacity)

    @torch.no_grad()
    def assign(self, slot: int, adapter: AdapterSpec, *, fresh: bool = True) -> None:
        """Gives a slot to a run with a fresh adapter, moments zero; not `fresh`: what it holds is to be written yet."""
        self.release(slot)
        self.held[slot], self.rated[slot] = adapter, adapter.rated
        for segment in self._own(slot, adapter):
            name = segment.target.name
            group = self.groups[segment.group]
            group.table[slot, segment.member, RANK] = adapter.ranks[name]
            group.scale[slot, segment.member] = adapter.scales[name]
            if isinstance(group, Group) and group.gain is not None:
                group.gain.switch(slot, segment.member, adapter.form == "dora")
        if adapter.form == "vera":
            targets = [segment.target for segment in self._own(slot, adapter)]
            self.shared[slot].fill(*draw(max(adapter.ranks.values()), targets, adapter.shared[1]))
        self.set_rates(slot, 0)
        if fresh:
            for segment in self._own(slot, adapter):
                self._begin(segment, adapter)
        self.lanes.dropout[slot] = adapter.dropout
        self._note_flags()

    def _own(self, slot: int, adapter: AdapterSpec) -> list[Segment]:
        return [segment for segment in self.by_slot[slot] if segment.target.name in adapter.ranks]

    def _begin(self, segment: Segment, adapter: AdapterSpec) -> None:
        """Writes the start of a module's adapter to its empty segment."""
        parts = self.parts(segment, adapter)
        group = self.groups[segment.group]
        if adapter.form == "vera":
            parts[0].fill_(adapter.shared[0])
            return
        a, b = parts[:2]
        trained = adapter.trained.get(segment.target.name, len(a))
        if adapter.start == "uniform":
            for part, value in zip((a, b), starts.draw(segment.target, trained, adapter.seed), strict=True):
                part[:trained] = value
        else:
            assert isinstance(group, Group)
            first = starts.principal(self.model, group.weights[segment.member], segment.target, adapter)
            for part, value, sign in zip((a, b), first, (1, -1), strict=True):
                part[:trained], part[trained:] = value, sign * value
        if adapter.form == "dora":
            assert isinstance(group, Group)
            assert group.gain is not None
            scale = group.scale[segment.slot, segment.member]
            parts[2].copy_(group.gain.adapted_norm(segment.member, *self.views(segment, segment.capacity), scale))

    @torch.no_grad()
    def set_rates(self, slot: int, step: int) -> None:
        """Says which values of a slot train from a step (from 0) on, and at which rate over the run's."""
        adapter = self.held[slot]
        if self.rates is None or adapter is None:
            return
        for segment in self._own(slot, adapter):
            for start, stop in _spans(segment):
                self.rates[start:stop] = 1.0
            if not adapter.rated:
                continue
            a, b = self.views(segment, adapter.ranks[segment.target.name], self.rates)
            a.zero_(), b.zero_()
            if adapter.form == "vera":
                factors = self.parts(segment, adapter, self.rates)
                factors[0].fill_(adapter.rate_a), factors[1].fill_(adapter.rate_b)
                continue
            trained = adapter.trained.get(segment.target.name, len(a))
            first = trained * adapter.restarts.block(step) if adapter.restarts else 0
            a[first : first + trained], b[first : first + trained] = adapter.rate_a, adapter.rate_b
            if adapter.form == "dora":
                self.parts(segment, adapter, self.rates)[2].fill_(adapter.rate_b)

    @torch.no_grad()
    def derive(self, slots: Iterable[int] | None = None) -> None:
        """Brings up to date what follows from the parameters: DoRA's norms and VeRA's A and B; of all slots, or some.

        Without a wait for the device, and the same work whatever the slots hold, so that a captured step may do it.
        """
        if not (self.lanes.gain or self.lanes.share):
            return
        for slot in range(len(self.capacities)) if slots is None else slots:
            for segment in self.by_slot[slot]:
                group = self.groups[segment.group]
                if not isinstance(group, Group):
                    continue
                a, b = self.views(segment, segment.capacity)
                if self.lanes.share and slot in self.shared:
                    self.shared[slot].derive(a, b, *self._factors(segment, self.params))
                if self.lanes.gain and group.gain is not None and "dora" in self.capacities[slot].forms:
                    group.gain.measure(slot, segment.member, a, b, group.scale[slot, segment.member])

    @torch.no_grad()
    def project(self) -> None:
        """Turns the gradients of VeRA's A and B into those of its factors."""
        if not self.lanes.share:
            return
        for slot, shared in self.shared.items():
            for segment in self.by_slot[slot]:
                if segment.target.kind == "embedding":
                    continue
                a, b = self.views(segment, segment.capacity, self.grads)
                shared.project(a, b, *self._factors(segment, self.grads))

    def _factors(self, segment: Segment, store: Tensor) -> tuple[Tensor, Tensor]:
        """VeRA's factors of the ranks [capacity] and outputs [out] of a segment."""
        middle = segment.x + segment.capacity
        return store[segment.x : middle], store[middle : middle + segment.target.out_features]

    @torch.no_grad()
    def release(self, slot: int) -> None:
        """Empties a slot; the others keep every bit of their state."""
        self.held[slot], self.rated[slot] = None, False
        for segment in self.by_slot[slot]:
            for store in (self.params, self.grads, self.exp_avg, self.exp_avg_sq):
                for start, stop in _spans(segment):
                    store[start:stop] = 0
            group = self.groups[segment.group]
            group.table[slot, segment.member, RANK] = 0
            if isinstance(group, Group) and group.gain is not None:
                group.gain.switch(slot, segment.member, False)
        if slot in self.shared:
            self.shared[slot].clear()
        self.lanes.dropout[slot] = 0
        self._note_flags()

    def _note_flags(self) -> None:
        held = [adapter for adapter in self.held if adapter is not None]
        self.lanes.drop = any(adapter.dropout > 0 for adapter in held)
        self.lanes.gain = any(adapter.form == "dora" for adapter in held)
        self.lanes.share = any(adapter.form == "vera" for adapter in held)

    def stores(self, adapter: AdapterSpec) -> list[Tensor]:
        """The stores that make up the state of a run: values, moments, and what else its options keep."""
        return [self.params, self.exp_avg, self.exp_avg_sq]

    def views(self, segment: Segment, rank: int, store: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A [rank, in] and transposed B [rank, out] of a segment, in the parameters or a store of their layout."""
        store = self.params if store is None else store
        fan_in, fan_out = segment.target.in_features, segment.target.out_features
        return (
            store[segment.a : segment.a + rank * fan_in].view(rank, fan_in),
            store[segment.b : segment.b + rank * fan_out].view(rank, fan_out),
        )

    def parts(self, segment: Segment, adapter: AdapterSpec, store: Tensor | None = None) -> tuple[Tensor, ...]:
        """What makes up a module's adapter, as views: A [rank, in] and B transposed [rank, out]; of a DoRA also its
        magnitudes [out]; of a VeRA its factors [rank] and [out] alone.
        """
        store = self.params if store is None else store
        rank = adapter.ranks[segment.target.name]
        if adapter.form == "vera":
            d, b = self._factors(segment, store)
            return d[:rank], b
        pair = self.views(segment, rank, store)
        return (*pair, store[segment.x : segment.x + segment.target.out_features]) if adapter.form == "dora" else pair

    def adapter(self, slot: int, adapter: AdapterSpec, store: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> the parts of the adapter of the run that holds a slot; views, not copies."""
        return {segment.target.name: self.parts(segment, adapter, store) for segment in self._own(slot, adapter)}


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


def _spans(segment: Segment) -> list[tuple[int, int]]:
    """The parts of the flat store that are a segment's own."""
    return [(segment.a, segment.end)] + ([(segment.x, segment.x + _padded(segment.extras))] if segment.extras else [])
