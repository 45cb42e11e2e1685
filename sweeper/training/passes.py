"""A step of some runs as forward passes: of whatever examples it has, or task by task."""

from collections.abc import Sequence
from dataclasses import dataclass

from sweeper.tasks.example import Tokens
from sweeper.training.batches import EMPTY, supervised
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """A forward pass.

    Attributes:
        rows: the token rows of each lane. tasks: of each lane, which task of its run each row is of.
        before: of each lane, rows that the step has had already.
        task: the one that all rows are of, where passes are by task. ends: whether it is the last of that task.
    """

    rows: list[list[Tokens]]
    tasks: list[list[int]]
    before: list[int]
    task: int | None = None
    ends: bool = False

    @property
    def empty(self) -> bool:
        """Whether it has no target token, of no run."""
        return not any(map(supervised, self.rows))


def passes(states: Sequence[RunState], config: PackConfig) -> list[Pass]:
    """The passes of the coming step of some runs, a lane each.

    By task, every task has as many passes with as many rows, filled up with empty ones.
    """
    micros, found = config.accumulation, []
    if config.by_task is None:
        for micro in range(micros):
            drawn = [_rows(state, state.order.batch(state.done * micros + micro)) for state in states]
            lanes = [rows for rows, _ in drawn]
            before = [micro * len(rows) for rows in lanes]
            found.append(Pass(rows=lanes, tasks=[tasks for _, tasks in drawn], before=before))
        return found
    count, size = config.by_task
    for task in range(count):
        own = [_of_task(state, task, micros) for state in states]
        for micro in range(micros):
            lanes = [[*rows[micro * size : (micro + 1) * size], *[EMPTY] * size][:size] for rows in own]
            before = [(task * micros + micro) * size] * len(lanes)
            found.append(Pass(
                rows=lanes, tasks=[[task] * size] * len(lanes), before=before, task=task, ends=micro == micros - 1,
            ))  # fmt: skip
    return found


def weights(state: RunState, lane: int, every: Sequence[Pass]) -> list[tuple[list[float], list[float]]]:
    """For each pass of a step, of each row of a run's lane: the weight of a target token, and that of its example.

    Where an example is several rows, the tokens of its first, of its second and so on add up to 1 each.
    """
    each, tasks = state.rows_of_example, 1 if state.mixture is None else len(state.mixture.names)
    targets, examples = [[0] * tasks for _ in range(each)], [0] * tasks
    for one in every:
        for place, (row, task) in enumerate(zip(one.rows[lane], one.tasks[lane], strict=True)):
            targets[place % each][task] += supervised([row])
            examples[task] += place % each == 0
    heavy, shares = [_by_task(state, counts) for counts in targets], _by_task(state, examples)
    return [
        (
            [heavy[place % each][task] for place, task in enumerate(one.tasks[lane])],
            [shares[task] for task in one.tasks[lane]],
        )
        for one in every
    ]


def _by_task(state: RunState, counts: Sequence[int]) -> list[float]:
    """Weight of one of so many tokens, or examples, of each task."""
    return [1 / max(counts[0], 1)] if state.mixture is None else state.mixture.token_weights(counts)


def _of_task(state: RunState, task: int, micros: int) -> list[Tokens]:
    """The token rows of the coming step of a run that are of one of its tasks."""
    assert state.mixture is not None
    drawn = [i for micro in range(micros) for i in state.order.batch(state.done * micros + micro)]
    return _rows(state, [i for i in drawn if state.mixture.task_of[i] == task])[0]


def _rows(state: RunState, chosen: Sequence[int]) -> tuple[list[Tokens], list[int]]:
    """The token rows of some examples, and which task of its run each is of."""
    rows: list[Tokens] = []
    tasks: list[int] = []
    for i in chosen:
        own = state.rows[i]
        rows += own
        tasks += [0 if state.mixture is None else int(state.mixture.task_of[i])] * len(own)
    return rows, tasks
