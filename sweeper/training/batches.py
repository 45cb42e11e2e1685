"""Which examples a run sees at which step, and how the lanes of a pack become one rectangular batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

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
    """One rectangular batch of a pack.

    ids [L*R, T] token ids, each lane R sequences; index [L, K] flat positions (into L*R*T) whose next token is a
    target; targets [L, K]; weights [L, K] float32, 0 for padding, else the weight of the token (`Outputs.weights`);
    lengths [L*R] tokens of each sequence; tasks [L*R] which task of its run each is of, 0 where there is one;
    prompts [L*R] tokens of each sequence's prompt; facts [L*R, 3] what a loss must know of each (`Outputs.facts`).
    """

    ids: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    lengths: Tensor
    tasks: Tensor
    prompts: Tensor
    facts: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Lanes, sequences a lane, padded length, padded targets a lane."""
        lanes, targets = self.index.shape
        return lanes, self.ids.shape[0] // lanes, self.ids.shape[1], targets

    @property
    def rows(self) -> Tensor:
        """[L, K] which sequence of its lane a target is of; 0 for padding."""
        lanes, sequences, length, _ = self.shape
        first = torch.arange(lanes, device=self.index.device)[:, None] * sequences
        return (self.index // length - first).clamp(min=0)

    @property
    def positions(self) -> Tensor:
        """[L, K] place of each target in its sequence, from 0."""
        return self.index % self.ids.shape[1] + 1

    def repeated(self, lanes: int) -> "Batch":
        """This batch of one lane for several."""
        rows = torch.arange(lanes)[:, None] * self.ids.numel()
        return Batch(
            self.ids.repeat(lanes, 1), self.index + rows, self.targets.repeat(lanes, 1), self.weights.repeat(lanes, 1),
            self.lengths.repeat(lanes), self.tasks.repeat(lanes), self.prompts.repeat(lanes),
            self.facts.repeat(lanes, 1),
        )  # fmt: skip

    def lane(self, lane: int) -> "Batch":
        """One lane as a batch of its own, no longer or wider than it would be if the others were not there."""
        _, sequences, length, _ = self.shape
        rows = slice(lane * sequences, (lane + 1) * sequences)
        own = _round(int(self.lengths[rows].max()), False)
        weighed = (self.weights[lane] > 0).nonzero()
        width = int(weighed[-1]) + 1 if len(weighed) else 1
        place = self.index[lane, :width] - rows.start * length
        index = place // length * own + place % length
        targets, weights = self.targets[lane : lane + 1, :width], self.weights[lane : lane + 1, :width]
        return Batch(
            self.ids[rows, :own], index[None].clamp(min=0), targets, weights, self.lengths[rows], self.tasks[rows],
            self.prompts[rows], self.facts[rows],
        )  # fmt: skip

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self._tensors()))

    def pinned(self) -> "Batch":
        """In page-locked memory, from where a copy to the GPU does not wait for what the GPU is doing."""
        return Batch(*(t.pin_memory() for t in self._tensors()))

    def copy_(self, other: "Batch") -> None:
        for mine, new in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(new, non_blocking=True)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.index, self.targets, self.weights, self.lengths, self.tasks, self.prompts, self.facts


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
) -> Batch:  # fmt: skip
    """Right-padded batch of every lane's rows; causal attention never looks at what follows, so no mask is needed.

    Args:
        lanes: the rows of each lane; those that have fewer than others are filled up with empty ones.
        weights: for each lane, of each of its rows, the weight of a target token.
        fixed: round lengths up to few distinct values, for compiled and captured steps.
        count: lanes of the batch; those beyond the given ones are empty and their loss is 0.
        tasks: for each lane, which task of its run each of its rows is of.
        shares: for each lane, of each of its rows, the weight of the example it is of; without it all alike.
    """
    rows, lanes_in_all = max(map(len, lanes)), count or len(lanes)
    length = _round(max(len(e.input_ids) for lane in lanes for e in lane), fixed)
    width = max(supervised(lane) for lane in lanes)
    # a target costs a row of logits and no more, so its number may be rounded coarsely: fewer shapes to capture
    width = max(32, 1 << (width - 1).bit_length()) if fixed else max(width, 1)
    ids = np.zeros((lanes_in_all * rows, length), dtype=np.int64)
    index = np.zeros((lanes_in_all, width), dtype=np.int64)
    targets = np.zeros((lanes_in_all, width), dtype=np.int64)
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
        for row, (example, weight) in enumerate(zip(examples, heavy, strict=True), start=lane * rows):
            tokens = example.input_ids
            ids[row, : len(tokens)] = tokens
            lengths[row], prompts[row] = len(tokens), example.prompt_length
            for start, end in scored(example):
                part = slice(filled, filled + end - start)
                index[lane, part] = row * length + np.arange(start - 1, end - 1)
                targets[lane, part], weighed[lane, part] = tokens[start:end], weight
                filled = part.stop
            if isinstance(example, Row):
                facts[row, VALUE], facts[row, REFERENCE] = example.value, example.reference
    return Batch(*map(torch.from_numpy, (ids, index, targets, weighed, lengths, tasked, prompts, facts)))


def distinct_lengths(lengths: Sequence[int]) -> int:
    """Padded lengths that batches of these examples can take in a compiled step."""
    return len({_round(length, True) for length in lengths})


def _round(value: int, fixed: bool) -> int:
    # eager: multiples of 8. Fixed: beyond 32 at most a third is padding, and a handful of shapes over a whole sweep
    if not fixed:
        return -(-value // 8) * 8
    step = 16
    while step * 4 < value:
        step *= 2
    return -(-value // step) * step
