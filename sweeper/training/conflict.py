"""What the gradients of a run's tasks do to one another while it trains: cosines between them, by module.

At a few steps of a run each task's gradient of the adapter is taken, of the mean NLL of the same few training examples
every time, without dropout, penalties or learnt weights, and without an update. Every run is looked at by itself, so
that what is found does not depend on who shares its pack. Where an adapter has rank blocks, two tasks are compared in
those that both of them train, and frozen values count as 0.

Shapes: P tasks, B rank blocks (1 where there are none).
"""

import itertools
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweeper.lora.blocks import rows_of
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.store import AdapterStore
from sweeper.training.batches import collate, mean_weights
from sweeper.training.pack import Pack
from sweeper.training.run_state import RunState

EXAMPLES = 8  # of each task whose gradient is taken


def steps(state: RunState) -> frozenset[int]:
    """The steps done (from 0) after which a run's gradients are compared: evenly from warm-up to before the last."""
    times = state.spec.evaluation.conflict
    if not times or not state.steps or state.mixture is None:
        return frozenset()
    return _evenly(times, math.ceil(state.steps * state.optim.warmup_fraction), state.steps - 1)


@lru_cache(maxsize=256)
def _evenly(times: int, first: int, last: int) -> frozenset[int]:
    return frozenset(np.linspace(min(first, last), last, times).round().astype(int).tolist())


def due(state: RunState) -> bool:
    """Whether a run's gradients are to be compared before its next step."""
    return state.done in steps(state) and all(row["step"] != state.done for row in state.conflict)


def chosen(state: RunState) -> list[list[int]]:
    """The training examples of each task that a run's gradients are taken of; of its seed."""
    assert state.mixture is not None
    rng = np.random.default_rng([state.seed, 0xC05])
    own = [np.flatnonzero(state.mixture.task_of == task) for task in range(len(state.mixture.names))]
    return [sorted(rng.choice(all_, min(EXAMPLES, len(all_)), replace=False).tolist()) for all_ in own]


def look(pack: Pack, slot: int, state: RunState) -> None:
    """Compares the gradients of a run's tasks as it is now; adds what is found to `state.conflict`."""
    began = time.perf_counter()
    by_task = [_gradient(pack, slot, state, task, own) for task, own in enumerate(chosen(state))]
    trains = _trains(state)
    products = {name: _products([own[name] for own in by_task], state, name) for name in by_task[0]}
    every = torch.stack(list(products.values())).cpu().numpy()
    row: dict[str, Any] = {"step": state.done, "adapter": cosines(every.sum(0), trains)}
    row["cosine"] = {name: cosines(own, trains) for name, own in zip(products, every, strict=True)}
    row["norms"] = {name: norms(own) for name, own in zip(products, every, strict=True)}
    state.conflict.append(row | {"seconds": time.perf_counter() - began})


def cosines(products_BPP: np.ndarray, trains: Sequence[frozenset[int]]) -> list[float | None]:
    """Of every pair of tasks, in the order of `pairs`; None where they share nothing, or one has no gradient there.

    Args:
        products_BPP: g_i . g_j within each block. trains: the tasks that train it.
    """
    found: list[float | None] = []
    for i, j in itertools.combinations(range(products_BPP.shape[1]), 2):
        both = products_BPP[[number for number, own in enumerate(trains) if {i, j} <= own]].sum(0)
        size = math.sqrt(both[i, i] * both[j, j]) if len(both) else 0.0
        found.append(round(float(both[i, j]) / size, 4) if size > 0 and math.isfinite(size) else None)
    return found


def norms(products_BPP: np.ndarray) -> list[float]:
    """Of every task's gradient, in nats over a unit of the parameters, all blocks together."""
    return [float(f"{math.sqrt(max(square, 0.0)):.4g}") for square in products_BPP.sum(0).diagonal().tolist()]


def pairs(names: Sequence[str]) -> list[list[str]]:
    """Every pair of tasks."""
    return [list(pair) for pair in itertools.combinations(names, 2)]


def recorded(state: RunState) -> dict[str, Any]:
    """What a record says of all comparisons; see `Record.conflict`."""
    if not state.conflict or state.mixture is None:
        return {}
    rows = state.conflict
    return {
        "steps": [row["step"] for row in rows], "pairs": pairs(state.mixture.names),
        "tasks": list(state.mixture.names), "examples": EXAMPLES,
        "adapter": [row["adapter"] for row in rows],
        "modules": {
            name: {what: [row[what][name] for row in rows] for what in ("cosine", "norms")} for name in rows[0]["norms"]
        },
        "seconds": sum(row["seconds"] for row in rows),
    }  # fmt: skip


def _gradient(pack: Pack, slot: int, state: RunState, task: int, examples: Sequence[int]) -> dict[str, list[Tensor]]:
    """Module name -> the gradients of its parts, of the mean NLL of some examples of a task."""
    store = pack.store
    assert isinstance(store, AdapterStore)
    rows = [row for i in examples for row in state.rows[i]]
    weights, size = mean_weights(rows), pack.config.batch_size
    pack.use_lanes([slot])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        batch = collate([rows[part]], [weights[part]], fixed=False, tasks=[[task] * len(rows[part])])
        pack.look_at_gradients(batch)
    found = {name: [part.clone() for part in parts] for name, parts in store.views(slot, store.grads).items()}
    store.grads.zero_()
    if store.rates is not None:
        for name, rates in store.views(slot, store.rates).items():
            found[name] = [part.masked_fill_(rate == 0, 0.0) for part, rate in zip(found[name], rates, strict=True)]
    return found


def _trains(state: RunState) -> Sequence[frozenset[int]]:
    """The tasks that train each rank block."""
    assert isinstance(state.adapter, AdapterSpec)
    assert state.mixture is not None
    return [block.trains for block in state.adapter.blocks] or [frozenset(range(len(state.mixture.names)))]


def _products(by_task: Sequence[Sequence[Tensor]], state: RunState, name: str) -> Tensor:
    """g_i . g_j of a module within each of its rank blocks [B, P, P], float64."""
    assert isinstance(state.adapter, AdapterSpec)
    blocks = state.adapter.blocks
    ranges: Sequence[slice] = rows_of(blocks, name) if blocks else [slice(None)]
    found = []
    for rows in ranges:
        own = torch.stack([torch.cat([part[rows].flatten() for part in parts]) for parts in by_task]).double()
        found.append(own @ own.t())
    return torch.stack(found)
