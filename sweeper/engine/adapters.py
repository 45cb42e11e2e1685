"""The adapters of a pack: one flat store of parameters, and the wrappers that put them on the frozen base."""

import bisect
import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sweeper.engine import penalty, starts
from sweeper.engine.forms import AdapterSpec, Capacity
from sweeper.engine.gain import Gain
from sweeper.engine.lowrank import A_OFFSET, B_OFFSET, H_COLUMN, RANK, adapted_linear
from sweeper.engine.shared import Shared, draw
from sweeper.placement import Target

if TYPE_CHECKING:
    from sweeper.engine.optimizer import PackedAdamW

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
        capacities: for each slot, module name -> highest rank it may ever hold, or what else it may hold. What is
            absent takes no memory.

    The flat store holds, group by group, slot by slot and member by member, A `[rank, in]` then B `[rank, out]`, and
    after each group, where a slot of it may hold a DoRA or VeRA, a table `[slot, values]` of their extra values.
    `work` is what the products read: that store, or on CUDA its copy in the base model's precision, kept by the
    optimiser. `rates` is each value's learning rate over its run's (0: frozen), None where all have their run's.
    """

    mixes = True

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
            torch.zeros(count, device=device),
        )
        self.penalties = torch.zeros(count, 3, device=device)
        used = {name for capacity in self.capacities for name in capacity.ranks}
        self.member_targets = _groups(targets, used)
        self.segments: list[Segment] = []
        bounds = self._lay_out()
        size = bounds[-1]
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        dtype = next(model.parameters()).dtype
        copied = device.type == "cuda" and dtype != torch.float32
        self.work = torch.zeros(size, dtype=dtype, device=device) if copied else self.params
        stores = frozenset[str]().union(*(capacity.stores for capacity in self.capacities))
        self.rates = torch.ones(size, device=device) if "rates" in stores else None
        self.copies = {name: torch.zeros(size, device=device) for name in sorted(stores - {"rates"})}
        self.rated = [False] * count
        self.held: list[AdapterSpec | None] = [None] * count
        self.block_slot = self._block_slots(size).to(device)
        self.tables = _Mirrored([count * len(members) * 4 for members in self.member_targets], torch.int32, device)
        self.scales = _Mirrored([count * len(members) for members in self.member_targets], torch.float32, device)
        self.wrappers: dict[str, Adapted | AdaptedEmbedding] = {}
        self.groups: list[Group | AdaptedEmbedding] = []
        for index, members in enumerate(self.member_targets):
            self._attach(index, members, bounds[2 * index], bounds[2 * index + 1], count, device)
        self._upload()
        self.by_slot = [[segment for segment in self.segments if segment.slot == slot] for slot in range(count)]
        self.spans = [_merged([span for s in own for span in _spans(s)]) for own in self.by_slot]
        self.staging = [_Staging(own, spans) for own, spans in zip(self.by_slot, self.spans, strict=True)]
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
        for segment in own:
            row = self.tables.host[index].view(count, len(members), 4)[segment.slot, segment.member]
            row[A_OFFSET], row[B_OFFSET] = segment.a - start, segment.b - start
            row[H_COLUMN] = segment.member * widest
        table = self.tables.device[index].view(count, len(members), 4)
        scale = self.scales.device[index].view(count, len(members))
        self.groups.append(group)
        if isinstance(group, Group) and any("dora" in self.capacities[segment.slot].forms for segment in own):
            group.gain = Gain(group.weights, self._magnitude(index), self.extras[index][2])
        group.attach(params, self.work[start:stop], table, scale, widest * len(members))

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
    def draws(self) -> bool:
        """Whether the coming step draws random numbers."""
        return self.lanes.drop or self.lanes.noisy

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass."""
        self.lanes.seeds.copy_(torch.tensor(seeds), non_blocking=True)

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # all of it is counter-based: nothing is drawn from torch's generator

    def snapshot(self, slot: int, adapter: AdapterSpec) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> the parts of its adapter, then their moments and what else is kept of them, on the host."""
        parts = [self.adapter(slot, adapter, store) for store in self.stores(adapter)]
        return {name: tuple(t.to("cpu", copy=True) for part in parts for t in part[name]) for name in parts[0]}

    @torch.no_grad()
    def restore(self, slot: int, adapter: AdapterSpec, state: Mapping[str, tuple[Tensor, ...]], step: int) -> None:
        """Puts a snapshot, taken after `step` steps, back into a slot."""
        for place, store in enumerate(self.stores(adapter)):
            for name, views in self.adapter(slot, adapter, store).items():
                saved = state[name][len(views) * place : len(views) * (place + 1)]
                for view, value in zip(views, saved, strict=True):
                    view.copy_(value)
        self.refresh(slot)

    @property
    def graphable(self) -> bool:
        return not any(isinstance(group, AdaptedEmbedding) for group in self.groups)

    def fits(self, slot: int, adapter: Any) -> bool:
        return isinstance(adapter, AdapterSpec) and self.capacities[slot].holds(adapter.capacity)

    @torch.no_grad()
    def assign(self, slot: int, adapter: AdapterSpec, *, fresh: bool = True) -> None:
        """Gives a slot to a run with a fresh adapter, moments zero; not `fresh`: what it holds is to be written yet."""
        self._empty(slot)
        self.held[slot], self.rated[slot] = adapter, adapter.rated
        # drawn on the host into one piece: a GPU is given few long copies, not a handful for each module
        staged = self.staging[slot]
        values = torch.zeros(staged.size)
        for segment in self._own(slot, adapter):
            self._entry(segment, adapter.ranks[segment.target.name], adapter.scales[segment.target.name])
            if fresh:
                self._begin(segment, adapter, self.parts(staged.segments[segment], adapter, values))
        staged.move(values, self.params)
        for store in self.stores(adapter)[3:]:
            staged.move(values, store)
        self.penalties[slot] = torch.tensor(adapter.penalties)
        self._switch_forms(slot, adapter)
        self.set_rates(slot, 0)
        self.refresh(slot)
        self._upload()
        self._note(slot, adapter)

    def _switch_forms(self, slot: int, adapter: AdapterSpec, *, on: bool = True) -> None:
        """Readies what a DoRA or VeRA has besides values in the store, or clears it."""
        own = self._own(slot, adapter)
        if adapter.form == "dora":
            for segment in own:
                self._gain(segment).switch(slot, segment.member, on)
        if adapter.form == "vera":
            self.shared[slot].clear()
            if on:
                targets = [segment.target for segment in own]
                self.shared[slot].fill(*draw(max(adapter.ranks.values()), targets, adapter.shared[1]))

    def _gain(self, segment: Segment) -> Gain:
        group = self.groups[segment.group]
        assert isinstance(group, Group)
        assert group.gain is not None
        return group.gain

    @property
    def state_bytes(self) -> int:
        """Memory of all that is kept of the adapters of every slot."""
        stores = [self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.copies.values()]
        stores += [self.work] if self.work is not self.params else []
        stores += [self.rates] if self.rates is not None else []
        stores += [matrix for shared in self.shared.values() for matrix in (shared.a, shared.b)]
        return sum(store.numel() * store.element_size() for store in stores)

    def _own(self, slot: int, adapter: AdapterSpec) -> list[Segment]:
        return [segment for segment in self.by_slot[slot] if segment.target.name in adapter.ranks]

    def _begin(self, segment: Segment, adapter: AdapterSpec, parts: tuple[Tensor, ...]) -> None:
        """Writes the start of a module's adapter to its parts, which are zero."""
        if adapter.form == "vera":
            parts[0].fill_(adapter.shared[0])
            return
        a, b = parts[:2]
        trained = adapter.trained.get(segment.target.name, len(a))
        if adapter.start == "uniform":
            for part, value in zip((a, b), starts.draw(segment.target, trained, adapter.seed), strict=True):
                part[:trained] = value
        else:
            group = self.groups[segment.group]
            assert isinstance(group, Group)
            first = starts.principal(self.model, group.weights[segment.member], segment.target, adapter)
            for part, value, sign in zip((a, b), first, (1, -1), strict=True):
                part[:trained], part[trained:] = value, sign * value
        if adapter.form == "dora":
            parts[2].copy_(self._gain(segment).squares[segment.member].sqrt())

    @torch.no_grad()
    def set_rates(self, slot: int, step: int) -> None:
        """Says which values of a slot train from a step (from 0) on, and at which rate over the run's."""
        adapter = self.held[slot]
        if self.rates is None or adapter is None:
            return
        staged = self.staging[slot]
        rates = torch.full((staged.size,), 0.0 if adapter.rated else 1.0)
        for segment in self._own(slot, adapter) if adapter.rated else ():
            self._rate(adapter, segment.target.name, step, self.parts(staged.segments[segment], adapter, rates))
        staged.move(rates, self.rates)

    @staticmethod
    def _rate(adapter: AdapterSpec, name: str, step: int, parts: tuple[Tensor, ...]) -> None:
        """Writes the rates of a module's parts."""
        trained = len(parts[0]) if adapter.form == "vera" else adapter.trained.get(name, len(parts[0]))
        first = trained * adapter.restarts.block(step) if adapter.restarts else 0
        rows = slice(None) if adapter.form == "vera" else slice(first, first + trained)
        parts[0][rows] = adapter.rate_a
        parts[1][rows] = adapter.rate_b
        for magnitude in parts[2:]:
            magnitude.fill_(adapter.rate_b)

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
                    if self.work is not self.params:
                        for copy, value in zip(self.views(segment, segment.capacity, self.work), (a, b), strict=True):
                            copy.copy_(value)
                if self.lanes.gain and group.gain is not None and "dora" in self.capacities[slot].forms:
                    group.gain.measure(slot, segment.member, a, b, group.scale[slot, segment.member])

    @torch.no_grad()
    def penalise(self, share: float) -> None:
        """Adds the gradients of the penalties, times `share`, of the runs that have any."""
        for slot in self.lanes.penalised:
            for segment in self.by_slot[slot]:
                a, b = self.views(segment, segment.capacity)
                live_a, live_b = a, b
                if self.rates is not None:
                    rate_a, rate_b = self.views(segment, segment.capacity, self.rates)
                    live_a, live_b = (x * (r.amax(1, keepdim=True) > 0) for x, r in ((a, rate_a), (b, rate_b)))
                scale = self.groups[segment.group].scale[slot, segment.member]
                found = penalty.gradients(a, b, live_a, live_b, scale, self.penalties[slot] * share)
                for gradient, more in zip(self.views(segment, segment.capacity, self.grads), found, strict=True):
                    gradient += more

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

    def release(self, slot: int) -> None:
        """Empties a slot; the others keep every bit of their state."""
        self._empty(slot)
        self._upload()
        self._note(slot, None)

    @torch.no_grad()
    def _empty(self, slot: int) -> None:
        former = self.held[slot]
        for store in (self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.copies.values()):
            for start, stop in self.spans[slot]:
                store[start:stop] = 0
        for segment in self.by_slot[slot]:
            self._entry(segment, 0, 0.0)
        if former is not None:
            self._switch_forms(slot, former, on=False)
        self.held[slot], self.rated[slot] = None, False

    def _entry(self, segment: Segment, rank: int, scale: float) -> None:
        members = len(self.member_targets[segment.group])
        row = segment.slot * members + segment.member
        self.tables.host[segment.group][4 * row + RANK] = rank
        self.scales.host[segment.group][row] = scale

    def _upload(self) -> None:
        self.tables.upload()
        self.scales.upload()

    def _note(self, slot: int, adapter: AdapterSpec | None) -> None:
        lanes = self.lanes
        lanes.dropout[slot] = adapter.dropout if adapter else 0.0
        lanes.noise[slot] = adapter.noise if adapter else 0.0
        held = [one for one in self.held if one is not None]
        lanes.drop = any(one.dropout > 0 for one in held)
        lanes.noisy = any(one.noise > 0 for one in held)
        lanes.gain = any(one.form == "dora" for one in held)
        lanes.share = any(one.form == "vera" for one in held)
        lanes.penalised = tuple(slot for slot, one in enumerate(self.held) if one is not None and any(one.penalties))

    @torch.no_grad()
    def refresh(self, slot: int) -> None:
        """Brings the working copy up to date, after parameters were written by anything but the optimiser."""
        if self.work is not self.params:
            for start, stop in self.spans[slot]:
                self.work[start:stop] = self.params[start:stop]

    def stores(self, adapter: AdapterSpec) -> list[Tensor]:
        """The stores that make up the state of a run: values, moments, and what else its options keep."""
        wanted = {"average": adapter.average is not None, "best": adapter.keep_best}
        kept = [self.copies[name] for name, needed in wanted.items() if needed]
        return [self.params, self.exp_avg, self.exp_avg_sq, *kept]

    def _pieces(self, slot: int, store: Tensor) -> list[Tensor]:
        return [store[start:stop] for start, stop in self.spans[slot]]

    @torch.no_grad()
    def follow(self, slot: int, step: int) -> None:
        """Moves the average of a slot's weights after its step `step` (from 1), if it has one.

        The decay is that of the run, or (1 + step) / (10 + step) where that is less, so that the start fades soon.
        """
        adapter = self.held[slot]
        if adapter is not None and adapter.average is not None:
            decay = min(adapter.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._pieces(slot, self.copies["average"]), self._pieces(slot, self.params), 1 - decay)

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Puts the averages where the weights are, and back: evaluation looks at them."""
        for slot, adapter in enumerate(self.held):
            if adapter is not None and adapter.average is not None:
                now, average = self._pieces(slot, self.params), self._pieces(slot, self.copies["average"])
                former = [piece.clone() for piece in now]
                torch._foreach_copy_(now, average)
                torch._foreach_copy_(average, former)
                self.refresh(slot)

    def to_save(self, slot: int) -> Tensor:
        """The store whose weights a slot's run leaves: the average, where it has one."""
        adapter = self.held[slot]
        assert adapter is not None
        return self.params if adapter.average is None else self.copies["average"]

    @torch.no_grad()
    def keep_best(self, slot: int) -> None:
        """Remembers the weights of a slot as the best so far."""
        torch._foreach_copy_(self._pieces(slot, self.copies["best"]), self._pieces(slot, self.to_save(slot)))

    @torch.no_grad()
    def take_best(self, slot: int) -> None:
        """Gives a slot its best weights back."""
        for store in (self.params, self.to_save(slot)):
            torch._foreach_copy_(self._pieces(slot, store), self._pieces(slot, self.copies["best"]))
        self.refresh(slot)

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


