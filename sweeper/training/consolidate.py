"""What a run with elastic weights takes along from a task of a sequence that is over: its Fisher information.

It is the empirical one: the mean, over training examples of the task, of the squared gradient of the example's own NLL.
The NLL is summed over the response's tokens, not averaged: an example is one draw of the likelihood that the posterior
of Kirkpatrick et al. (2017, eq. 2) is made of, and a long response says more of the weights than a short one.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sweeper.lora import elastic
from sweeper.lora.store import AdapterStore
from sweeper.training.pack import Pack
from sweeper.training.run_state import RunState


def consolidate(pack: Pack, group: Sequence[tuple[int, RunState]]) -> None:
    """Has the runs of some slots hold, from now on, what the task depends on that each has just ended.

    Every pass has a row of each of them; the other slots keep every bit.
    """
    store = pack.store
    assert isinstance(store, AdapterStore)
    sums = {slot: [torch.zeros_like(piece) for piece in store.pieces(slot, store.params)] for slot, _ in group}
    chosen = {slot: examples(state, state.consolidated) for slot, state in group}
    for number in range(max(map(len, chosen.values()))):
        present = [(slot, state) for slot, state in group if number < len(chosen[slot])]
        pack.add_gradients(
            [slot for slot, _ in present], [state.examples[chosen[slot][number]] for slot, state in present]
        )
        for slot, _ in present:
            elastic.take_squares(store, slot, sums[slot])
    pack.sound = False
    for slot, state in group:
        elastic.remember(store, slot, sums[slot], len(chosen[slot]))
        state.consolidated += 1
    pack.sound = True


def examples(state: RunState, task: int) -> list[int]:
    """Positions of the training examples that the Fisher information of a task is taken from; the run's seed draws."""
    assert state.mixture is not None
    own = np.flatnonzero(state.mixture.task_of == task)
    drawn = np.random.default_rng([state.seed, task]).permutation(own)
    return [int(i) for i in drawn[: state.spec.sharing.fisher_examples]]


def seen(state: RunState) -> list[int]:
    """Positions of all the examples that were looked at so."""
    return [i for task in range(state.consolidated) for i in examples(state, task)]
