"""Arms over several tasks, after Agarwal et al. (2021): normalised scores, their mean and interquartile mean,
probability of improvement and performance profiles, all from one stratified, clustered bootstrap.

A task's score is normalised by what the task has to give: 0 is the base model, 1 the mean gain of all arms there. No
arm sets the scale by being the best, so none is favoured. Letters: T tasks, A arms, R seeds, G groups, B draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from . import stats
from .arms import Arm, Arrangement, Scores, Setting, higher_is_better
from .stats import Array, Draws

COLUMNS = [
    "model", "metric", "arm", "tasks", "seeds", "mean", "mean_low", "mean_high", "iqm", "iqm_low", "iqm_high",
    "reference", "improvement", "improvement_low", "improvement_high",
]  # fmt: skip
MOST_DRAWS = 1000
LEVELS = np.linspace(0.0, 1.5, 61)


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """Normalised scores of the arms that every task of a model has: measured `x_ATR` and drawn `drawn_BATR`."""

    model: str
    metric: str
    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    x_ATR: Array
    drawn_BATR: Array


def normalised(found: Arrangement, metric: str, *, draws: Draws) -> Iterator[Normalised]:
    """By model: arms that two or more tasks share, with equal seeds. A task in which the arms gain nothing over the
    base model on average has no scale and is left out."""
    for model in sorted({setting.model for setting in found.settings}):
        tasks = [one for one in found.settings if one.model == model and one.base is not None]
        tasks = [one for one in tasks if one.base is not None and metric in one.base.scores and _scale(one, metric) > 0]
        if len(tasks) < 2:
            continue
        by_label = [{arm.label: arm for arm in one.arms if metric in arm.scores} for one in tasks]
        labels = [label for label in by_label[0] if all(label in arms for arms in by_label)]
        seeds = set.intersection(*(set(arms[label].scores[metric].seeds) for arms in by_label for label in labels))
        if not labels or not seeds:
            continue
        rng = np.random.default_rng([draws.seed, len(tasks)])
        count = min(draws.draws, MOST_DRAWS)
        measured, drawn = [], []
        for task, arms in zip(tasks, by_label, strict=True):
            scores = [arms[label].scores[metric] for label in labels]
            x_AR, drawn_BAR = _drawn(task, scores, metric, sorted(seeds), count, rng)
            measured.append(x_AR)
            drawn.append(drawn_BAR)
        yield Normalised(
            model=model, metric=metric, arms=tuple(labels), tasks=tuple(task.name for task in tasks),
            x_ATR=np.stack(measured, axis=1), drawn_BATR=np.stack(drawn, axis=2),
        )  # fmt: skip


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, metric and arm: mean and interquartile mean over tasks and seeds of the normalised score, and
    the chance that a run of the arm beats one of the reference arm, the first, on a task drawn at random.

    Brackets are 95% percentile intervals; seeds' deviations are scaled by sqrt(R/(R-1)), because a bootstrap of few
    seeds is too narrow.
    """
    rows = []
    for metric in found.metrics:
        for one in normalised(found, metric, draws=draws):
            for i, label in enumerate(one.arms):
                row: dict[str, object] = {"model": one.model, "metric": metric, "arm": label}
                row |= {"tasks": len(one.tasks), "seeds": one.x_ATR.shape[2]}
                for name, reduce in (("mean", np.mean), ("iqm", stats.iqm)):
                    flat_BN = one.drawn_BATR[:, i].reshape(len(one.drawn_BATR), -1)
                    low, high = np.quantile(reduce(flat_BN, axis=1), [0.025, 0.975])
                    row |= {name: float(reduce(one.x_ATR[i].ravel())), f"{name}_low": low, f"{name}_high": high}
                chance_B = improvement(one.drawn_BATR[:, i], one.drawn_BATR[:, 0])
                row |= {"reference": one.arms[0], "improvement": float(improvement(one.x_ATR[i], one.x_ATR[0]))}
                low, high = np.quantile(chance_B, [0.025, 0.975])
                rows.append(row | {"improvement_low": low, "improvement_high": high})
    return pd.DataFrame(rows, columns=COLUMNS)


