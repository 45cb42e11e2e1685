"""Estimates, intervals and tests. Letters: R replicates (seeds), E evaluation examples, B bootstrap draws, A arms.

A score of an arm is a matrix x_RE with example weights w_E (response tokens for NLL, 1 for a task metric). Seeds and
examples are two crossed random samples; both are resampled, because both would differ if the study were repeated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95% interval, standard error and degrees of freedom."""

    estimate: float
    low: float
    high: float
    se: float
    df: float
    seeds: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Difference b − a of two arms over shared seeds and examples.

    `effect` is Cohen's d of the paired differences (mean over standard deviation, over examples, seeds averaged);
    `share` is the share of (seed, example) pairs in which b is lower than a, ties counting half.
    """

    difference: Interval
    p: float
    p_permutation: float
    effect: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components of a crossed design: between seeds, between examples, and what is left of one cell."""

    seeds: float
    examples: float
    cell: float


class Draws:
    """Seeded resampling counts, made once per sample size, so that all arms meet the same resampled examples."""

    def __init__(self, draws: int = 2000, seed: int = 0) -> None:
        self.draws, self.seed = draws, seed
        self.counts = lru_cache(maxsize=32)(self._counts)

    def _counts(self, size: int, stream: int = 0) -> Array:
        """Counts of a bootstrap: (B, size), rows sum to size. `stream` tells independent uses of one size apart."""
        rng = np.random.default_rng([self.seed, size, stream])
        picks_BE = rng.integers(0, size, (self.draws, size)) + size * np.arange(self.draws)[:, None]
        return np.bincount(picks_BE.ravel(), minlength=self.draws * size).reshape(self.draws, size).astype(float)


def iqm(values: Array, axis: int = -1) -> Any:
    """Interquartile mean: the mean without the lowest and the highest quarter (Agarwal et al. 2021, section 4.3)."""
    ordered = np.moveaxis(np.sort(values, axis=axis), axis, -1)
    cut = int(0.25 * ordered.shape[-1])
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "iqm": iqm}


def interval(
    x_RE: Array, w_E: Array | None = None, *, draws: Draws, statistic: str = "mean", level: float = 0.95
) -> Interval:
    """Two-way bootstrap interval of the statistic over replicates of the weighted mean over examples.

    Seeds and examples are resampled (2 x B draws); each variance is scaled by n/(n-1), the part of single cells is
    counted once (Owen 2007, "The pigeonhole bootstrap": resampling both at once counts it three times), and the
    interval is estimate ± t·SE with Satterthwaite's degrees of freedom, because percentiles of 3 to 5 seeds are far
    too narrow (Hesterberg 2015, section 5.1). With one seed it covers examples only; with one example column (scores
    without predictions) seeds only; with both it is unknown (NaN).
    """
    x_RE = np.atleast_2d(np.asarray(x_RE, dtype=float))
    R, E = x_RE.shape
    w_E = np.ones(E) if w_E is None else np.asarray(w_E, dtype=float)
    reduce = STATISTICS[statistic]
    rows_R = x_RE @ w_E / w_E.sum()
    estimate = float(reduce(rows_R))
    var_seeds = var_examples = 0.0
    if R > 1:
        if statistic == "mean":
            drawn_B = draws.counts(R, 1) @ rows_R / R
        else:
            picks_BR = np.random.default_rng([draws.seed, R]).integers(0, R, (draws.draws, R))
            drawn_B = reduce(rows_R[picks_BR], axis=1)
        var_seeds = float(np.var(drawn_B)) * R / (R - 1)
    if E > 1:
        counts_BE = draws.counts(E)
        columns_ER = (x_RE.mean(axis=0, keepdims=True) if statistic == "mean" else x_RE).T
        drawn_BR = counts_BE @ (w_E[:, None] * columns_ER) / (counts_BE @ w_E)[:, None]
        var_examples = float(np.var(reduce(drawn_BR, axis=1))) * E / (E - 1)
    var_cell = components(x_RE, w_E).cell / (R * E) if R > 1 and E > 1 else 0.0
    variance = max(var_seeds + var_examples - var_cell, var_seeds, var_examples)
    return _t_interval(estimate, variance, var_seeds, var_examples, R, E, level)


def _t_interval(
    estimate: float, variance: float, var_seeds: float, var_examples: float, R: int, E: int, level: float
) -> Interval:
    if R < 2 and E < 2:
        return Interval(estimate=estimate, low=np.nan, high=np.nan, se=np.nan, df=np.nan, seeds=R, examples=E)
    below = (var_seeds**2 / (R - 1) if R > 1 else 0.0) + (var_examples**2 / (E - 1) if E > 1 else 0.0)
    df = max(variance**2 / below, 1.0) if below > 0 else float(max(R, E) - 1)
    half = float(special.stdtrit(df, 0.5 + level / 2)) * variance**0.5
    return Interval(
        estimate=estimate, low=estimate - half, high=estimate + half, se=variance**0.5, df=df, seeds=R, examples=E
    )


