"""A flat float32 store: parameters, gradients and moments of every slot [F], and copies that some runs need."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Averaged(Protocol):
    """What a run puts into a slot, as far as its averages go: `average` is the decay, None where it has none."""

    @property
    def average(self) -> float | None: ...


Held = TypeVar("Held", bound=Averaged)


class Flat(Generic[Held]):
    """Values, gradients and moments of every slot.

    Attributes:
        spans: of each slot, the parts of the store that are its own. block_slot: slot of each block of 64 values.
        clocks_each: how many parts of a slot the optimiser may clip and schedule by themselves; clock c is of slot
            c // clocks_each. clock_spans, block_clock: as `spans` and `block_slot`, by clock.
        work: what the products read: the values, or their copy in the base's precision, kept by the optimiser.
        rates: each value's learning rate over its run's (0: frozen), None where all have their run's.
        rated: of each slot, whether its values have rates of their own.
        copies: further stores of the same layout: average, best, sensitivity, fisher, anchor.
        held: what each slot holds.
    """

    def __init__(
        self, spans: Sequence[list[tuple[int, int]]], block_slot: Tensor, copies: Iterable[str], *, size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.spans, self.block_slot = spans, block_slot.to(device)
        self.clocks_each, self.clock_spans, self.block_clock = 1, list(spans), self.block_slot
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        self.work = self.params
        self.rates: Tensor | None = None
        self.copies = {name: torch.zeros(size, device=device) for name in copies}
        self.held: list[Held | None] = [None] * len(spans)
        self.rated = [False] * len(spans)
        self.tasks = 0

    @property
    def weak(self) -> Any:
        """Itself, for what it holds: without cycles, a store that is dropped gives its memory back at once."""
        return weakref.proxy(self)

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self.spans)

    @property
    def clocks(self) -> int:
        """Clocks of all slots."""
        return len(self.clock_spans)

    def publish(self, slot: int) -> None:
        """Brings up to date what follows from a slot's parameters, where anything but the optimiser wrote them."""
        raise NotImplementedError

    def pieces(self, slot: int, store: Tensor) -> list[Tensor]:
        """A slot's own parts of a store; views."""
        return [store[start:stop] for start, stop in self.spans[slot]]

    @torch.no_grad()
    def update_ema(self, slot: int, step: int) -> None:
        """Moves the average of a slot's weights after its step `step` (from 1), if it has one.

        The decay is that of the run, or (1 + step) / (10 + step) where that is less, so that the start fades soon.
        """
        held = self.held[slot]
        if held is not None and held.average is not None:
            decay = min(held.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.pieces(slot, self.copies["average"]), self.pieces(slot, self.params), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it averages are where the weights are, of the slots that have one."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    @torch.no_grad()
    def _swap_averages(self) -> None:
        for slot, held in enumerate(self.held):
            if held is not None and held.average is not None:
                now, average = self.pieces(slot, self.params), self.pieces(slot, self.copies["average"])
                former = [piece.clone() for piece in now]
                torch._foreach_copy_(now, average)
                torch._foreach_copy_(average, former)
                self.publish(slot)

    def to_save(self, slot: int) -> Tensor:
        """The store whose weights a slot's run leaves: the average, where it has one."""
        held = self.held[slot]
        assert held is not None
        return self.params if held.average is None else self.copies["average"]

    @torch.no_grad()
    def keep_best(self, slot: int) -> None:
        """Remembers the weights of a slot as the best so far."""
        torch._foreach_copy_(self.pieces(slot, self.copies["best"]), self.pieces(slot, self.to_save(slot)))

    @torch.no_grad()
    def take_best(self, slot: int) -> None:
        """Gives a slot its best weights back."""
        for store in (self.params, self.to_save(slot)):
            torch._foreach_copy_(self.pieces(slot, store), self.pieces(slot, self.copies["best"]))
        self.publish(slot)
