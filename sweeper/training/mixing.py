"""Which of its tasks a run of several sees at which step, and how much each counts.

Shapes: P tasks, S steps, N training examples of all tasks.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sweeper.errors import SpecError
from sweeper.tasks.mixture import LEARNT, Mixing
from sweeper.training.batches import DataOrder, latest


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """The tasks of a run.

    Attributes:
        names: of the tasks. task_of: [N] which of them each training example is of.
        counts: [S, P] examples of each task in each step; what is beyond the last step is as from the first on.
        weighting, surgery: how the tasks' losses and gradients are added up (`sweeper.tasks.mixture`).
        stage_ends: of a sequence, the steps after which a task is over, but the last one's.
    """

    names: tuple[str, ...]
    task_of: np.ndarray
    counts: np.ndarray
    weighting: str = "uniform"
    surgery: str = "none"
    stage_ends: frozenset[int] = frozenset()

    @classmethod
    def of(cls, mixing: Mixing, sizes: Mapping[str, int], *, steps: int, per_step: int) -> "Mixture":
        """The mixture of tasks with so many training examples, in steps of so many.

        Raises:
            SpecError: a task would have no example at all.
        """
        every = [0 if name in mixing.unseen else size for name, size in sizes.items()]
        own = list(sizes.values())
        ends = [stage.stop for stage in stages(len(every), steps)] if mixing.sequence else []
        drawn = counts(shares(mixing, every, steps), per_step)
        for name, seen in zip(sizes, drawn.sum(0), strict=True):
            if steps and not seen and name not in mixing.unseen:
                raise SpecError(
                    f"trainer.max_steps={steps}: {name} would have no example in {steps} steps of {per_step}; give "
                    "more steps, or dataset.options.sampling=equal"
                )
        return cls(
            names=tuple(sizes), task_of=np.repeat(np.arange(len(own)), own), counts=drawn,
            weighting=mixing.weights, surgery=mixing.surgery,
            stage_ends=frozenset(ends[:-1]),
        )  # fmt: skip

    def token_weights(self, targets: Sequence[int]) -> list[float]:
        """Weight of a target token of each task in a step that has so many `targets` of each.

        uniform: the loss is the sum of the tasks' means, each over its own tokens of the step. size: the same, each in
        proportion to its training examples, 1 on average. tokens: the mean over all tokens of the step. uncertainty: as
        uniform; what is learnt comes on top (`sweeper.training.weighing`).
        """
        if self.weighting == "tokens":
            return [1 / sum(targets)] * len(targets)
        heavy = np.ones(len(targets))
        if self.weighting == "size":
            sizes = np.bincount(self.task_of, minlength=len(targets))
            heavy = sizes / sizes.mean()
        return [float(weight) / max(own, 1) for weight, own in zip(heavy, targets, strict=True)]

    @property
    def learns(self) -> int:
        """How many weights of losses are learnt: of each task one, or none."""
        return len(self.names) if self.weighting == LEARNT else 0

    def by_task(self, accumulation: int) -> tuple[int, int] | None:
        """Tasks, and examples of one of them in a pass, where a step is cut into passes by task; None where it is not.

        Args:
            accumulation: passes for the examples of a task, as for those of a step that is not cut by task.
        """
        if self.surgery == "none":
            return None
        return len(self.names), -(-int(self.counts.max()) // accumulation)

    def clock(self, tasks: Collection[int]) -> "Clock":
        """The steps that have examples of any of some tasks."""
        return Clock(self.counts[:, sorted(tasks)].sum(1) > 0)


class Clock:
    """Counts the steps of a run that are also steps of one of its rank blocks."""

    def __init__(self, goes: np.ndarray) -> None:
        self._goes, self._before = goes, np.concatenate([[0], np.cumsum(goes)])

    def at(self, step: int) -> int | None:
        """Its own number (from 0) of a step of the run; None where it stands still."""
        cycle, place = divmod(step, len(self._goes))
        return int(cycle * self._before[-1] + self._before[place]) if self._goes[place] else None

    @property
    def steps(self) -> int:
        """Its steps in all."""
        return int(self._before[-1])


class MixedOrder:
    """The data order of a run of several tasks: in each step every task's own order, one task after another.

    Where a task has as many examples in every step, they are those that a run of it alone would see.
    """

    def __init__(self, lengths: Sequence[int], mixture: Mixture, seed: int, *, batch_size: int, accumulation: int):
        self.lengths = np.asarray(lengths)
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        sizes = np.bincount(mixture.task_of, minlength=len(mixture.names))
        self._first = np.cumsum(sizes) - sizes
        self._orders = [
            DataOrder(self.lengths[first : first + size], batch_size, seed, counts=mixture.counts[:, task])
            for task, (first, size) in enumerate(zip(self._first, sizes, strict=True))
        ]
        self._steps: dict[int, list[int]] = {}

    def batch(self, index: int) -> list[int]:
        """Positions of the examples of the `index`-th forward pass of the run."""
        step, micro = divmod(index, self.accumulation)
        return self.step(step)[micro * self.batch_size : (micro + 1) * self.batch_size]

    def step(self, step: int) -> list[int]:
        """Positions of the examples of a step, from 0."""
        return latest(self._steps, step, self._make_step, most=4)

    def _make_step(self, step: int) -> list[int]:
        return [
            int(first) + place for first, order in zip(self._first, self._orders, strict=True)
            for place in order.step(step)
        ]  # fmt: skip


def shares(mixing: Mixing, sizes: Sequence[int], steps: int) -> np.ndarray:
    """Each task's share of the examples of each step [S, P]."""
    if mixing.sequence:
        return _in_turn(len(sizes), steps, mixing.replay)
    heavy = np.asarray(sizes, dtype=float)
    seen = (heavy > 0).astype(float)
    heavy = seen if mixing.sampling == "equal" else seen * heavy ** (1 / mixing.temperature)
    return np.tile(heavy / heavy.sum(), (max(steps, 1), 1))


def stages(tasks: int, steps: int) -> list[range]:
    """The steps of each task of a sequence: equal parts, or as equal as they can be."""
    bounds = [-(-steps * task // tasks) for task in range(tasks + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def _in_turn(tasks: int, steps: int, replay: float) -> np.ndarray:
    """One task after another; from the second on, `replay` of the examples are of those before, alike."""
    found = np.zeros((max(steps, 1), tasks))
    for task, stage in enumerate(stages(tasks, steps)):
        found[stage.start : stage.stop, task] = 1 - (replay if task else 0.0)
        found[stage.start : stage.stop, :task] = replay / max(task, 1)
    if not steps:
        found[:, 0] = 1.0
    return found


def counts(shares: np.ndarray, per_step: int) -> np.ndarray:
    """Whole numbers of examples [S, P], `per_step` in each step, that keep to the shares as closely as they can.

    What a task is owed is carried on to the next step; each example goes to the task that is owed most.
    """
    owed = np.zeros(shares.shape[1])
    found = np.zeros(shares.shape, dtype=np.int64)
    for given, share in zip(found, shares, strict=True):
        owed += share * per_step
        for _ in range(per_step):
            given[np.where(share > 0, owed - given, -np.inf).argmax()] += 1
        owed -= given
    return found