def combine(intervals: Sequence[Interval], level: float = 0.95) -> Interval:
    """Mean over strata (tasks) of equal weight: resampled within each, so variances add (Satterthwaite again)."""
    n = len(intervals)
    variances = np.array([one.se**2 for one in intervals]) / n**2
    variance = float(variances.sum())
    below = float(sum(v**2 / one.df for v, one in zip(variances, intervals, strict=True)))
    df = variance**2 / below if below > 0 else max(one.df for one in intervals)
    estimate = float(np.mean([one.estimate for one in intervals]))
    half = float(special.stdtrit(df, 0.5 + level / 2)) * variance**0.5
    seeds, examples = min(one.seeds for one in intervals), sum(one.examples for one in intervals)
    return Interval(
        estimate=estimate, low=estimate - half, high=estimate + half, se=variance**0.5, df=df,
        seeds=seeds, examples=examples,
    )  # fmt: skip


def components(x_RE: Array, w_E: Array | None = None) -> Components:
    """Variance components by two-way analysis of variance without replication (Searle et al. 1992, section 4.5).

    Of the weighted mean: each cell enters as its influence, w·(x - mean)/mean(w). Negative components are 0.
    """
    R, E = x_RE.shape
    w_E = np.ones(E) if w_E is None else w_E
    center = float((x_RE @ w_E / w_E.sum()).mean())
    u_RE = w_E * (x_RE - center) / w_E.mean()
    seed_means, example_means = u_RE.mean(axis=1), u_RE.mean(axis=0)
    ms_seeds = E * float(np.var(seed_means, ddof=1)) if R > 1 else 0.0
    ms_examples = R * float(np.var(example_means, ddof=1)) if E > 1 else 0.0
    if R < 2 or E < 2:
        return Components(seeds=ms_seeds / E, examples=ms_examples / R, cell=0.0)
    rest = u_RE - seed_means[:, None] - example_means[None, :] + u_RE.mean()
    cell = float((rest**2).sum()) / ((R - 1) * (E - 1))
    return Components(seeds=max((ms_seeds - cell) / E, 0.0), examples=max((ms_examples - cell) / R, 0.0), cell=cell)


def paired(a_RE: Array, b_RE: Array, w_E: Array | None = None, *, draws: Draws) -> Paired:
    """Test of b − a on shared seeds (rows) and examples (columns): the bootstrap interval of the mean difference,
    inverted, so that p < 0.05 exactly where the 95% interval leaves out 0.

    Raises:
        ValueError: the matrices do not have the same shape.
    """
    if a_RE.shape != b_RE.shape:
        raise ValueError(f"paired scores need one shape, got {a_RE.shape} and {b_RE.shape}")
    d_RE = np.asarray(b_RE, dtype=float) - np.asarray(a_RE, dtype=float)
    found = interval(d_RE, w_E, draws=draws)
    d_E = d_RE.mean(axis=0) if d_RE.shape[1] > 1 else d_RE[:, 0]
    spread = float(np.std(d_E, ddof=1)) if len(d_E) > 1 else np.nan
    effect = float(d_E.mean()) / spread if spread > 0 else np.nan
    share = float((d_RE < 0).mean() + 0.5 * (d_RE == 0).mean())
    weighted = d_E if w_E is None or len(w_E) != len(d_E) else d_E * w_E / w_E.mean()
    return Paired(
        difference=found, p=p_value(found), p_permutation=sign_flip(weighted, draws=draws), effect=effect, share=share
    )


def p_value(found: Interval, null: float = 0.0) -> float:
    """Two-sided p of estimate = null under the t distribution of the interval."""
    if not found.se > 0:
        return 1.0 if found.estimate == null else (np.nan if np.isnan(found.se) else 0.0)
    return float(2 * special.stdtr(found.df, -abs(found.estimate - null) / found.se))


def sign_flip(d_E: Array, *, draws: Draws) -> float:
    """Paired permutation test that the differences are symmetric about 0: exact up to 12 of them, else B random
    flips with the estimate (k+1)/(B+1) (Phipson & Smyth 2010). With seeds averaged it holds for these seeds only.
    """
    n = len(d_E)
    if n < 2:
        return np.nan
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = _signs(n, draws.draws, draws.seed)
    reached = np.abs(signs @ d_E) >= abs(d_E.sum()) * (1 - 1e-12)
    return float(reached.mean() if n <= 12 else (reached.sum() + 1) / (len(signs) + 1))


@lru_cache(maxsize=8)
def _signs(n: int, draws: int, seed: int) -> Array:
    signs: Array = np.random.default_rng([seed, n, 2]).integers(0, 2, (draws, n)).astype(np.float64) * 2 - 1
    return signs


def holm(p_values: Sequence[float]) -> Array:
    """Step-down adjusted p-values (Holm 1979): the k-th smallest of m times m - k + 1, made monotone, at most 1.
    NaN stays NaN and does not count in m."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    steps = p[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted


def joint_draws(scores: Sequence[tuple[Array, Array]], *, draws: Draws) -> Array:
    """(B, A) means of arms under one resampling of seeds and examples for all: for questions about several arms.

    Deviations are widened by sqrt(R/(R-1)), the bootstrap's narrowness with few seeds.
    """
    columns = []
    for x_RE, w_E in scores:
        R, E = x_RE.shape
        counts_BE = draws.counts(E) if E > 1 else np.ones((draws.draws, 1))
        rows_BR = counts_BE @ (w_E[:, None] * x_RE.T) / (counts_BE @ w_E)[:, None]
        drawn_B = (rows_BR * draws.counts(R, 1)).sum(axis=1) / R if R > 1 else rows_BR[:, 0]
        center = float((x_RE @ w_E / w_E.sum()).mean())
        columns.append(center + (drawn_B - center) * (R / (R - 1) if R > 1 else 1.0) ** 0.5)
    return np.stack(columns, axis=1)
