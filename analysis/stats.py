"""Estimates, intervals and tests. Letters: R replicates (seeds), E evaluation examples, B bootstrap draws, A arms.

A score of an arm is a matrix x_RE with example weights w_E (response tokens for NLL, 1 for a task metric). Seeds and
examples are two crossed random samples; both are resampled, because both would differ if the study were repeated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its interval. `terms` are its variances by source, each with its degrees of freedom."""

    estimate: float
    low: float
    high: float
    terms: tuple[tuple[float, float], ...]
    seeds: int
    examples: int

    @property
    def se(self) -> float:
        """Standard error; NaN where nothing was resampled."""
        return sum(variance for variance, _ in self.terms) ** 0.5 if self.terms else np.nan


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Difference b − a of two arms over shared seeds and examples.

    `effect` is Cohen's d of the paired differences (mean over standard deviation, over examples, seeds averaged);
    `share` is the share of (seed, example) pairs in which b is lower than a, ties counting half. Without per-example
    scores `effect` and `p_permutation`, which are over examples, are NaN.
    """

    difference: Interval
    p: float
    p_permutation: float
    effect: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components of a crossed design: between seeds, between examples, and residual within a cell."""

    seeds: float
    examples: float
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
    draws: Draws,
    statistic: str = "mean",
    level: float = 0.95,
    strict: bool = False,
) -> Interval:
    """Two-way bootstrap interval of the statistic over replicates of the weighted mean over examples.

    Seeds and examples are resampled apart (2 x B draws); each variance is scaled by n/(n-1), and the part of single
    cells, which is in both, is counted once (Owen 2007, "The pigeonhole bootstrap": resampling both at once counts it
    three times). The half width is sqrt(t² of the seeds · their variance + t² of the examples · theirs), after Howe
    (1974): percentiles of 3 to 5 seeds are far too narrow (Hesterberg 2015, section 5.1), and Satterthwaite's degrees
    of freedom, estimated from 3 seeds, gave 16% false positives in our simulation. The part of cells counts as the
    examples' (coverage is right), or, for tests, as the seeds' (`strict`: wider, but sure to keep its level at small
    alpha too). With one seed the interval covers examples only; with one example column (scores without predictions)
    seeds only; with one of each it is NaN.
    """
    x_RE = np.atleast_2d(np.asarray(x_RE, dtype=float))
    R, E = x_RE.shape
    w_E = np.ones(E) if w_E is None else np.asarray(w_E, dtype=float)
    reduce = STATISTICS[statistic]
    rows_R = x_RE @ w_E / w_E.sum()
    estimate = float(reduce(rows_R))
    var_seeds = var_examples = 0.0
    if R > 1:
        if statistic == "mean":  # what infinitely many draws would give
            var_seeds = float(np.var(rows_R)) / (R - 1)
        else:
            picks_BR = np.random.default_rng([draws.seed, R]).integers(0, R, (draws.draws, R))
            var_seeds = float(np.var(reduce(rows_R[picks_BR], axis=1))) * R / (R - 1)
    if E > 1:
        counts_BE = draws.counts(E)
        columns_ER = (x_RE.mean(axis=0, keepdims=True) if statistic == "mean" else x_RE).T
        drawn_BR = counts_BE @ (w_E[:, None] * columns_ER) / (counts_BE @ w_E)[:, None]
        var_examples = float(np.var(reduce(drawn_BR, axis=1))) * E / (E - 1)
    var_cell = components(x_RE, w_E).cell / (R * E) if R > 1 and E > 1 else 0.0
    if strict:
        var_examples = max(var_examples - var_cell, 0.0)
    else:
        var_seeds = max(var_seeds - var_cell, 0.0)
    terms = [(var_seeds, R - 1.0)] if R > 1 else []
    terms += [(var_examples, E - 1.0)] if E > 1 else []
    return _with_bounds(estimate, tuple(terms), R, E, level)


