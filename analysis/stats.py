"""Estimates, intervals and tests. Letters: R replicates (seeds), E evaluation examples, G groups of examples that are
not independent of each other, B bootstrap draws, A arms.

A score of an arm is a matrix x_RE with example weights w_E (response tokens for NLL, 1 for a task metric). Seeds and
groups are two crossed random samples, because both would differ if the study were repeated. docs/statistics.md has the
formulas and the simulations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import special

from .seeds import SeedVariance

Array = NDArray[np.float64]
FEW_GROUPS = 3
"""Groups that hold a rare score, below which their own variance says too little."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its interval. `terms` are its variances by source, each with its degrees of freedom."""

    estimate: float
    low: float
    high: float
    terms: tuple[tuple[float, float], ...]
    seeds: int
    examples: int
    groups: int

    @property
    def se(self) -> float:
        """Standard error; NaN where nothing was resampled."""
        return sum(variance for variance, _ in self.terms) ** 0.5 if self.terms else np.nan


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Difference b − a of two arms over shared seeds and examples.

    `effect` is Cohen's d of the paired differences (mean over standard deviation, over examples with their weights,
    seeds averaged; NaN without per-example scores); `share` is the share of (seed, example) pairs in which b is lower
    than a, ties counting half.
    """

    difference: Interval
    p: float
    effect: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components of a crossed design: between seeds, between groups of examples, and residual of a cell.

    The variance of a mean is seeds/R + groups/G + cell/(R·G).
    """

    seeds: float
    groups: float
    cell: float


class Draws:
    """Seeded resampling counts, drawn once per sample size, so that all arms share the same resampled examples."""

    def __init__(self, draws: int = 2000, seed: int = 0) -> None:
        self.draws, self.seed = draws, seed
        self.counts = lru_cache(maxsize=32)(self._counts)

    def _counts(self, size: int, stream: int = 0) -> Array:
        """Counts of a bootstrap: (B, size), rows sum to size. `stream` separates independent uses of the same size."""
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
    x_RE: Array,
    w_E: Array | None = None,
    *,
    draws: Draws | None = None,
    statistic: str = "mean",
    level: float = 0.95,
    strict: bool = False,
    groups: Sequence[str] = (),
    seed_variance: SeedVariance | None = None,
) -> Interval:
    """Two-way interval of the statistic over replicates of the weighted mean over examples.

    Seeds and groups each give a variance; the part of single cells, which is in both, is counted once (Owen 2007, "The
    pigeonhole bootstrap"). The half width is sqrt(t² of the seeds · their variance + t² of the groups · theirs), after
    Howe (1974): percentiles of 3 to 5 seeds are far too narrow (Hesterberg 2015, section 5.1). The part of cells counts
    as the groups' (coverage is right), or, for tests, as the seeds' (`strict`: wider, but sure to keep its level at
    small alpha too). Groups of unequal weight have a variance corrected as by CR2 (Bell & McCaffrey 2002) and G* − 1
    degrees of freedom, G* = (sum of weights)² / sum of squares (Carter et al. 2017). Scores that are all 0 or 1 have a
    Clopper-Pearson interval of the effective sample size. With one seed the interval covers examples only; with one
    example column (scores without predictions) seeds only; with one of each it is NaN.

    Args:
        groups: the group of each column; empty where every example is its own.
        seed_variance: of the arm's family (`seeds.pooled`), for the mean.
    """
    x_RE = np.atleast_2d(np.asarray(x_RE, dtype=float))
    R, E = x_RE.shape
    w_E = np.ones(E) if w_E is None else np.asarray(w_E, dtype=float)
    reduce = STATISTICS[statistic]
    rows_R = x_RE @ w_E / w_E.sum()
    estimate = float(reduce(rows_R))
    u_RG, weight_G = _influence(x_RE, w_E, groups)
    G = len(weight_G)
    # a mean over groups that weigh q each leaves (1 - 2q + sum q²) of a group's variance in its residual
    kish = 1 / float((weight_G**2).sum())
    df_groups = max(kish - 1, 1.0)
    var_seeds = var_groups = 0.0
    if statistic == "mean":
        if R > 1:
            var_seeds = float(np.var(rows_R, ddof=1)) / R
        if G > 1:
            var_groups = float((u_RG.mean(axis=0) ** 2 / (1 - 2 * weight_G + 1 / kish)).sum())
    else:
        if draws is None:
            raise ValueError(f"statistic {statistic} needs draws")
        if R > 1:
            picks_BR = np.random.default_rng([draws.seed, R]).integers(0, R, (draws.draws, R))
            var_seeds = float(np.var(reduce(rows_R[picks_BR], axis=1))) * R / (R - 1)
        if G > 1:
            counts_BG = draws.counts(G)
            # a group's sum is its influence plus its weight times the mean of the row
            drawn_BR = rows_R + counts_BG @ u_RG.T / (counts_BG @ weight_G)[:, None]
            var_groups = float(np.var(reduce(drawn_BR, axis=1))) * G / (G - 1)
    var_cell = 0.0
    if R > 1 and G > 1:
        var_cell = min(float((_rest(u_RG) ** 2).sum()) * G / ((R - 1) * (G - 1) * R), var_seeds, var_groups)
    df_seeds = R - 1.0
    if seed_variance is not None and R > 1 and statistic == "mean":
        family = seed_variance.variance / R
        if not (seed_variance.unequal and var_seeds > family):  # else its own, with its own degrees of freedom
            var_seeds, df_seeds = family, seed_variance.df
    if strict:
        var_groups = max(var_groups - var_cell, 0.0)
    else:
        var_seeds = max(var_seeds - var_cell, 0.0)
    if strict and G > 1 and (steps := _steps(x_RE, u_RG)) > 0:
        var_groups += 2 * steps
    terms = [(var_seeds, df_seeds)] if R > 1 else []
    terms += [(var_groups, df_groups)] if G > 1 else []
    found = _with_bounds(estimate, tuple(terms), R, E, G, level)
    binary = not strict and statistic == "mean" and G > 1 and x_RE[0, 0] in (0.0, 1.0)
    binary = binary and bool(np.isin(x_RE, (0.0, 1.0)).all())
    if not binary:
        return found
    rare_E = (x_RE == (0.0 if estimate > 0.5 else 1.0)).any(axis=0)
    mixed = len(np.unique(np.asarray(groups)[rare_E])) if len(groups) else int(rare_E.sum())
    return _exact(found, mixed, level)