class _Mirrored:
    """Small tensors that the host writes and the device reads, moved there all at once."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(sum(sizes), dtype=dtype)
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        self.host, self.device = self._host.split(list(sizes)), self._device.split(list(sizes))

    def upload(self) -> None:
        if self._device is not self._host:
            self._device.copy_(self._host)


class _Staging:
    """The values of one slot in one piece: its segments as they lie there, and the way into a store."""

    def __init__(self, segments: Sequence[Segment], spans: Sequence[tuple[int, int]]) -> None:
        self.spans = tuple(spans)
        self.starts = list(itertools.accumulate((stop - start for start, stop in spans), initial=0))
        self.size = self.starts.pop()
        self.segments = {
            segment: replace(segment, a=self._at(segment.a), b=self._at(segment.b), x=self._at(segment.x))
            for segment in segments
        }

    def _at(self, offset: int) -> int:
        span = bisect.bisect_right(self.spans, (offset, math.inf)) - 1
        return self.starts[span] + offset - self.spans[span][0]

    def move(self, values: Tensor, store: Tensor) -> None:
        """Writes the values of the slot to their places in a store."""
        moved = values.to(store.device)
        for first, (start, stop) in zip(self.starts, self.spans, strict=True):
            store[start:stop] = moved[first : first + stop - start]


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