def _with_bounds(
    estimate: float, terms: tuple[tuple[float, float], ...], seeds: int, examples: int, level: float
) -> Interval:
    half = half_width(terms, 1 - level)
    return Interval(
        estimate=estimate, low=estimate - half, high=estimate + half, terms=terms, seeds=seeds, examples=examples
    )


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
    return _with_bounds(estimate, terms, seeds, examples, level)


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
    found = interval(d_RE, w_E, draws=draws, strict=True)
    d_E = d_RE.mean(axis=0)
    spread = float(np.std(d_E, ddof=1)) if len(d_E) > 1 else np.nan
    effect = float(d_E.mean()) / spread if spread > 0 else np.nan
    share = float((d_RE < 0).mean() + 0.5 * (d_RE == 0).mean())
    weighted = d_E if w_E is None else d_E * w_E / w_E.mean()
    return Paired(
        difference=found, p=p_value(found), p_permutation=sign_flip(weighted, draws=draws), effect=effect, share=share
    )


def p_value(found: Interval, null: float = 0.0) -> float:
    """Two-sided p of estimate = null: the alpha at which the interval just reaches it, at least 1e-100."""
    distance = abs(found.estimate - null)
    if not found.se > 0:
        return np.nan if np.isnan(found.se) else (1.0 if distance == 0 else 0.0)

    def beyond(log_alpha: float) -> float:
        return half_width(found.terms, math.exp(log_alpha)) - distance

    least = math.log(1e-100)
    return math.exp(scipy.optimize.brentq(beyond, least, 0.0) if beyond(least) > 0 else least)


def moderated(intervals: Sequence[Interval], *, level: float = 0.95) -> list[Interval]:
    """Intervals of one family of comparisons, each seed variance informed by the family's (empirical Bayes).

    A variance of 3 seeds has 2 degrees of freedom and t = 4.3; a family of comparisons knows more. Smyth (2004, section
    6.2): the variances are scaled inverse chi-squared around a prior whose weight d0, in degrees of freedom, is
    estimated from how much they differ beyond chance; the posterior is (d0·prior + d·own)/(d0 + d) with d0 + d degrees.
    Two precautions, because comparisons share arms and arms may differ in their variance: the prior never weighs more
    than an arm's own seeds in the degrees, and a variance is only ever raised. Fewer than 3 variances stay as they are.
    """
    found = list(intervals)
    usable = [i for i, one in enumerate(found) if one.seeds > 1 and one.terms and one.terms[0][0] > 0]
    for R in {found[i].seeds for i in usable}:
        group = [i for i in usable if found[i].seeds == R]
        if len(group) < 3:
            continue
        d = R - 1.0
        own = np.array([found[i].terms[0][0] for i in group])
        weight, prior = _prior(own, d)
        for i, variance in zip(group, own, strict=True):
            posterior = prior if np.isinf(weight) else (weight * prior + d * variance) / (weight + d)
            terms = ((max(float(posterior), float(variance)), min(weight, d) + d), *found[i].terms[1:])
            found[i] = _with_bounds(found[i].estimate, terms, R, found[i].examples, level)
    return found


def _prior(variances: Array, d: float) -> tuple[float, float]:
    """Degrees of freedom and scale of the prior, from the mean and variance of the logarithms (Smyth 2004)."""
    e = np.log(variances) - special.digamma(d / 2) + np.log(d / 2)
    spread = float(np.var(e, ddof=1)) - float(special.polygamma(1, d / 2))
    if spread <= 0:
        return np.inf, float(variances.mean())
    # trigamma falls from about 1e6 to 1e-6 between these bounds
    half = scipy.optimize.brentq(lambda x: special.polygamma(1, np.exp(x)) - spread, np.log(1e-3), np.log(1e6))
    weight = 2 * float(np.exp(half))
    return weight, float(np.exp(e.mean() + special.digamma(weight / 2) - np.log(weight / 2)))


def sign_flip(d_E: Array, *, draws: Draws) -> float:
    """Paired permutation test that the differences are symmetric about 0: exact for up to 12, else B random sign flips
    with p = (k+1)/(B+1) (Phipson & Smyth 2010). Seeds are averaged first, so it generalises over examples only.
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
    """(B, A) bootstrap means of arms that share the resampled seeds and examples, for statistics of several arms.

    Deviations are scaled by sqrt(R/(R-1)) to correct the bootstrap's downward bias with few seeds.
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