def _influence(x_RE: Array, w_E: Array, groups: Sequence[str]) -> tuple[Array, Array]:
    """u_RG, sums over each group of weight·(x − mean of the row), and the groups' weights; both of total weight 1."""
    q_E = w_E / w_E.sum()
    u_RE = q_E * (x_RE - (x_RE @ q_E)[:, None])
    if not len(groups):
        return u_RE, q_E
    member_EG = _members(tuple(groups))
    return (u_RE, q_E) if member_EG is None else (u_RE @ member_EG, q_E @ member_EG)


@lru_cache(maxsize=64)
def _members(groups: tuple[str, ...]) -> Array | None:
    """1 where an example (row) is of a group (column); None where each is its own. Arms share their groups."""
    names, code_E = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) == len(groups):
        return None
    member_EG = np.zeros((len(groups), len(names)))
    member_EG[np.arange(len(groups)), code_E] = 1.0
    return member_EG


def _rest(u_RG: Array) -> Array:
    rest: Array = u_RG - u_RG.mean(axis=0) - u_RG.mean(axis=1, keepdims=True) + u_RG.mean()
    return rest


def _steps(d_RE: Array, u_RG: Array) -> float:
    """Squared influence of one more group that differs, for differences of 0/1 scores; else 0.

    Counting one more in each direction keeps the variance of few discordant examples from being 0 and gives nearly the
    p of McNemar's exact test (Agresti & Min 2005, "Simple improved confidence intervals for comparing matched
    proportions")."""
    if d_RE[0, 0] not in (-1.0, 0.0, 1.0) or not np.isin(d_RE, (-1.0, 0.0, 1.0)).all():
        return 0.0
    E = d_RE.shape[1]
    changed: Array = u_RG.mean(axis=0) + float(d_RE.mean()) / u_RG.shape[1]
    discordant = np.abs(changed) > 1e-12
    seen = float((changed[discordant] ** 2).mean()) if discordant.any() else 0.0
    return float(max(seen, 1.0 / E**2))


