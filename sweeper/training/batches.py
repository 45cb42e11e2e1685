"""Which examples a run sees at which step, and how the lanes of a pack become one rectangular batch."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sweeper.fused.rows import Rows
from sweeper.objectives.objective import REFERENCE, SHARE, VALUE, Row
from sweeper.tasks.example import Encoded, Tokens, scored

V = TypeVar("V")
EMPTY = Encoded(id="", input_ids=(0,), prompt_length=1)  # a row without targets, where a batch has to be filled up
WINDOW = 32  # steps whose examples are sorted by length together


class DataOrder:
    """The examples of each batch, from the seed, the lengths and the size of a step alone.

    Every epoch is a fresh permutation. Within a window of steps the examples are sorted by length and the steps then
    visited in an order that is the same for every seed, so batches are short on padding and the runs of a pack meet
    batches of like length at the same step. A step is then cut into its forward passes: how many there are changes
    nothing about which examples it has.

    Args:
        lengths: tokens of each example. batch_size: examples of one forward pass. seed: the run's seed.
        accumulation: forward passes of a step. bucketed: False keeps the plain permutation.
        counts: examples of each step, where not every step has batch_size * accumulation; begins again at its end.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, *, accumulation: int = 1,
        bucketed: bool = True, counts: Sequence[int] | np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.lengths = np.asarray(lengths)
        self.batch_size, self.accumulation, self.seed, self.bucketed = batch_size, accumulation, seed, bucketed
        self.counts = np.asarray([batch_size * accumulation] if counts is None else counts, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(self.counts)])
        self._windows: dict[int, list[list[int]]] = {}
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, index: int) -> list[int]:
        """Positions of the examples of the `index`-th forward pass of the run, counted over steps and epochs."""
        step, micro = divmod(index, self.accumulation)
        return self.step(step)[micro * self.batch_size : (micro + 1) * self.batch_size]

    def step(self, step: int) -> list[int]:
        """Positions of the examples of a step, from 0."""
        window, place = divmod(step, WINDOW)
        return latest(self._windows, window, self._make_window)[place]

    def _drawn(self, step: int) -> int:
        """Examples of all steps before one."""
        cycles, place = divmod(step, len(self.counts))
        return int(cycles * self._before[-1] + self._before[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        return latest(self._epochs, epoch, self._make_epoch)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def _make_window(self, window: int) -> list[list[int]]:
        first, total = window * WINDOW, len(self.lengths)
        stream = range(self._drawn(first), self._drawn(first + WINDOW))
        chosen = np.array([self._epoch(n // total)[n % total] for n in stream], dtype=np.int64)
        if self.bucketed:
            chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
        order = np.random.default_rng([0, window]).permutation(WINDOW) if self.bucketed else np.arange(WINDOW)
        # step `place` has the examples that are `order[place]`-th by length
        counts = self.counts[(first + np.argsort(order)) % len(self.counts)]
        parts = np.split(chosen, np.cumsum(counts)[:-1])
        return [parts[place].tolist() for place in order]


def latest(found: dict[int, V], key: int, make: Callable[[int], V], most: int = 2) -> V:
    """`make(key)`, kept in `found` with those of at most so many keys.

    An `lru_cache` of a method holds its object in a cycle, which stays in memory until the collector comes by.
    """
    value = found.get(key)
    if value is None:
        value = make(key)
        while len(found) >= most:
            found.pop(next(iter(found)), None)
        found[key] = value
    return value


@dataclass
class Batch:
    """One batch of a pack: L lanes of R sequences each.

    Rectangular, ids [L*R, T] are padded on the right. Compact, ids [L, S] are the sequences of each lane end to end,
    and `starts` and `stops` [L*S] say where that of each token begins and ends (`sweeper.fused.rows`).

    index [L, K] flat positions into `ids` whose next token is a target; targets [L, K]; weights [L, K] float32, 0 for
    padding, else the weight of the token (`Outputs.weights`); rows [L, K] which sequence of its lane a target is of;
    positions [L, K] its place in there, from 0; lengths [L*R] tokens of each sequence; tasks [L*R] which task of its
    run each is of, 0 where there is one; prompts [L*R] tokens of each sequence's prompt; facts [L*R, 3] what a loss
    must know of each (`Outputs.facts`).
    """

    ids: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    rows: Tensor
    positions: Tensor
    lengths: Tensor
    tasks: Tensor
    prompts: Tensor
    facts: Tensor
    starts: Tensor | None = None
    stops: Tensor | None = None

    @property
    def compact(self) -> bool:
        return self.starts is not None

    @property
    def shape(self) -> tuple[bool, int, int, int, int]:
        """Whether it is compact, lanes, sequences a lane, padded length of a sequence or a lane, targets a lane."""
        lanes, targets = self.index.shape
        return self.compact, lanes, self.lengths.shape[0] // lanes, self.ids.shape[1], targets

    def repeated(self, lanes: int) -> "Batch":
        """This batch of one lane for several."""
        first = torch.arange(lanes)[:, None] * self.ids.numel()
        starts, stops = (
            None if one is None else (one + first.int()).flatten() for one in (self.starts, self.stops)
        )  # fmt: skip
        flat = (self.lengths, self.tasks, self.prompts)
        targets, weights, rows, positions = (
            one.repeat(lanes, 1) for one in (self.targets, self.weights, self.rows, self.positions)
        )  # fmt: skip
        lengths, tasks, prompts = (one.repeat(lanes) for one in flat)
        return Batch(
            self.ids.repeat(lanes, 1), self.index + first, targets, weights, rows, positions, lengths, tasks, prompts,
            self.facts.repeat(lanes, 1), starts, stops,
        )  # fmt: skip

    def lane(self, lane: int) -> "Batch":
        """One lane of a rectangular batch, no longer or wider than it would be if the others were not there."""
        _, _, sequences, length, _ = self.shape
        rows = slice(lane * sequences, (lane + 1) * sequences)
        own = _round(int(self.lengths[rows].max()), False)
        weighed = (self.weights[lane] > 0).nonzero()
        width = int(weighed[-1]) + 1 if len(weighed) else 1
        place = self.index[lane, :width] - rows.start * length
        index = place // length * own + place % length
        each = (self.targets, self.weights, self.rows, self.positions)
        targets, weights, numbers, positions = (one[lane : lane + 1, :width] for one in each)
        return Batch(
            self.ids[rows, :own], index[None].clamp(min=0), targets, weights, numbers, positions, self.lengths[rows],
            self.tasks[rows], self.prompts[rows], self.facts[rows],
        )  # fmt: skip

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, from where a copy to the GPU does not wait for what the GPU is doing."""
        return self._each(lambda tensor: tensor.pin_memory())

    def copy_(self, other: "Batch") -> None:
        for field in dataclasses.fields(self):
            mine, new = getattr(self, field.name), getattr(other, field.name)
            if mine is not None:
                mine.copy_(new, non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        held = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return dataclasses.replace(self, **{name: change(one) for name, one in held if one is not None})


def supervised(examples: Sequence[Tokens]) -> int:
    """Target tokens of some examples."""
    return sum(end - start for example in examples for start, end in scored(example))


def tokens_of(examples: Sequence[Tokens]) -> int:
    """Tokens of some examples, prompts and answers; those that fill up a batch have none."""
    return sum(len(example.input_ids) for example in examples if example is not EMPTY)


def mean_weights(examples: Sequence[Tokens]) -> list[float]:
    """Weights with which a loss is the mean over all target tokens of some examples."""
    return [1 / supervised(examples)] * len(examples)


def collate(
    lanes: Sequence[Sequence[Tokens]], weights: Sequence[Sequence[float]], *, fixed: bool, count: int | None = None,
    tasks: Sequence[Sequence[int]] | None = None, shares: Sequence[Sequence[float]] | None = None,
    compact: bool = False,
) -> Batch:  # fmt: skip
    """Batch of every lane's rows; causal attention never looks at what follows, so padding needs no mask.

    Args:
        lanes: the rows of each lane; those that have fewer than others are filled up with empty ones.
        weights: for each lane, of each of its rows, the weight of a target token.
        fixed: round lengths up to few distinct values, for compiled and captured steps.
        count: lanes of the batch; those beyond the given ones are empty and their loss is 0.
        tasks: for each lane, which task of its run each of its rows is of.
        shares: for each lane, of each of its rows, the weight of the example it is of; without it all alike.
        compact: sequences end to end, no padding but at the end of a lane.
    """
    rows, lanes_in_all = max(map(len, lanes)), count or len(lanes)
    if compact:
        length = _round(max(sum(len(e.input_ids) for e in lane) for lane in lanes), fixed, finer=2, most=128)
    else:
        length = _round(max(len(e.input_ids) for lane in lanes for e in lane), fixed)
    width = max(supervised(lane) for lane in lanes)
    # a target costs a row of logits and no more, so its number may be rounded coarsely: fewer shapes to capture
    width = max(32, 1 << (width - 1).bit_length()) if fixed else max(width, 1)
    ids = np.zeros((lanes_in_all * (1 if compact else rows), length), dtype=np.int64)
    flat = ids.reshape(-1)
    index, targets, numbers, places = np.zeros((4, lanes_in_all, width), dtype=np.int64)
    weighed = np.zeros((lanes_in_all, width), dtype=np.float32)
    lengths = np.ones(lanes_in_all * rows, dtype=np.int64)
    prompts = np.ones(lanes_in_all * rows, dtype=np.int64)
    tasked = np.zeros(lanes_in_all * rows, dtype=np.int64)
    facts = np.zeros((lanes_in_all * rows, 3), dtype=np.float32)
    for lane, (examples, heavy) in enumerate(zip(lanes, weights, strict=True)):
        filled, own = 0, slice(lane * rows, lane * rows + len(examples))
        facts[own, SHARE] = 1 / len(examples) if shares is None else shares[lane]
        if tasks is not None:
            tasked[own] = tasks[lane]
        first = lane * length
        for row, (example, weight) in enumerate(zip(examples, heavy, strict=True), start=lane * rows):
            tokens = example.input_ids
            first = first if compact else row * length
            flat[first : first + len(tokens)] = tokens
            lengths[row], prompts[row] = len(tokens), example.prompt_length
            for start, end in scored(example):
                part = slice(filled, filled + end - start)
                index[lane, part] = first + np.arange(start - 1, end - 1)
                numbers[lane, part], places[lane, part] = row - lane * rows, np.arange(start, end)
                targets[lane, part], weighed[lane, part] = tokens[start:end], weight
                filled = part.stop
            if isinstance(example, Row):
                facts[row, VALUE], facts[row, REFERENCE] = example.value, example.reference
            first += len(tokens)
    each = (ids, index, targets, weighed, numbers, places, lengths, tasked, prompts, facts)
    found = Batch(*map(torch.from_numpy, each))
    if compact:
        held = Rows.of([[len(e.input_ids) for e in lane] for lane in lanes], length, lanes_in_all)
        found.starts, found.stops = held.starts, held.stops
    return found


def distinct_lengths(lengths: Sequence[int]) -> int:
    """Padded lengths that batches of these examples can take in a compiled step."""
    return len({_round(length, True) for length in lengths})


def _round(value: int, fixed: bool, finer: int = 1, most: int | None = None) -> int:
    # eager: multiples of 8. Fixed: beyond 32 at most a third is padding, and a handful of shapes over a whole sweep
    if not fixed:
        return -(-value // 8) * 8
    step = 16
    while step * 4 * finer < value and (most is None or step < most):
        step *= 2
    return -(-value // step) * step