def improvement(a: Array, b: Array) -> Array:
    """Chance that a run of a beats one of b on a task drawn at random, ties counting half (Agarwal et al., eq. 1).
    Shapes (..., T, R) to (...)."""
    wins = (a[..., :, None] > b[..., None, :]) + 0.5 * (a[..., :, None] == b[..., None, :])
    chance: Array = wins.mean(axis=(-3, -2, -1))
    return chance


def profile(one: Normalised, levels: Array = LEVELS) -> pd.DataFrame:
    """Performance profiles: the share of runs, over tasks and seeds, that reach each normalised score, with 95%
    pointwise intervals. Columns: arm, level, share, low, high."""
    rows = []
    for i, label in enumerate(one.arms):
        share_L = (one.x_ATR[i].ravel()[:, None] >= levels).mean(axis=0)
        flat_BN = one.drawn_BATR[:, i].reshape(len(one.drawn_BATR), -1)
        drawn_BL = np.stack([(flat_BN >= level).mean(axis=1) for level in levels], axis=1)
        low_L, high_L = np.quantile(drawn_BL, [0.025, 0.975], axis=0)
        part = {"arm": label, "level": levels, "share": share_L, "low": low_L, "high": high_L}
        rows.append(pd.DataFrame(part))
    return pd.concat(rows, ignore_index=True)


def _scale(setting: Setting, metric: str) -> float:
    """Mean gain over the base model of the arms of a setting, in the metric's units; positive is better."""
    gains = [_gain(setting, arm, metric) for arm in setting.arms if metric in arm.scores]
    return float(np.mean(gains)) if gains else 0.0


def _gain(setting: Setting, arm: Arm, metric: str) -> float:
    assert setting.base is not None
    return _sign(metric) * (_level(arm.scores[metric]) - _level(setting.base.scores[metric]))


def _level(scores: Scores) -> float:
    return float((scores.x_RE @ scores.w_E / scores.w_E.sum()).mean())


def _sign(metric: str) -> float:
    return 1.0 if higher_is_better(metric) else -1.0


def _drawn(
    setting: Setting,
    scores: Sequence[Scores],
    metric: str,
    seeds: Sequence[object],
    count: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Normalised scores of a task, measured (A, R) and drawn (B, A, R): groups and seeds resampled, the same for all
    arms, the base model's score and the scale as measured."""  # fmt: skip
    assert setting.base is not None
    base, scale, sign = _level(setting.base.scores[metric]), _scale(setting, metric), _sign(metric)
    rows = [[one.seeds.index(seed) for seed in seeds] for one in scores]
    x_AR = np.array([(one.x_RE[picks] @ one.w_E) / one.w_E.sum() for one, picks in zip(scores, rows, strict=True)])
    R = len(seeds)
    drawn_BAR = np.repeat(x_AR[None], count, axis=0)
    if len({one.ids for one in scores}) == 1 and scores[0].ids:
        first = scores[0]
        _, member_E = np.unique(np.array(first.groups or first.ids), return_inverse=True)
        G = int(member_E.max()) + 1
        counts_BG = rng.multinomial(G, np.full(G, 1 / G), size=count).astype(float)
        weight_G = np.bincount(member_E, weights=first.w_E, minlength=G)
        onto_EG = np.zeros((len(member_E), G))
        onto_EG[np.arange(len(member_E)), member_E] = first.w_E
        sums_ARG = np.stack([one.x_RE[picks] @ onto_EG for one, picks in zip(scores, rows, strict=True)])
        drawn_BAR = np.einsum("bg,arg->bar", counts_BG, sums_ARG) / (counts_BG @ weight_G)[:, None, None]
    if R > 1:
        picks_BR = rng.integers(0, R, (count, R))
        mean_BA1 = drawn_BAR.mean(axis=2, keepdims=True)
        spread_BAR = np.take_along_axis(
            drawn_BAR - mean_BA1, np.broadcast_to(picks_BR[:, None], drawn_BAR.shape), axis=2
        )
        drawn_BAR = mean_BA1 + spread_BAR * (R / (R - 1)) ** 0.5
    return sign * (x_AR - base) / scale, sign * (drawn_BAR - base) / scale