def _with_bounds(
    estimate: float, terms: tuple[tuple[float, float], ...], seeds: int, examples: int, groups: int, level: float
) -> Interval:
    half = half_width(terms, 1 - level)
    return Interval(
        estimate=estimate, low=estimate - half, high=estimate + half, terms=terms, seeds=seeds, examples=examples,
        groups=groups,
    )  # fmt: skip


def _exact(found: Interval, mixed: int, level: float) -> Interval:
    """Clopper & Pearson's (1934) interval of 0/1 scores at the effective sample size p(1 − p)/variance, which is made
    smaller by the square of the normal quantile over that of the t interval (Korn & Graubard 1998, "Confidence
    intervals for proportions with small expected number of positive counts estimated from survey data").

    Where fewer than `FEW_GROUPS` groups (`mixed`) hold the rarer score, too little is known of the design effect: each
    group counts at most once."""
    p, variance = found.estimate, found.se**2
    if variance > 0 and 0 < p < 1:
        size, wider = p * (1 - p) / variance, (found.high - p) ** 2 / variance
    else:
        size, wider = float(found.groups), half_width([(1.0, found.terms[-1][1])], 1 - level) ** 2
    if mixed < FEW_GROUPS:
        size = min(size, found.groups)
    size *= special.ndtri((1 - level) / 2) ** 2 / wider
    size = min(max(size, 1.0), found.seeds * found.examples)
    hits, tail = p * size, (1 - level) / 2
    low = float(special.betaincinv(hits, size - hits + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, size - hits, 1 - tail)) if hits < size else 1.0
    return replace(found, low=min(low, p), high=max(high, p))


def half_width(terms: Sequence[tuple[float, float]], alpha: float) -> float:
    """Half the width of the interval at level 1 - alpha; NaN without terms."""
    if not terms:
        return np.nan
    squares = [special.stdtrit(df, alpha / 2) ** 2 * variance for variance, df in terms if variance > 0]
    return float(np.sqrt(sum(squares)))


def combine(intervals: Sequence[Interval], level: float = 0.95) -> Interval:
    """Mean over strata (tasks) of equal weight: each is resampled within itself, so the variances add."""
    n = len(intervals)
    terms = tuple((variance / n**2, df) for one in intervals for variance, df in one.terms)
    estimate = float(np.mean([one.estimate for one in intervals]))
    seeds, examples = min(one.seeds for one in intervals), sum(one.examples for one in intervals)
    return _with_bounds(estimate, terms, seeds, examples, sum(one.groups for one in intervals), level)


def components(x_RE: Array, w_E: Array | None = None, *, groups: Sequence[str] = ()) -> Components:
    """Variance components by two-way analysis of variance without replication (Searle et al. 1992, section 4.5).

    Of the weighted mean: each cell enters as its influence. Negative components are 0.
    """
    seeds, by_groups, cell = mean_squares(x_RE, w_E, groups=groups)
    return solve(seeds, by_groups, cell)


def mean_squares(x_RE: Array, w_E: Array | None = None, *, groups: Sequence[str] = ()) -> tuple[float, float, float]:
    """Variances that contain the cells': R·V(mean) of seeds, G·V(mean) of groups, and of cells (R·G·V(mean))."""
    R, E = x_RE.shape
    u_RG, _ = _influence(x_RE, np.ones(E) if w_E is None else w_E, groups)
    G = u_RG.shape[1]
    rows_R = x_RE.mean(axis=1) if w_E is None else x_RE @ w_E / w_E.sum()
    seeds = float(np.var(rows_R, ddof=1)) if R > 1 else 0.0
    by_groups = G**2 * float(np.var(u_RG.mean(axis=0), ddof=1)) if G > 1 else 0.0
    cell = G**2 * float((_rest(u_RG) ** 2).sum()) / ((R - 1) * (G - 1)) if R > 1 and G > 1 else 0.0
    return seeds - cell / G, by_groups - cell / R, cell


def solve(seeds: float, groups: float, cell: float) -> Components:
    """Components without negative ones."""
    return Components(seeds=max(seeds, 0.0), groups=max(groups, 0.0), cell=cell)


