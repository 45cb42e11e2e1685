"""LoRAHub (Huang et al. 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition").

One weight a member in [-1.5, 1.5], found without gradients so that the NLL of a few examples plus alpha sum |w| is
least. The combination is (sum w B)(sum w A), the paper's, where the members have one rank and scale in the same
modules; else the sum of w times the updates. The paper searches with nevergrad's Shiwa; this is CMA-ES from w = 0, the
base model.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sweeper.adapters.library import folding
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, Task
from sweeper.adapters.library.made import Made, few

BOUND, STEP = 1.5, 0.5


def lorahub(bench: Bench, asked: Asked, task: Task) -> Made:
    """The members' adapters as one, weighted for a task."""
    examples, experts = few(task, asked), bench.experts
    as_paper = folding.alike(experts)
    fold = folding.by_factor if as_paper else folding.by_update

    def loss(weights: Sequence[float]) -> float:
        nll = bench.nll(fold(experts, torch.tensor(weights)), examples)
        return nll + asked.alpha * sum(map(abs, weights))

    weights, least, first = search(loss, len(bench.members), budget=asked.budget, seed=asked.seed)
    return Made(
        fold(experts, torch.tensor(weights)),
        {
            "weights": weights,
            "form": folding.FACTORS if as_paper else folding.UPDATES,
            "loss": least, "loss_of_base": first, "examples": [example.id for example in examples],
        },
    )  # fmt: skip


def search(
    loss: Callable[[Sequence[float]], float], count: int, *, budget: int, seed: int
) -> tuple[list[float], float, float]:
    """The weights of least loss among those tried, their loss, and that of no member at all, which is tried first.

    Args:
        budget: evaluations of the loss, the first not counted.
    """
    from cmaes import CMA

    best = [0.0] * count
    first = least = loss(best)
    bounds = np.tile([-BOUND, BOUND], (count, 1))
    optimizer = CMA(mean=np.zeros(count), sigma=STEP, bounds=bounds, seed=seed)
    tried: list[tuple[np.ndarray, float]] = []
    for _ in range(budget):
        weights = optimizer.ask()
        found = loss(weights.tolist())
        if found < least:
            best, least = weights.tolist(), found
        # CMA-ES cannot rank what is no number
        tried.append((weights, found if np.isfinite(found) else np.finfo(float).max))
        if len(tried) == optimizer.population_size:
            optimizer.tell(tried)
            tried = []
    return best, least, first
