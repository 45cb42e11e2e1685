"""Which examples a run sees at which step, and how the lanes of a pack become one rectangular batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sweeper.tasks.example import Tokens

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
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, *, accumulation: int = 1,
        bucketed: bool = True,
    ) -> None:  # fmt: skip
        self.lengths = np.asarray(lengths)
        self.batch_size, self.accumulation, self.seed, self.bucketed = batch_size, accumulation, seed, bucketed
        self._window = lru_cache(maxsize=2)(self._make_window)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, index: int) -> list[int]:
        """Positions of the examples of the `index`-th forward pass of the run, counted over steps and epochs."""
        step, micro = divmod(index, self.accumulation)
        window, place = divmod(step, WINDOW)
        return self._window(window)[place][micro * self.batch_size : (micro + 1) * self.batch_size]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def _make_window(self, window: int) -> list[list[int]]:
        of_step = self.batch_size * self.accumulation
        size, total = WINDOW * of_step, len(self.lengths)
        stream = np.arange(window * size, (window + 1) * size)
        chosen = np.array([self._epoch(int(n // total))[n % total] for n in stream])
        if self.bucketed:
            chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
        steps = chosen.reshape(WINDOW, of_step)
        order = np.random.default_rng([0, window]).permutation(WINDOW) if self.bucketed else range(WINDOW)
        return [steps[place].tolist() for place in order]


@dataclass
class Batch:
    """One rectangular batch of a pack.

    ids [L*R, T] token ids, each lane R sequences; index [L, K] flat positions (into L*R*T) whose next token is a
    target; targets [L, K]; weights [L, K] float32, 0 for padding, else 1 / (target tokens of the run's whole step);
    lengths [L*R] tokens of each sequence.
    """

    ids: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    lengths: Tensor

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

    def repeated(self, lanes: int) -> "Batch":
        """This batch of one lane for several."""
        rows = torch.arange(lanes)[:, None] * self.ids.numel()
        return Batch(
            self.ids.repeat(lanes, 1), self.index + rows, self.targets.repeat(lanes, 1), self.weights.repeat(lanes, 1),
            self.lengths.repeat(lanes),
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
        return self.ids, self.index, self.targets, self.weights, self.lengths


def supervised(examples: Sequence[Tokens]) -> int:
    """Target tokens of some examples."""
    return sum(len(example.input_ids) - example.prompt_length for example in examples)


def collate(
    lanes: Sequence[Sequence[Tokens]], totals: Sequence[int], *, fixed: bool, count: int | None = None
) -> Batch:
    """Right-padded batch of every lane's examples; causal attention never looks at what follows, so no mask is needed.

    Args:
        lanes: for each lane the same number of examples.
        totals: for each lane the target tokens that its loss is the mean over; 0 gives sums (weights of 1).
        fixed: round lengths up to few distinct values, for compiled and captured steps.
        count: lanes of the batch; those beyond the given ones are empty and their loss is 0.
    """
    rows, lanes_in_all = len(lanes[0]), count or len(lanes)
    length = _round(max(len(e.input_ids) for lane in lanes for e in lane), fixed)
    width = max(supervised(lane) for lane in lanes)
    # a target costs a row of logits and no more, so its number may be rounded coarsely: fewer shapes to capture
    width = max(32, 1 << (width - 1).bit_length()) if fixed else max(width, 1)
    ids = np.zeros((lanes_in_all * rows, length), dtype=np.int64)
    index = np.zeros((lanes_in_all, width), dtype=np.int64)
    targets = np.zeros((lanes_in_all, width), dtype=np.int64)
    weights = np.zeros((lanes_in_all, width), dtype=np.float32)
    lengths = np.ones(lanes_in_all * rows, dtype=np.int64)
    lengths[: len(lanes) * rows] = [len(example.input_ids) for examples in lanes for example in examples]
    for lane, (examples, total) in enumerate(zip(lanes, totals, strict=True)):
        filled = 0
        for row, example in enumerate(examples, start=lane * rows):
            tokens, prompt = example.input_ids, example.prompt_length
            ids[row, : len(tokens)] = tokens
            part = slice(filled, filled + len(tokens) - prompt)
            index[lane, part] = row * length + np.arange(prompt - 1, len(tokens) - 1)
            targets[lane, part] = tokens[prompt:]
            filled = part.stop
        weights[lane, :filled] = 1 / total if total else 1
    return Batch(*map(torch.from_numpy, (ids, index, targets, weights, lengths)))


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