def paired(
    a_RE: Array,
    b_RE: Array,
    w_E: Array | None = None,
    *,
    groups: Sequence[str] = (),
    seed_variance: SeedVariance | None = None,
) -> Paired:
    """Test of b − a on shared seeds (rows) and examples (columns): the interval of the mean difference, inverted, so
    that p < 0.05 exactly where the 95% interval leaves out 0. p is NaN where no variance is known: it is never 0.

    Args:
        groups: the group of each column; empty where every example is its own.
        seed_variance: of the difference, from the family (`seeds.of_difference`).

    Raises:
        ValueError: the matrices do not have the same shape.
    """
    if a_RE.shape != b_RE.shape:
        raise ValueError(f"paired scores need one shape, got {a_RE.shape} and {b_RE.shape}")
    d_RE = np.asarray(b_RE, dtype=float) - np.asarray(a_RE, dtype=float)
    found = interval(d_RE, w_E, strict=True, groups=groups, seed_variance=seed_variance)
    d_E, w_E = d_RE.mean(axis=0), np.ones(d_RE.shape[1]) if w_E is None else w_E
    mean, E = found.estimate, len(d_E)
    spread = math.sqrt(float(w_E @ (d_E - mean) ** 2 / w_E.sum()) * E / (E - 1)) if E > 1 else np.nan
    share = float((d_RE < 0).mean() + 0.5 * (d_RE == 0).mean())
    p = p_value(found)
    if not found.se > 1e-12 * max(1.0, abs(mean)) and mean != 0:
        found = replace(found, low=np.nan, high=np.nan)
    return Paired(difference=found, p=p, effect=mean / spread if spread > 0 else np.nan, share=share)


def p_value(found: Interval, null: float = 0.0) -> float:
    """Two-sided p of estimate = null: the alpha at which the interval just reaches it, at least 1e-100. NaN where the
    variance is unknown or 0 and the estimate is not the null."""
    distance = abs(found.estimate - null)
    if not found.se > 1e-12 * max(1.0, abs(found.estimate)):
        return 1.0 if distance == 0 and not np.isnan(found.se) else np.nan
    positive = [(variance, df) for variance, df in found.terms if variance > 0]
    least = math.log(1e-100)
    if len(positive) == 1:
        variance, df = positive[0]
        return max(2 * float(special.stdtr(df, -distance / math.sqrt(variance))), 1e-100)

    def beyond(log_alpha: float) -> float:
        return half_width(positive, math.exp(log_alpha)) - distance

    return math.exp(scipy.optimize.brentq(beyond, least, 0.0) if beyond(least) > 0 else least)


def sign_flip(d_E: Array, *, draws: Draws) -> float:
    """Paired permutation test that the differences, of examples or of sums over their groups, are symmetric about 0:
    exact for up to 12, else B random sign flips with p = (k+1)/(B+1) (Phipson & Smyth 2010). Seeds are averaged first,
    so it generalises over examples only.
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


def joint_draws(
    scores: Sequence[tuple[Array, Array]], *, draws: Draws, groups: Sequence[Sequence[str]] | None = None
) -> Array:
    """(B, A) bootstrap means of arms that share the resampled seeds and groups of examples, for statistics of several
    arms. `groups` has the groups of each arm's columns, () where every example is its own.

    Deviations are scaled by sqrt(R/(R-1)) to correct the bootstrap's downward bias with few seeds.
    """
    columns = []
    for i, (x_RE, w_E) in enumerate(scores):
        R = len(x_RE)
        u_RG, weight_G = _influence(x_RE, w_E, groups[i] if groups else ())
        G = len(weight_G)
        rows_R = x_RE @ w_E / w_E.sum()
        counts_BG = draws.counts(G) if G > 1 else np.ones((draws.draws, 1))
        rows_BR = rows_R + counts_BG @ u_RG.T / (counts_BG @ weight_G)[:, None]
        drawn_B = (rows_BR * draws.counts(R, 1)).sum(axis=1) / R if R > 1 else rows_BR[:, 0]
        center = float(rows_R.mean())
        columns.append(center + (drawn_B - center) * (R / (R - 1) if R > 1 else 1.0) ** 0.5)
    return np.stack(columns, axis=1)
