"""Cost against quality: the Pareto front, how sure its members are, and its hypervolume. Quality here is a loss: lower
is better (callers negate a metric that is to be high), and so is cost."""

import moocore
import numpy as np
from numpy.typing import NDArray

from .stats import Array


def front(cost_A: Array, loss_A: Array) -> NDArray[np.bool_]:
    """Arms that no other arm equals or beats on both and beats on one; of exact duplicates all are members."""
    points = np.column_stack([cost_A, loss_A])
    known = np.isfinite(points).all(axis=1)
    member = np.zeros(len(points), dtype=bool)
    if known.any():
        member[known] = moocore.is_nondominated(points[known], keep_weakly=True)
    return member


def membership(cost_A: Array, loss_BA: Array) -> Array:
    """Share of the joint bootstrap draws in which each arm is on the front (costs are known, losses are drawn)."""
    order = np.argsort(cost_A, kind="stable")
    cost = np.asarray(cost_A)[order]
    starts = np.flatnonzero(np.r_[True, np.diff(cost) > 0])
    group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(cost)]))
    best_BG = np.minimum.reduceat(loss_BA[:, order], starts, axis=1)
    cheaper_BG = np.minimum.accumulate(best_BG, axis=1)
    cheaper_BG = np.concatenate([np.full((len(loss_BA), 1), np.inf), cheaper_BG[:, :-1]], axis=1)
    loss = loss_BA[:, order]
    inside = (loss < cheaper_BG[:, group]) & (loss <= best_BG[:, group])
    found = np.empty(len(cost))
    found[order] = inside.mean(axis=0)
    return found


def hypervolume(cost_A: Array, loss_A: Array, window: tuple[float, float], reference: float) -> float:
    """Area between a reference loss and the best loss that each budget of a window buys, over the window's width: the
    mean gain on the reference, in units of the loss. Where the window has no width, the gain at its end.

    A window that several sets of arms share, from the largest of their smallest costs on, rewards none for arms that
    are merely cheaper than the others'.

    Raises:
        ValueError: no arm is as cheap as the window's start.
    """
    start, end = window
    if not (cost_A <= start).any():
        raise ValueError(f"no arm costs at most {start:g}")
    edges = np.unique(np.clip(np.r_[start, cost_A, end], start, end))
    best_K = np.array([loss_A[cost_A <= edge].min() for edge in edges])
    gain_K = np.maximum(reference - best_K, 0.0)
    return float(gain_K[:-1] @ np.diff(edges) / (end - start)) if end > start else float(gain_K[-1])
