"""Where in a flat store the adapters of every slot lie: which modules run together, at which offsets.

A *group* is up to three modules on the same input. The adapters lie group by group, slot by slot and member by member,
A `[rank, in]` then B `[rank, out]`; after each group comes a table `[slot, values]` of what some forms have beside
them.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sweeper.lora.transfer import send, zeros
from sweeper.models.architecture import Target

BLOCK = 64  # values; a segment starts at a multiple of it, so a block belongs to one slot
MOST_MEMBERS = 3  # of a group: the kernels take that many output tensors


@dataclass(frozen=True, slots=True)
class Part:
    """A named tensor of a module's adapter.

    Attributes:
        place: the A or the B of the low-rank product, or beside them.
        rate: whether it learns at the run's rate for A or for B.
        by_rank: whether its rows are the ranks, which can be frozen or begun afresh one by one.
        peft: the end of its name in a PEFT state dict. transposed: whether PEFT has it the other way round.
    """

    name: str
    shape: tuple[int, ...]
    place: Literal["A", "B", "beside"]
    rate: Literal["a", "b"]
    peft: str
    by_rank: bool = False
    transposed: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Parts = Callable[[Target, int], tuple[Part, ...]]
"""The parts of a module's adapter of some rank."""


def beside(parts: Sequence[Part]) -> int:
    """Values that parts take up besides A and B."""
    return sum(part.size for part in parts if part.place == "beside")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One slot's adapter of one module: A `[rank, in]` at `a`, B `[rank, out]` at `b`, `extras` further values at `x`.

    There is room for `capacity` ranks.
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
        return self.b + padded(self.capacity * self.target.out_features)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The parts of the flat store that are its own."""
        return [(self.a, self.end)] + ([(self.x, self.x + padded(self.extras))] if self.extras else [])

    def pair(self, store: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A [rank, in] and transposed B [rank, out] in a store; of all ranks there is room for, or the first few."""
        rank = self.capacity if rank is None else rank
        fan_in, fan_out = self.target.in_features, self.target.out_features
        return (
            store[self.a : self.a + rank * fan_in].view(rank, fan_in),
            store[self.b : self.b + rank * fan_out].view(rank, fan_out),
        )

    def beside(self, store: Tensor, parts: Parts) -> list[Tensor]:
        """What lies beside A and B, with room for all ranks."""
        room = [part for part in parts(self.target, self.capacity) if part.place == "beside"]
        values = store[self.x : self.x + beside(room)].split([part.size for part in room])
        return [piece.view(part.shape) for piece, part in zip(values, room, strict=True)]


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the parts of one adapter lie: its segments, and of each the parts with their offsets."""

    segments: tuple[Segment, ...]
    parts: tuple[tuple[tuple[Part, int], ...], ...]

    @classmethod
    def of(cls, segments: Sequence[Segment], parts: Parts, ranks: Mapping[str, int]) -> "Placed":
        """The adapter whose ranks these are, in segments with room for it."""
        own = [segment for segment in segments if segment.target.name in ranks]
        return cls(tuple(own), tuple(tuple(_offsets(s, parts, ranks[s.target.name])) for s in own))

    def views(self, store: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Module name -> its parts in a flat store; views, not copies."""
        return {
            segment.target.name: tuple(store[at : at + part.size].view(part.shape) for part, at in parts)
            for segment, parts in zip(self.segments, self.parts, strict=True)
        }

    def flat(self, store: Tensor) -> list[Tensor]:
        """The parts of all modules, one after another; views."""
        return [part for parts in self.views(store).values() for part in parts]

    def blank(self, device: torch.device) -> tuple[Tensor, list[list[Tensor]]]:
        """Zeros on the host for all parts in one piece, and the parts of each module as views of it."""
        sizes = [part.size for parts in self.parts for part, _ in parts]
        whole = zeros(sum(sizes), device)
        pieces = iter(whole.split(sizes))
        return whole, [[next(pieces).view(part.shape) for part, _ in parts] for parts in self.parts]

    @torch.no_grad()
    def write(self, values: Tensor, stores: Sequence[Tensor]) -> None:
        """Puts the same host values of all parts, one after another as in `flat`, into some stores."""
        moved = send(values, stores[0].device)
        for store in stores:
            parts = [part.view(-1) for part in self.flat(store)]
            torch._foreach_copy_(parts, moved.split([part.numel() for part in parts]))


