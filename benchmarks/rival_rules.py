"""Intervals of an arm's mean, and rules for arms whose seeds spread wider, that could stand in place of the analysis'
own, for `benchmarks.simulation_rivals`."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from scipy import special

from analysis import seeds, stats
from analysis.arms import Arrangement
from analysis.stats import Array
from benchmarks.rivals import B, upper, wild_quantiles

Rule = Callable[..., list[seeds.SeedVariance] | None]


def arm_half_widths(found: Arrangement, arm: int, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """How far each interval reaches below and above the arm's mean. The groups' part is the t interval's but for the
    wild bootstrap; the seeds' part is what differs otherwise."""
    scores = [one.scores["score"] for one in found.arms]
    one = scores[arm]
    own = stats.interval(one.x_RE, one.w_E, groups=one.groups, seed_variance=one.seed_variance)
    (of_seeds, df), (of_groups, df_groups) = own.terms
    t_groups = float(special.stdtrit(df_groups, 0.975))
    rows_AR = np.stack([s.x_RE @ s.w_E / s.w_E.sum() for s in scores])
    R = rows_AR.shape[1]
    found_: dict[str, tuple[float, float]] = {"ours": (own.estimate - own.low, own.high - own.estimate)}

    def both(name: str, low: float, high: float) -> None:
        """Joins the seeds' reach with the groups'."""
        rest = t_groups**2 * of_groups
        found_[name] = ((low**2 + rest) ** 0.5, (high**2 + rest) ** 0.5)

    rows_R = rows_AR[arm]
    mean, se = float(rows_R.mean()), float(np.std(rows_R, ddof=1)) / R**0.5
    drawn_BR = rows_R[rng.integers(0, R, (B, R))]
    se_B = drawn_BR.std(axis=1, ddof=1) / R**0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        t_B = (drawn_BR.mean(axis=1) - mean) / se_B
    low, high = np.quantile(np.nan_to_num(t_B, nan=0.0, posinf=1e9, neginf=-1e9), [0.025, 0.975])
    both("bootstrap-t", se * max(high, 0.0), se * max(-low, 0.0))
    rest_AR = (rows_AR - rows_AR.mean(axis=1, keepdims=True)) * (R / (R - 1)) ** 0.5
    pool_BAR = rng.choice(rest_AR.ravel(), (B, *rest_AR.shape))
    spread_B = np.sqrt(pool_BAR.var(axis=2, ddof=1).mean(axis=1) / R)
    low, high = np.quantile(pool_BAR[:, 0].mean(axis=1) / np.maximum(spread_B, 1e-300), [0.025, 0.975])
    pooled = float(np.sqrt(rows_AR.var(axis=1, ddof=1).mean() / R))
    both("bootstrap-t, pooled", pooled * max(high, 0.0), pooled * max(-low, 0.0))
    low, high = bca(rows_R, drawn_BR.mean(axis=1))
    both("BCa", max(mean - low, 0.0), max(high - mean, 0.0))
    u_RG, q_G = stats._influence(one.x_RE, one.w_E, one.groups)
    t_wild = upper(wild_quantiles(u_RG.mean(axis=0), q_G, rng), 0.05)
    half = float((special.stdtrit(df, 0.975) ** 2 * of_seeds + t_wild**2 * of_groups) ** 0.5)
    found_["wild (groups)"] = (half, half)
    return found_


def bca(rows_R: Array, mean_B: Array) -> tuple[float, float]:
    """Bias-corrected accelerated percentiles of the mean (Efron 1987)."""
    R, center = len(rows_R), rows_R.mean()
    below = np.clip(((mean_B < center).mean() + (mean_B <= center).mean()) / 2, 1 / B, 1 - 1 / B)
    jackknife = (rows_R.sum() - rows_R) / (R - 1)
    away = jackknife.mean() - jackknife
    a = float((away**3).sum() / (6 * max((away**2).sum() ** 1.5, 1e-300)))
    z0 = special.ndtri(below)
    z = z0 + special.ndtri([0.025, 0.975])
    low, high = np.quantile(mean_B, special.ndtr(z0 + z / (1 - a * z)))
    return float(low), float(high)


def own_always(rows_AR: Array, *, blocks: bool) -> list[seeds.SeedVariance] | None:
    return None


def never_below(rows_AR: Array, *, blocks: bool) -> list[seeds.SeedVariance] | None:
    found = seeds.pooled(rows_AR, blocks=blocks)
    return None if found is None else [replace(one, unequal=True) for one in found]


def levene(rows_AR: Array, *, blocks: bool) -> list[seeds.SeedVariance] | None:
    """Brown & Forsythe's test of equal spread, at 5%, in place of the two tests and of the rule for wide arms."""
    with settings(WIDE=1e-12, UNEQUAL=0.0):
        found = seeds.pooled(rows_AR, blocks=blocks)
    if found is None:
        return None
    e_AR = np.abs(rows_AR - np.median(rows_AR, axis=1, keepdims=True))
    A, R = e_AR.shape
    between = R * float(np.var(e_AR.mean(axis=1), ddof=1))
    within = float(e_AR.var(axis=1, ddof=1).mean())
    differ = bool(special.fdtrc(A - 1, A * (R - 1), between / max(within, 1e-300)) < 0.05)
    return [replace(one, unequal=differ) for one in found]


@contextlib.contextmanager
def settings(**values: float) -> Iterator[None]:
    """`seeds` with other constants."""
    former = {name: getattr(seeds, name) for name in values}
    for name, value in values.items():
        setattr(seeds, name, value)
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(seeds, name, value)


def with_settings(**values: float) -> Rule:
    def rule(rows_AR: Array, *, blocks: bool) -> list[seeds.SeedVariance] | None:
        with settings(**values):
            return seeds.pooled(rows_AR, blocks=blocks)

    return rule


GUARDS: dict[str, Rule] = {
    "ours: share of a wide arm's own, 30%": seeds.pooled,
    "the same, 20%": with_settings(WIDE=0.2),
    "the same, 40%": with_settings(WIDE=0.4),
    "test of equal variances alone, 5%": with_settings(WIDE=1e-12),
    "that test at 20%": with_settings(WIDE=1e-12, UNEQUAL=0.2),
    "that test at 50%": with_settings(WIDE=1e-12, UNEQUAL=0.5),
    "Levene's test, 5%": levene,
    "never below an arm's own": never_below,
    "never pooled": own_always,
}


def ruled(found: Arrangement, rule: Rule) -> Arrangement:
    scores = [arm.scores["score"] for arm in found.arms]
    rows_AR = np.stack([one.x_RE @ one.w_E / one.w_E.sum() for one in scores])
    own, contrast = rule(rows_AR, blocks=False), rule(rows_AR, blocks=True)
    for i, one in enumerate(scores):
        one.seed_variance = None if own is None else own[i]
        one.contrast_variance = None if contrast is None else contrast[i]
    return found
