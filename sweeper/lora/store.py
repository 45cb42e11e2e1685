"""The adapter store: the adapters of a pack's slots."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.lora import elastic, penalty
from sweeper.lora.blocks import Block, rows_of
from sweeper.lora.embedding import AdaptedEmbedding
from sweeper.lora.flat import Flat
from sweeper.lora.forms import FORMS, AdapterSpec, Attached, Capacity, sparse
from sweeper.lora.forms.begin import uniform
from sweeper.lora.forms.restarts import restart
from sweeper.lora.layout import BLOCK, Layout, Placed, padded
from sweeper.lora.optimizer import PackedAdamW
from sweeper.lora.slot_store import Able, Saved, Serving, State
from sweeper.lora.transfer import fetch_all, send
from sweeper.lora.wrappers import Lanes
from sweeper.lora.wrapping import Wrapping
from sweeper.models.architecture import Target
from sweeper.models.forward import inner_model

__all__ = ["AdapterSpec", "AdapterStore", "Capacity"]

SIZE = "size"


class AdapterStore(Flat[AdapterSpec]):
    """The adapters of every slot.

    Args:
        targets: all adaptable modules of the base.
        capacities: for each slot, module name -> highest rank it may ever hold, or what else it may hold. What is
            absent takes no memory.

    Attributes:
        attached: what the forms that some slot may hold keep here.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        capacities: Sequence[Capacity | Mapping[str, int]],
        device: torch.device,
    ) -> None:
        self.model = model
        self.capacities = tuple(Capacity.of(capacity) for capacity in capacities)
        self.layout = layout = Layout(
            targets, [own.ranks for own in self.capacities], [own.extra for own in self.capacities]
        )
        stores = frozenset[str]().union(*(own.stores for own in self.capacities))
        copies = sorted(stores - {"rates"})
        super().__init__(layout.spans, layout.block_slots(), copies, size=layout.size, device=device)
        dtype = next(model.parameters()).dtype
        if dtype != torch.float32:
            self.work = torch.zeros(layout.size, dtype=dtype, device=device)
        if "rates" in stores:
            self.rates = torch.ones(layout.size, device=device)
        self.placed: list[Placed] = [Placed((), ())] * layout.slots
        self.lanes = Lanes.of(layout.slots, device)
        self.tasks = max((own.tasks for own in self.capacities), default=0)
        self.clocks_each = max([1, *(own.blocks for own in self.capacities)])
        if self.clocks_each > 1:
            self._clocks = layout.block_slots() * self.clocks_each
            self.block_clock = self._clocks.to(device)
            self.clock_spans = [own for spans in layout.spans for own in (spans, *[[]] * (self.clocks_each - 1))]
        self.penalties = torch.zeros(layout.slots, 3, device=device)
        self.elasticities = torch.zeros(layout.slots, device=device)
        self.wrapping = Wrapping(model, self.weak, layout, self.lanes, self.tasks)
        self.groups = self.wrapping.groups
        able = {form: [s for s, own in enumerate(self.capacities) if form in own.forms] for form in FORMS}
        self.attached: dict[str, Attached] = {
            name: form.attach(self.weak, layout, self.groups, able[name])
            for name, form in FORMS.items()
            if form.attach is not None and able[name]
        }
        self.optimizer = PackedAdamW(self.weak)

    def install(self) -> None:
        """Puts the wrappers on the base model. The frozen weights are untouched."""
        self.wrapping.install()

    def close(self) -> None:
        self.wrapping.uninstall()

    @property
    def able(self) -> Able:
        graphs = not any(isinstance(group, AdaptedEmbedding) for group in self.groups)
        return Able(mixes=True, graphs=graphs, compiles=graphs)

    @property
    def serving(self) -> Serving:
        return Serving(self.model, inner_model(self.model))

    @property
    def state_bytes(self) -> int:
        """Memory of all that is kept of the adapters of every slot."""
        stores = [self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.copies.values()]
        stores += [self.work] if self.work is not self.params else []
        stores += [self.rates] if self.rates is not None else []
        stores += [tensor for attached in self.attached.values() for tensor in attached.held]
        return sum(store.numel() * store.element_size() for store in stores)

    def fits(self, slot: int, adapter: Any) -> bool:
        """Whether a slot, once it is free, can be given to such a run."""
        return isinstance(adapter, AdapterSpec) and self.capacities[slot].holds(adapter.capacity)

    @torch.no_grad()
    def assign(self, slot: int, adapter: AdapterSpec, state: State | None = None, step: int = 0) -> None:
        """Gives a slot to a run: fresh, or with the values of a `state`, and the moments if it has any."""
        self._empty(slot)
        form = FORMS[adapter.form]
        self.held[slot], self.rated[slot] = adapter, adapter.rated
        self.placed[slot] = placed = Placed.of(self.layout.by_slot[slot], form.parts, adapter.ranks)
        for segment in placed.segments:
            self.wrapping.enter(segment, adapter.ranks[segment.target.name], adapter.scales[segment.target.name])
        self.wrapping.gate(slot, adapter.blocks)
        self._set_clocks(slot, adapter.blocks)
        if state is not None:
            self._restore(placed, adapter, state)
        elif placed.segments:
            self._begin(placed, adapter)
        self.penalties[slot] = send(torch.tensor(adapter.penalties), self.penalties.device)
        self.elasticities[slot] = adapter.elasticity
        if adapter.form in self.attached:
            self.attached[adapter.form].assign(slot, adapter, placed.segments)
        self._set_rates(slot, adapter, step)
        self.publish(slot)
        self.wrapping.upload()
        self._note(slot, adapter)
        self._derive([slot])

    def _set_clocks(self, slot: int, blocks: Sequence[Block]) -> None:
        """Gives the values of a slot to its first clock, or those of each rank block to one of its own."""
        each = self.clocks_each
        if each == 1:
            return
        spans: list[list[tuple[int, int]]] = [[] for _ in range(each)]
        for start, stop in self.spans[slot]:
            self._clocks[start // BLOCK : stop // BLOCK] = slot * each
        for segment in self.placed[slot].segments if blocks else ():
            target = segment.target
            for number, rows in enumerate(rows_of(blocks, target.name)):
                for first, width in ((segment.a, target.in_features), (segment.b, target.out_features)):
                    if rows.start == rows.stop:
                        continue
                    start, stop = first + rows.start * width, first + padded(rows.stop * width)
                    spans[number].append((start, stop))
                    self._clocks[start // BLOCK : stop // BLOCK] = slot * each + number
        self.clock_spans[slot * each : (slot + 1) * each] = spans if blocks else [self.spans[slot], *spans[1:]]
        self.block_clock = send(self._clocks.clone(), self.params.device)
        self.optimizer.squares = None  # which were added up by the former clocks

    def _begin(self, placed: Placed, adapter: AdapterSpec) -> None:
        # drawn on the host: a GPU is given one long copy, not a handful for each module
        values, every = placed.blank(self.params.device)
        for segment, parts, own in zip(placed.segments, placed.parts, every, strict=True):
            FORMS[adapter.form].begin(segment, adapter, self.groups[segment.group], own)
            if adapter.sparsity is not None:
                adapter.sparsity.thin_out([part for part, _ in parts], own, f"{adapter.seed}/{segment.target.name}")
        copies = [self.copies[name] for name in {"average", "best"} & set(adapter.copies)]
        placed.write(values, [self.params, *copies])

    def _restore(self, placed: Placed, adapter: AdapterSpec, state: State) -> None:
        counts = {name: len(views) for name, views in placed.views(self.params).items()}
        alone = all(len(state[name]) == n for name, n in counts.items())  # without moments, averages begin here too
        begun = [self.copies[name] for name in adapter.copies if alone and name in ("average", "best")]
        for place, store in enumerate(self._stores(adapter)):
            values = [v for name, n in counts.items() for v in state[name][n * place : n * (place + 1)]]
            if values:
                placed.write(torch.cat([value.flatten() for value in values]), [store, *begun])

    def _stores(self, adapter: AdapterSpec) -> list[Tensor]:
        """The stores that make up the state of a run: values, moments, and what else its options keep."""
        return [self.params, self.exp_avg, self.exp_avg_sq, *(self.copies[name] for name in adapter.copies)]

    def _set_rates(self, slot: int, adapter: AdapterSpec, step: int) -> None:
        """Says which values of a slot train from a step (from 0) on, and at which rate over the run's."""
        if self.rates is None:
            return
        for piece in self.pieces(slot, self.rates):
            piece.fill_(0.0 if adapter.rated else 1.0)
        if not adapter.rated:
            return
        placed, sparsity = self.placed[slot], adapter.sparsity
        rates, every = placed.blank(self.params.device)
        for segment, parts, own in zip(placed.segments, placed.parts, every, strict=True):
            live = adapter.live_rows(segment.target.name, step)
            for (part, _), value in zip(parts, own, strict=True):
                value[live if part.by_rank else slice(None)] = adapter.rate_a if part.rate == "a" else adapter.rate_b
            if sparsity is not None:
                sparsity.thin_out([part for part, _ in parts], own, f"{adapter.seed}/{segment.target.name}")
        placed.write(rates, [self.rates])
        if sparsity is not None and sparsity.learnt and sparsity.settled(step):
            masks = sparsity.masks(placed.flat(self.copies["sensitivity"]), step)
            torch._foreach_mul_(placed.flat(self.rates), masks)

    def release(self, slot: int) -> None:
        """Empties a slot; the others keep every bit of their state."""
        self._empty(slot)
        self.wrapping.upload()
        self._note(slot, None)

    @torch.no_grad()
    def _empty(self, slot: int) -> None:
        former = self.held[slot]
        stores = (self.params, self.grads, self.exp_avg, self.exp_avg_sq, *self.copies.values())
        pieces = [piece for store in stores for piece in self.pieces(slot, store)]
        if pieces:
            torch._foreach_zero_(pieces)
        for segment in self.layout.by_slot[slot]:
            self.wrapping.enter(segment, 0, 0.0)
        if former is not None and former.form in self.attached:
            self.attached[former.form].release(slot, self.placed[slot].segments)
        self.held[slot], self.rated[slot], self.placed[slot] = None, False, Placed((), ())
        self.wrapping.gate(slot, ())

    def _note(self, slot: int, adapter: AdapterSpec | None) -> None:
        lanes = self.lanes
        lanes.dropout[slot] = adapter.dropout if adapter else 0.0
        lanes.noise[slot] = adapter.noise if adapter else 0.0
        held = [one for one in self.held if one is not None]
        lanes.drop = any(one.dropout > 0 for one in held)
        lanes.noisy = any(one.noise > 0 for one in held)
        lanes.gated = any(one.blocks for one in held)
        lanes.routed = any(one.experts for one in held)
        lanes.prompted = any(one.experts and one.options["router"] == "prompt" for one in held)
        lanes.balanced = any(one.experts and one.options["balance"] > 0 for one in held)
        lanes.forms = tuple(form for form in self.attached if any(one.form == form for one in held))
        penalised = [(slot, _penalties(one)) for slot, one in enumerate(self.held) if one is not None]
        lanes.penalised = tuple((slot, kinds) for slot, kinds in penalised if kinds)
        for form, attached in self.attached.items():
            attached.switch(form in lanes.forms)

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass; what is drawn follows from it and the place alone."""
        self.lanes.seed(seeds)

    @contextlib.contextmanager
    def one_pass(self, share: float) -> Iterator[None]:
        """Around a forward and backward pass; `share` is the pass's of its step."""
        self._derive(range(self.slots))
        self.lanes.share = share
        yield
        if share:
            self._penalise(share)
        for form in self.lanes.forms:
            self.attached[form].project()

    @torch.no_grad()
    def _derive(self, slots: Sequence[int]) -> None:
        for form in self.lanes.forms:
            self.attached[form].derive(slots)

    @torch.no_grad()
    def _penalise(self, share: float) -> None:
        """Adds the gradients of the penalties, times `share`, of the runs that have any."""
        for slot, kinds in self.lanes.penalised:
            held = self.held[slot]
            assert held is not None
            if held.orthogonality:
                self._keep_apart(slot, held, share)
            if held.elasticity:
                elastic.pull(self.weak, slot, self.elasticities[slot] * share)
            if SIZE not in kinds:
                continue
            for segment in self.layout.by_slot[slot]:
                live = pair = segment.pair(self.params)
                if self.rates is not None:
                    moving = [rate.amax(1, keepdim=True) > 0 for rate in segment.pair(self.rates)]
                    live = pair[0] * moving[0], pair[1] * moving[1]
                scale = self.groups[segment.group].scale[slot, segment.member]
                found = penalty.gradients(*pair, *live, scale, self.penalties[slot] * share)
                for gradient, more in zip(segment.pair(self.grads), found, strict=True):
                    gradient += more

    def _keep_apart(self, slot: int, adapter: AdapterSpec, share: float) -> None:
        """Adds the gradient of each block's orthogonality to those before it, times `share`."""
        for segment in self.placed[slot].segments:
            name = segment.target.name
            a, grad = (segment.pair(store, adapter.ranks[name])[0] for store in (self.params, self.grads))
            for rows in rows_of(adapter.blocks, name)[1:]:
                before = a[: rows.start]
                grad[rows] += 2 * adapter.orthogonality * share * (a[rows] @ before.t()) @ before

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        with super().averaged():
            self._derive(range(self.slots))
            yield

    def update(self, rows: Mapping[int, Sequence[list[float]]], steps: Mapping[int, int]) -> Tensor:
        """An optimiser step, and what follows it; `steps` is the number (from 1) of each slot's."""
        held = {slot: adapter.sparsity for slot in steps if (adapter := self.held[slot]) is not None}
        memory = {slot: own.memory for slot, own in held.items() if own and not own.settled(steps[slot] - 1)}
        if memory:
            sparse.accumulate_sensitivity(self, memory)
        self.optimizer.set(rows)
        norms = self.optimizer.step()
        for slot, step in steps.items():
            self._prune(slot, step)
            self.update_ema(slot, step)
            self._restart(slot, step)
        return norms

    @torch.no_grad()
    def _prune(self, slot: int, step: int) -> None:
        """Sets to zero what a slot that learns its pattern does without after its step `step`."""
        adapter, placed = self.held[slot], self.placed[slot]
        if adapter is None or adapter.sparsity is None or not adapter.sparsity.due(step):
            return
        over = step == adapter.sparsity.last
        average = [self.copies["average"]] if "average" in adapter.copies else []
        stores = [self.params, self.exp_avg, self.exp_avg_sq, *average]
        masks = adapter.sparsity.masks(placed.flat(self.copies["sensitivity"]), step)
        for store in stores if over else stores[:1]:
            torch._foreach_mul_(placed.flat(store), masks)
        if over:
            self._set_rates(slot, adapter, step)
        self.publish(slot)

    @torch.no_grad()
    def _restart(self, slot: int, step: int) -> None:
        """Begins the next adapter of a run that merges and restarts, before its step `step` (from 0)."""
        adapter, placed = self.held[slot], self.placed[slot]
        if adapter is None or adapter.restarts is None or not adapter.restarts.due(step):
            return
        self._set_rates(slot, adapter, step)
        before, now = ([adapter.live_rows(s.target.name, at) for s in placed.segments] for at in (step - 1, step))
        begin = functools.partial(uniform, seed=adapter.seed, again=adapter.restarts.block(step))
        copies = [self.copies[name] for name in {"average"} & set(adapter.copies)]
        restart(self, placed, adapter.restarts, before, now, begin, copies)
        self.publish(slot)

    @torch.no_grad()
    def publish(self, slot: int) -> None:
        """Brings up to date what follows from a slot's parameters, where anything but the optimiser wrote them."""
        if self.work is not self.params and self.spans[slot]:
            torch._foreach_copy_(self.pieces(slot, self.work), self.pieces(slot, self.params))

    def views(self, slot: int, store: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> the parts of the adapter that a slot holds, in the parameters or a store of their layout."""
        return self.placed[slot].views(self.params if store is None else store)

    def snapshot(self, slot: int) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> the parts of its adapter, then their moments and what else is kept of them, on the host."""
        adapter = self.held[slot]
        assert adapter is not None
        stores = [self.views(slot, store) for store in self._stores(adapter)]
        return fetch_all({name: tuple(part for parts in stores for part in parts[name]) for name in stores[0]})()

    def saved(self, slot: int, *, values: bool = True) -> Saved:
        """As `views`, of the weights that the run leaves; called, it waits for their copy on the host."""
        return fetch_all(self.views(slot, self.to_save(slot)) if values else {})


def _penalties(adapter: AdapterSpec) -> tuple[Any, ...]:
    """The penalties of a run, each with what a captured step has of it as a constant; none where it has none."""
    kinds: list[Any] = [SIZE] if any(adapter.penalties) else []
    if adapter.elasticity:
        kinds.append("elastic")
    if adapter.orthogonality:
        ranks = tuple(tuple(sorted(block.ranks.items())) for block in adapter.blocks)
        kinds.append(("apart", adapter.orthogonality, hash(ranks)))
    return tuple(kinds)
