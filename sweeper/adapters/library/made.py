"""What a rule gives, and what it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, ByExample, Task
from sweeper.adapters.library.experts import Router
from sweeper.errors import DataError
from sweeper.tasks.example import Encoded


@dataclass(frozen=True)
class Made:
    """A rule's router for a task, and what a record is to say of it: weights, losses, what was chosen.

    `router` None is the base model alone.
    """

    router: Router | ByExample | None
    facts: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Bench, Asked, Task], Made]


def few(task: Task, asked: Asked) -> list[Encoded]:
    """The training examples of a task that a rule learns from, drawn by seed.

    Raises:
        DataError: the task has none.
    """
    every = task.splits["train"].examples
    if not every:
        rules = ",".join(asked.learns)
        raise DataError(f"rules={rules} learns from training examples, and dataset={task.dataset.name} has none")
    drawn = np.random.default_rng([asked.seed, 0]).permutation(len(every))[: asked.examples]
    return [every[i] for i in drawn.tolist()]
