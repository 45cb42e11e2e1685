"""The flat store: every slot's parameters, gradients and moments, and where in it each module's adapter lies."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sweeper.lora.forms import AdapterSpec, Capacity
from sweeper.lora.transfer import Fetched, fetch, send, zeros
from sweeper.models.architecture import Target

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


class Store:
    """Values of the adapters of every slot.

    They lie group by group, slot by slot and member by member, A `[rank, in]` then B `[rank, out]`, and after each
    group, where a slot of it may hold a DoRA or VeRA, a table `[slot, values]` of their extra values. `work` is what
    the products read: the values themselves, or their copy in the base model's precision, kept by the optimiser.
    `rates` is each value's learning rate over its run's (0: frozen), None where all have their run's.
    `copies` are further stores of the same layout, which some runs need.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        capacities: Sequence[Capacity | Mapping[str, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacities = tuple(Capacity.of(capacity) for capacity in capacities)
        count = len(capacities)
        used = {name for capacity in self.capacities for name in capacity.ranks}
        self.member_targets = groups(targets, used)
        self.segments: list[Segment] = []
        self.bounds = self._lay_out()
        size = self.bounds[-1]
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        self.work = self.params if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        stores = frozenset[str]().union(*(capacity.stores for capacity in self.capacities))
        self.rates = torch.ones(size, device=device) if "rates" in stores else None
        self.copies = {name: torch.zeros(size, device=device) for name in sorted(stores - {"rates"})}
        self.held: list[AdapterSpec | None] = [None] * count
        self.block_slot = self._block_slots(size).to(device)
        self.by_slot = [[segment for segment in self.segments if segment.slot == slot] for slot in range(count)]
        self.by_group: list[list[Segment]] = [[] for _ in self.member_targets]
        for segment in self.segments:
            self.by_group[segment.group].append(segment)
        self.spans = [_merged([span for s in own for span in _spans(s)]) for own in self.by_slot]

    @property
    def rated(self) -> list[bool]:
        """Of each slot, whether its values have rates of their own."""
        return [adapter is not None and adapter.rated for adapter in self.held]

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

    def stores(self, adapter: AdapterSpec) -> list[Tensor]:
        """The stores that make up the state of a run: values, moments, and what else its options keep."""
        return [self.params, self.exp_avg, self.exp_avg_sq, *(self.copies[name] for name in adapter.copies)]

    @torch.no_grad()
    def refresh(self, slot: int) -> None:
        """Brings the working copy up to date, after parameters were written by anything but the optimiser."""
        if self.work is not self.params and self.spans[slot]:
            torch._foreach_copy_(self.pieces(slot, self.work), self.pieces(slot, self.params))

    def views(self, segment: Segment, rank: int, store: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A [rank, in] and transposed B [rank, out] of a segment, in the parameters or a store of their layout."""
        store = self.params if store is None else store
        fan_in, fan_out = segment.target.in_features, segment.target.out_features
        return (
            store[segment.a : segment.a + rank * fan_in].view(rank, fan_in),
            store[segment.b : segment.b + rank * fan_out].view(rank, fan_out),
        )

    def factors(self, segment: Segment, store: Tensor) -> tuple[Tensor, Tensor]:
        """VeRA's factors of the ranks [capacity] and outputs [out] of a segment."""
        middle = segment.x + segment.capacity
        return store[segment.x : middle], store[middle : middle + segment.target.out_features]

    def parts(self, segment: Segment, adapter: AdapterSpec, store: Tensor | None = None) -> tuple[Tensor, ...]:
        """What makes up a module's adapter, as views: A [rank, in] and B transposed [rank, out]; of a DoRA also its
        magnitudes [out]; of a VeRA its factors [rank] and [out] alone.
        """
        store = self.params if store is None else store
        rank = adapter.ranks[segment.target.name]
        if adapter.form == "vera":
            d, b = self.factors(segment, store)
            return d[:rank], b
        pair = self.views(segment, rank, store)
        return (*pair, store[segment.x : segment.x + segment.target.out_features]) if adapter.form == "dora" else pair

    def adapter(self, slot: int, adapter: AdapterSpec, store: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> the parts of the adapter of the run that holds a slot; views, not copies."""
        return {segment.target.name: self.parts(segment, adapter, store) for segment in self.own(slot, adapter)}

    def blank(self, adapter: AdapterSpec, segments: Sequence[Segment]) -> tuple[Tensor, list[list[Tensor]]]:
        """Zeros on the host for all parts of an adapter in one piece, and the parts of each module as views of it."""
        shapes = [_shapes(segment, adapter) for segment in segments]
        sizes = [math.prod(shape) for own in shapes for shape in own]
        whole = zeros(sum(sizes), self.params.device)
        pieces = iter(whole.split(sizes))
        return whole, [[next(pieces).view(shape) for shape in own] for own in shapes]

    @torch.no_grad()
    def write(self, slot: int, adapter: AdapterSpec, values: Tensor, stores: Sequence[Tensor]) -> None:
        """Puts the same host values of all parts of an adapter, one after another as `flat`, into some stores."""
        moved = send(values, self.params.device)
        for store in stores:
            parts = [part.view(-1) for part in self.flat(slot, adapter, store)]
            torch._foreach_copy_(parts, moved.split([part.numel() for part in parts]))

    def saved(
        self, slot: int, adapter: AdapterSpec, *, values: bool = True
    ) -> Callable[[], dict[str, tuple[Tensor, ...]]]:
        """As `adapter`, of the weights that the run leaves; called, it waits for their copy on the host."""
        return fetch_all(self.adapter(slot, adapter, self.to_save(slot)) if values else {})

    def flat(self, slot: int, adapter: AdapterSpec, store: Tensor) -> list[Tensor]:
        """The parts of all modules of an adapter, one after another; views."""
        return [part for parts in self.adapter(slot, adapter, store).values() for part in parts]

    def own(self, slot: int, adapter: AdapterSpec) -> list[Segment]:
        return [segment for segment in self.by_slot[slot] if segment.target.name in adapter.ranks]

    def pieces(self, slot: int, store: Tensor) -> list[Tensor]:
        return [store[start:stop] for start, stop in self.spans[slot]]

    @torch.no_grad()
    def follow(self, slot: int, step: int) -> None:
        """Moves the average of a slot's weights after its step `step` (from 1), if it has one.

        The decay is that of the run, or (1 + step) / (10 + step) where that is less, so that the start fades soon.
        """
        adapter = self.held[slot]
        if adapter is not None and adapter.average is not None:
            decay = min(adapter.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.pieces(slot, self.copies["average"]), self.pieces(slot, self.params), 1 - decay)

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Puts the averages where the weights are, and back: evaluation looks at them."""
        for slot, adapter in enumerate(self.held):
            if adapter is not None and adapter.average is not None:
                now, average = self.pieces(slot, self.params), self.pieces(slot, self.copies["average"])
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
        torch._foreach_copy_(self.pieces(slot, self.copies["best"]), self.pieces(slot, self.to_save(slot)))

    @torch.no_grad()
    def take_best(self, slot: int) -> None:
        """Gives a slot its best weights back."""
        for store in (self.params, self.to_save(slot)):
            torch._foreach_copy_(self.pieces(slot, store), self.pieces(slot, self.copies["best"]))
        self.refresh(slot)


@torch.no_grad()
def fetch_all(tensors: Mapping[str, tuple[Tensor, ...]]) -> Callable[[], dict[str, tuple[Tensor, ...]]]:
    """Copies float32 tensors to the host in one piece; called, it waits until they are there."""
    flat = [tensor.reshape(-1) for parts in tensors.values() for tensor in parts]
    sizes = [tensor.numel() for tensor in flat]
    shapes = {name: [tensor.shape for tensor in parts] for name, parts in tensors.items()}
    fetched = fetch(torch.cat(flat)) if flat else Fetched(torch.empty(0))

    def arrived() -> dict[str, tuple[Tensor, ...]]:
        values = iter(fetched.wait().split(sizes))
        return {name: tuple(next(values).view(shape) for shape in parts) for name, parts in shapes.items()}

    return arrived


def groups(targets: Sequence[Target], used: set[str]) -> list[tuple[Target, ...]]:
    """Targets that are computed together: those with one input, if any of them is adapted."""
    found = []
    for _, siblings in itertools.groupby(targets, key=lambda t: t.inputs if t.kind == "linear" else t.name):
        together = list(siblings)
        for start in range(0, len(together), MOST_MEMBERS):
            members = tuple(together[start : start + MOST_MEMBERS])
            if any(target.name in used for target in members):
                found.append(members)
    return found


def _shapes(segment: Segment, adapter: AdapterSpec) -> list[tuple[int, ...]]:
    """Of the parts of a module's adapter, as `Store.parts` gives them."""
    target, rank = segment.target, adapter.ranks[segment.target.name]
    if adapter.form == "vera":
        return [(rank,), (target.out_features,)]
    pair: list[tuple[int, ...]] = [(rank, target.in_features), (rank, target.out_features)]
    return [*pair, (target.out_features,)] if adapter.form == "dora" else pair


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjoining spans joined, so that a slot is updated in few long strides."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _padded(values: int) -> int:
    return -(-values // BLOCK) * BLOCK


def _spans(segment: Segment) -> list[tuple[int, int]]:
    """The parts of the flat store that are a segment's own."""
    return [(segment.a, segment.end)] + ([(segment.x, segment.x + _padded(segment.extras))] if segment.extras else [])