class Layout:
    """The segments of every slot.

    Args:
        ranks: of each slot, module name -> ranks there is room for. extras: of each slot, what gives the values that it
            may need beside A and B of a module.
    """

    def __init__(
        self, targets: Sequence[Target], ranks: Sequence[Mapping[str, int]], extras: Sequence[Callable[[Target], int]]
    ) -> None:
        self.slots = len(ranks)
        self.members = groups(targets, {name for own in ranks for name in own})
        self.segments: list[Segment] = []
        self.bounds = [0]  # of the values of A and B of each group, and of its table
        self.tables: list[tuple[int, int, list[int]]] = []  # start, width and each member's column
        for group, members in enumerate(self.members):
            self._add(group, members, ranks, extras)
        self.size = self.bounds[-1]
        self.by_slot = [[segment for segment in self.segments if segment.slot == slot] for slot in range(self.slots)]
        self.by_group: list[list[Segment]] = [[] for _ in self.members]
        for segment in self.segments:
            self.by_group[segment.group].append(segment)
        self.spans = [_merged([span for segment in own for span in segment.spans]) for own in self.by_slot]

    def _add(
        self, group: int, members: Sequence[Target], ranks: Sequence[Mapping[str, int]],
        extras: Sequence[Callable[[Target], int]],
    ) -> None:  # fmt: skip
        offset, found = self.bounds[-1], []
        for slot, own in enumerate(ranks):
            for member, target in enumerate(members):
                if rank := own.get(target.name, 0):
                    a, b = offset, offset + padded(rank * target.in_features)
                    offset = b + padded(rank * target.out_features)
                    found.append(Segment(target=target, slot=slot, group=group, member=member, capacity=rank, a=a, b=b))
        widths = [padded(max(extra(target) for extra in extras)) for target in members]
        columns, width = [sum(widths[:member]) for member in range(len(members))], sum(widths)
        self.tables.append((offset, width, columns))
        self.segments += [
            replace(s, x=offset + s.slot * width + columns[s.member], extras=extras[s.slot](s.target)) for s in found
        ]
        self.bounds += [offset, offset + width * self.slots]

    def block_slots(self) -> Tensor:
        """Slot of each block of the store."""
        slots = torch.zeros(self.size // BLOCK, dtype=torch.int64)
        for segment in self.segments:
            slots[segment.a // BLOCK : segment.end // BLOCK] = segment.slot
        for start, width, _ in self.tables:
            for slot in range(self.slots):
                slots[(start + slot * width) // BLOCK : (start + (slot + 1) * width) // BLOCK] = slot
        return slots

    def linear(self, slot: int) -> list[Segment]:
        """A slot's segments of all but the embedding."""
        return [segment for segment in self.by_slot[slot] if segment.target.kind != "embedding"]

    def table(self, group: int, params: Tensor, grads: Tensor) -> Tensor:
        """The table [slots, values] beside a group, as a leaf whose gradients are added to `grads`."""
        start, width, _ = self.tables[group]
        part = slice(start, start + width * self.slots)
        leaf = params[part].view(-1, width).detach().requires_grad_()
        leaf.grad = grads[part].view(-1, width)
        return leaf


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


def padded(values: int) -> int:
    """Values up to the end of their last block."""
    return -(-values // BLOCK) * BLOCK


def _offsets(segment: Segment, parts: Parts, rank: int) -> list[tuple[Part, int]]:
    found, at = [], segment.x
    for part, room in zip(parts(segment.target, rank), parts(segment.target, segment.capacity), strict=True):
        found.append((part, {"A": segment.a, "B": segment.b, "beside": at}[part.place]))
        at += room.size if part.place == "beside" else 0
    return found


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjoining spans joined, so that a slot is updated in few long strides."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged
