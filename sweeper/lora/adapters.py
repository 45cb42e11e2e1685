"""The adapters of a pack: the flat store of their values, and the wrappers that put them on the frozen base."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.lora import penalty, sparse, starts
from sweeper.lora.dora import Gain
from sweeper.lora.forms import AdapterSpec, Capacity
from sweeper.lora.lowrank import A_OFFSET, B_OFFSET, H_COLUMN, RANK
from sweeper.lora.optimizer import PackedAdamW
from sweeper.lora.store import Segment, Store, fetch_all
from sweeper.lora.transfer import send
from sweeper.lora.vera import Shared, draw
from sweeper.lora.wrappers import Adapted, AdaptedEmbedding, Group, Lanes
from sweeper.models.architecture import Target
from sweeper.models.forward import inner_model

__all__ = ["AdapterBank", "AdapterSpec", "Capacity"]


class AdapterBank(Store):
    """The store of every slot, and the wrappers on the base model.

    Args:
        targets: all adaptable modules of the base.
        capacities: for each slot, module name -> highest rank it may ever hold, or what else it may hold. What is
            absent takes no memory.
    """

    mixes = True

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        capacities: Sequence[Capacity | Mapping[str, int]],
        device: torch.device,
    ) -> None:
        super().__init__(targets, capacities, next(model.parameters()).dtype, device)
        self.model, count = model, len(capacities)
        self.lanes = Lanes(
            torch.full((count,), -1, dtype=torch.int32, device=device),
            torch.zeros(count, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros(count, device=device),
        )
        self.penalties = torch.zeros(count, 3, device=device)
        self.tables = _Mirrored([count * len(members) * 4 for members in self.member_targets], torch.int32, device)
        self.scales = _Mirrored([count * len(members) for members in self.member_targets], torch.float32, device)
        self.wrappers: dict[str, Adapted | AdaptedEmbedding] = {}
        self.groups: list[Group | AdaptedEmbedding] = []
        for index, members in enumerate(self.member_targets):
            self._attach(index, members, self.bounds[2 * index], self.bounds[2 * index + 1], count, device)
        self._upload()
        self.shared = {
            slot: Shared.empty(
                max(s.capacity for s in self._linear(slot)), [s.target for s in self._linear(slot)], device
            )
            for slot, own in enumerate(self.capacities)
            if "vera" in own.forms
        }
        self.places = {
            slot: torch.tensor(
                [[s.a, s.b, s.x, s.target.in_features, s.target.out_features, s.capacity] for s in self._linear(slot)],
                device=device,
            )
            for slot in self.shared
        }

    @property
    def state_bytes(self) -> int:
        """Memory of all that is kept of the adapters of every slot."""
        stores = [self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.copies.values()]
        stores += [self.work] if self.work is not self.params else []
        stores += [self.rates] if self.rates is not None else []
        stores += [matrix for shared in self.shared.values() for matrix in (shared.a, shared.b)]
        return sum(store.numel() * store.element_size() for store in stores)

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
        own = self.by_group[index]
        widest = -(-max(segment.capacity for segment in own) // 16) * 16
        for segment in own:
            row = self.tables.host[index].reshape(count, len(members), 4)[segment.slot, segment.member]
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

    def make_optimizer(self) -> PackedAdamW:
        return PackedAdamW(self)

    @property
    def serving(self) -> Any:
        """The model that the present lanes run through."""
        return self.model

    @property
    def decoder(self) -> Any:
        """Its inner model, which gives hidden states."""
        return inner_model(self.model)

    @property
    def draws(self) -> bool:
        """Whether the coming step draws random numbers."""
        return self.lanes.drop or self.lanes.noisy

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass."""
        self.lanes.seeds.copy_(torch.tensor(seeds), non_blocking=True)

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # all of it is counter-based: nothing is drawn from torch's generator

    def fits(self, slot: int, adapter: Any) -> bool:
        """Whether a slot, once it is free, can be given to such a run."""
        return isinstance(adapter, AdapterSpec) and self.capacities[slot].holds(adapter.capacity)

    def snapshot(self, slot: int, adapter: AdapterSpec) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> the parts of its adapter, then their moments and what else is kept of them, on the host."""
        stores = [self.adapter(slot, adapter, store) for store in self.stores(adapter)]
        return fetch_all({name: tuple(part for parts in stores for part in parts[name]) for name in stores[0]})()

    @torch.no_grad()
    def restore(self, slot: int, adapter: AdapterSpec, state: Mapping[str, tuple[Tensor, ...]], step: int) -> None:
        """Puts a snapshot, taken after `step` steps, back into a slot."""
        for place, store in enumerate(self.stores(adapter)):
            values: list[Tensor] = []
            for name, views in self.adapter(slot, adapter, store).items():
                values += state[name][len(views) * place : len(views) * (place + 1)]
            self.write(slot, adapter, torch.cat([value.flatten() for value in values]), [store])
        self.refresh(slot)

    @property
    def graphable(self) -> bool:
        return not any(isinstance(group, AdaptedEmbedding) for group in self.groups)

    @property
    def compilable(self) -> bool:
        return self.graphable

    @torch.no_grad()
    def assign(self, slot: int, adapter: AdapterSpec, *, fresh: bool = True) -> None:
        """Gives a slot to a run with a fresh adapter, moments zero; not `fresh`: what it holds is to be written yet."""
        self._empty(slot)
        self.held[slot] = adapter
        own = self.own(slot, adapter)
        for segment in own:
            self._entry(segment, adapter.ranks[segment.target.name], adapter.scales[segment.target.name])
        if fresh and own:
            # drawn on the host: a GPU is given one long copy, not a handful for each module
            values, parts = self.blank(adapter, own)
            for segment, pair in zip(own, parts, strict=True):
                self._begin(segment, adapter, pair)
            copies = [self.copies[name] for name in {"average", "best"} & set(adapter.copies)]
            self.write(slot, adapter, values, [self.params, *copies])
        self.penalties[slot] = send(torch.tensor(adapter.penalties), self.penalties.device)
        self._switch_forms(slot, adapter)
        self.set_rates(slot, 0)
        self.refresh(slot)
        self._upload()
        self._note(slot, adapter)

    def _switch_forms(self, slot: int, adapter: AdapterSpec, *, on: bool = True) -> None:
        """Readies what a DoRA or VeRA has besides values in the store, or clears it."""
        own = self.own(slot, adapter)
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

    def _begin(self, segment: Segment, adapter: AdapterSpec, parts: Sequence[Tensor]) -> None:
        """Fills what a module's adapter starts with, of zeros on the host."""
        if adapter.form == "vera":
            parts[0].fill_(adapter.shared[0])
            return
        a, b = parts[:2]
        trained = adapter.trained.get(segment.target.name, len(a))
        if adapter.start == "uniform":
            starts.draw(segment.target, a[:trained], b[:trained], adapter.seed)
        else:
            group = self.groups[segment.group]
            assert isinstance(group, Group)
            first = starts.principal(self.model, group.weights[segment.member], segment.target, adapter)
            for part, value, sign in zip((a, b), first, (1, -1), strict=True):
                part[:trained], part[trained:] = value, sign * value
        self._thin_out(segment, adapter, parts)
        if adapter.form == "dora":
            parts[2].copy_(self._gain(segment).squares[segment.member].sqrt())

    @torch.no_grad()
    def set_rates(self, slot: int, step: int) -> None:
        """Says which values of a slot train from a step (from 0) on, and at which rate over the run's."""
        adapter = self.held[slot]
        if self.rates is None or adapter is None:
            return
        if not adapter.rated:
            for piece in self.pieces(slot, self.rates):
                piece.fill_(1.0)
            return
        own = self.own(slot, adapter)
        rates, every = self.blank(adapter, own)
        for segment, parts in zip(own, every, strict=True):
            self._rate(adapter, segment.target.name, step, parts)
            self._thin_out(segment, adapter, parts)
        self.write(slot, adapter, rates, [self.rates])
        if adapter.sparsity is not None and adapter.sparsity.learnt and adapter.sparsity.settled(step):
            torch._foreach_mul_(self.flat(slot, adapter, self.rates), self._learnt(slot, adapter, step))

    @staticmethod
    def _rate(adapter: AdapterSpec, name: str, step: int, parts: Sequence[Tensor]) -> None:
        """Writes the rates of a module's parts."""
        trained = len(parts[0]) if adapter.form == "vera" else adapter.trained.get(name, len(parts[0]))
        first = trained * adapter.restarts.block(step) if adapter.restarts else 0
        rows = slice(None) if adapter.form == "vera" else slice(first, first + trained)
        parts[0][rows] = adapter.rate_a
        parts[1][rows] = adapter.rate_b
        for magnitude in parts[2:]:
            magnitude.fill_(adapter.rate_b)

    @staticmethod
    def _thin_out(segment: Segment, adapter: AdapterSpec, parts: Sequence[Tensor]) -> None:
        """Sets to zero, on the host, what the random pattern of a sparse adapter leaves out of a module's parts."""
        if adapter.sparsity is None or adapter.sparsity.learnt:
            return
        name = segment.target.name
        for part, side in zip(parts, "ab", strict=False):
            kept = adapter.sparsity.kept(part.shape[1], 0)
            part *= sparse.random_pattern(len(part), part.shape[1], kept, f"{adapter.seed}/{name}/{side}")

    def _learnt(self, slot: int, adapter: AdapterSpec, step: int) -> list[Tensor]:
        """For every part of an adapter that learns its pattern: 1 where it is not zero after some steps."""
        assert adapter.sparsity is not None
        found = self.flat(slot, adapter, self.copies["sensitivity"])
        return sparse.patterns(found, [adapter.sparsity.kept(part.shape[1], step) for part in found])

    @torch.no_grad()
    def restart(self, slot: int, step: int) -> None:
        """Begins the next adapter of a run that merges and restarts; the one before stays, frozen (ReLoRA)."""
        adapter = self.held[slot]
        assert adapter is not None
        assert adapter.restarts is not None
        self.set_rates(slot, step)
        block = adapter.restarts.block(step)

        def blocks(place: int, store: Tensor) -> list[Tensor]:
            """What the adapter of some block has in a store, part by part."""
            found = []
            for segment in self.own(slot, adapter):
                trained = adapter.trained[segment.target.name]
                found += [part[trained * place :] for part in self.views(segment, trained * (place + 1), store)]
            return found

        begun = [torch.zeros(part.shape) for part in blocks(block, self.params)]
        for segment, a, b in zip(self.own(slot, adapter), begun[::2], begun[1::2], strict=True):
            starts.draw(segment.target, a, b, adapter.seed, again=block)
        sent = send(torch.cat([part.flatten() for part in begun]), self.params.device)
        for store in (self.params, *(self.copies[name] for name in {"average"} & set(adapter.copies))):
            new = [part.view(-1) for part in blocks(block, store)]
            torch._foreach_copy_(new, sent.split([part.numel() for part in new]))
        means = [part.reshape(1, -1) for part in blocks(block - 1, self.exp_avg)]
        kept = [round(part.numel() * (1 - adapter.restarts.prune)) for part in means]
        masks = sparse.patterns([part.abs() for part in means], kept)
        for moments in (self.exp_avg, self.exp_avg_sq):
            old, new = ([part.view(1, -1) for part in blocks(place, moments)] for place in (block - 1, block))
            torch._foreach_copy_(new, torch._foreach_mul(old, masks))
            torch._foreach_zero_(old)
        self.refresh(slot)

    @torch.no_grad()
    def sense(self, steps: Mapping[int, int]) -> None:
        """Notes how sensitive the loss is to the values of the slots that learn their pattern, before their steps."""
        memory = {
            slot: adapter.sparsity.memory
            for slot, step in steps.items()
            if (adapter := self.held[slot]) is not None
            and adapter.sparsity is not None
            and not adapter.sparsity.settled(step - 1)
        }
        if not memory:
            return
        found = self.copies["sensitivity"]
        if self.params.is_cuda:
            from sweeper.lora import kernels

            shares = torch.tensor([memory.get(slot, math.nan) for slot in range(len(self.capacities))])
            shares = send(shares, self.params.device)
            kernels.sense(self.params, self.grads, found, self.block_slot, shares)
            return
        for slot, share in memory.items():
            for start, stop in self.spans[slot]:
                now = sparse.sensitivity(self.params[start:stop], self.grads[start:stop])
                found[start:stop].lerp_(now, 1 - share)

    @torch.no_grad()
    def prune(self, slot: int, step: int) -> None:
        """Sets to zero what a slot that learns its pattern does without after its step `step`."""
        adapter = self.held[slot]
        if adapter is None or adapter.sparsity is None or not adapter.sparsity.due(step):
            return
        over = step == adapter.sparsity.last
        average = [self.copies["average"]] if "average" in adapter.copies else []
        stores = [self.params, self.exp_avg, self.exp_avg_sq, *average]
        masks = self._learnt(slot, adapter, step)
        for store in stores if over else stores[:1]:
            torch._foreach_mul_(self.flat(slot, adapter, store), masks)
        if over:
            self.set_rates(slot, step)
        self.refresh(slot)

    @torch.no_grad()
    def derive(self, slots: Iterable[int] | None = None) -> None:
        """Brings up to date what follows from the parameters: DoRA's norms and VeRA's A and B; of all slots, or some.

        Without a wait for the device, and the same work whatever the slots hold, so that a captured step may do it.
        """
        if not (self.lanes.gain or self.lanes.share):
            return
        chosen = range(len(self.capacities)) if slots is None else tuple(slots)
        if self.lanes.share:
            for slot in chosen:
                if slot in self.shared:
                    self._fill_shared(slot)
        if self.lanes.gain:
            for index, group in enumerate(self.groups):
                if isinstance(group, Group) and group.gain is not None:
                    self._measure(index, group, group.gain, chosen)

    def _fill_shared(self, slot: int) -> None:
        """A and B of a VeRA, from the shared matrices and its factors."""
        shared = self.shared[slot]
        if self.params.is_cuda:
            from sweeper.lora import form_kernels

            form_kernels.derive(self.params, self.work, shared, self.places[slot])
            return
        for segment in self._linear(slot):
            shared.derive(*self.views(segment, segment.capacity), *self.factors(segment, self.params))
        self.refresh(slot)

    def _measure(self, index: int, group: Group, gain: Gain, slots: Sequence[int]) -> None:
        """Norms of the DoRAs of a group."""
        if self.params.is_cuda:
            from sweeper.lora import form_kernels

            form_kernels.norms(
                gain.weights, gain.squares, gain.columns, gain.on, gain.norm, group.params, group.table, group.scale
            )
            return
        for segment in self.by_group[index]:
            if segment.slot in slots and "dora" in self.capacities[segment.slot].forms:
                pair = self.views(segment, segment.capacity)
                gain.measure(segment.slot, segment.member, *pair, group.scale[segment.slot, segment.member])

    def _linear(self, slot: int) -> list[Segment]:
        return [segment for segment in self.by_slot[slot] if segment.target.kind != "embedding"]

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
            if self.grads.is_cuda:
                from sweeper.lora import form_kernels

                form_kernels.project(self.grads, shared, self.places[slot])
                continue
            for segment in self._linear(slot):
                a, b = self.views(segment, segment.capacity, self.grads)
                shared.project(a, b, *self.factors(segment, self.grads))

    def release(self, slot: int) -> None:
        """Empties a slot; the others keep every bit of their state."""
        self._empty(slot)
        self._upload()
        self._note(slot, None)

    @torch.no_grad()
    def _empty(self, slot: int) -> None:
        former = self.held[slot]
        stores = (self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.copies.values())
        pieces = [piece for store in stores for piece in self.pieces(slot, store)]
        if pieces:
            torch._foreach_zero_(pieces)
        for segment in self.by_slot[slot]:
            self._entry(segment, 0, 0.0)
        if former is not None:
            self._switch_forms(slot, former, on=False)
        self.held[slot] = None

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


class _Mirrored:
    """Small tensors that the host writes, as arrays, and the device reads; moved there all at once."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(sum(sizes), dtype=dtype)
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        self.host = [part.numpy() for part in self._host.split(list(sizes))]
        self.device = self._device.split(list(sizes))

    def upload(self) -> None:
        if self._device is not self._host:
            self._device.copy_(send(self._host, self._device.device))


def _base_of(module: nn.Module) -> Any:
    return module.base if isinstance(module, Adapted | AdaptedEmbedding) else module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
