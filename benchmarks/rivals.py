"""Tests of all pairs of arms that could stand in place of the analysis' own, for `benchmarks.simulation_rivals`.

Letters: A arms, R seeds, G groups, P pairs of arms, B draws. All bootstraps are seeded.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import special

from analysis import compare, stats
from analysis.arms import Arrangement
from analysis.stats import Array
from benchmarks import simulation
from benchmarks.simulation import Cell, arrangement, others, ours

B = 499
MOST_WILD = 6  # arms: with 66 pairs Holm asks for smaller p than so many draws have
WEBB = np.array([-(1.5**0.5), -1.0, -(0.5**0.5), 0.5**0.5, 1.0, 1.5**0.5])
"""Six-point weights for few clusters (Webb 2023, "Reworking wild bootstrap-based inference for clustered errors")."""
Adjusted = dict[tuple[int, int], float]


@dataclass(kw_only=True)
class Drawn:
    """One simulated study and what the rivals need of it: the groups' shares of the weight, and the weighted sums of
    scores over groups, of total weight 1."""

    cell: Cell
    x_ARE: Array
    w_E: Array
    q_G: Array
    sums_ARG: Array
    rng: np.random.Generator

    @classmethod
    def of(cls, cell: Cell, x_ARE: Array, w_E: Array, rng: np.random.Generator) -> "Drawn":
        q_E = w_E / w_E.sum()
        sums_ARG = (x_ARE * q_E).reshape(*x_ARE.shape[:2], -1, cell.each).sum(axis=3)
        q_G = q_E.reshape(-1, cell.each).sum(axis=1)
        return cls(cell=cell, x_ARE=x_ARE, w_E=w_E, q_G=q_G, sums_ARG=sums_ARG, rng=rng)

    @cached_property
    def found(self) -> Arrangement:
        return arrangement(self.cell, self.x_ARE, self.w_E)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.x_ARE)), 2))

    @cached_property
    def terms(self) -> list[stats.Interval]:
        """The analysis' own interval of each pair's difference."""
        return [simulation.compared(pair).difference for pair in compare.pairs(self.found)]


def holm(drawn: Drawn, ps: Sequence[float]) -> Adjusted:
    return dict(zip(drawn.pairs, stats.holm(ps).tolist(), strict=True))


def our_tests(drawn: Drawn) -> Adjusted:
    return ours(drawn.found)


def former(drawn: Drawn) -> Adjusted:
    """The engine before tests clustered by group: seeds and examples crossed, every example a unit of its own, each
    pair's own variance between seeds."""
    ps = []
    for a, b in drawn.pairs:
        d_RE = drawn.x_ARE[b] - drawn.x_ARE[a]
        R, E = d_RE.shape
        q_E = drawn.w_E / drawn.w_E.sum()
        u_RE = q_E * (d_RE - (d_RE @ q_E)[:, None])
        rest = u_RE - u_RE.mean(axis=0) - u_RE.mean(axis=1, keepdims=True) + u_RE.mean()
        of_cells = float((rest**2).sum()) * E / ((R - 1) * (E - 1) * R)
        of_examples = max(float((u_RE.mean(axis=0) ** 2).sum()) * E / (E - 1) - of_cells, 0.0)
        terms = ((float(np.var(d_RE @ q_E, ddof=1)) / R, R - 1.0), (of_examples, E - 1.0))
        one = stats.Interval(
            estimate=float((d_RE @ q_E).mean()), low=0, high=0, terms=terms, seeds=R, examples=E, groups=E
        )  # fmt: skip
        ps.append(stats.p_value(one))
    return holm(drawn, ps)


def wild_quantiles(e_G: Array, q_G: Array, rng: np.random.Generator) -> Array:
    """|t| of a mean over groups under wild bootstrap with Webb's weights, the null imposed: (B,), sorted."""
    v_BG = rng.choice(WEBB, (B, len(e_G)))
    e_BG = v_BG * e_G
    mean_B = e_BG.sum(axis=1)
    kish = float((q_G**2).sum())
    variance_B = ((e_BG - mean_B[:, None] * q_G) ** 2 / (1 - 2 * q_G + kish)).sum(axis=1)
    t_B: Array = np.sort(np.abs(mean_B) / np.sqrt(np.maximum(variance_B, 1e-300)))
    return t_B


def upper(sorted_B: Array, alpha: float) -> float:
    """Two-sided critical value; infinite where so few draws cannot tell."""
    place = int(np.ceil((1 - alpha) * (len(sorted_B) + 1))) - 1
    return float(sorted_B[place]) if place < len(sorted_B) else np.inf


def wild_groups(drawn: Drawn) -> Adjusted:
    """Ours, the t quantile of the groups replaced by that of a wild cluster bootstrap."""
    levels = 0.05 / np.arange(len(drawn.pairs), 0, -1)
    ps = []
    for (a, b), one in zip(drawn.pairs, drawn.terms, strict=True):
        e_G = (drawn.sums_ARG[b] - drawn.sums_ARG[a]).mean(axis=0)
        t_B = wild_quantiles(e_G, drawn.q_G, drawn.rng)
        (of_seeds, df), (of_groups, _) = one.terms
        halves = [
            (special.stdtrit(df, level / 2) ** 2 * of_seeds + upper(t_B, level) ** 2 * of_groups) ** 0.5
            for level in levels
        ]
        found = [level for level, half in zip(levels, halves, strict=True) if abs(one.estimate) > half]
        ps.append(found[0] * (1 - 1e-9) if found else 1.0)
    return holm(drawn, ps)


def wild_two_way(drawn: Drawn) -> Adjusted:
    """Wild bootstrap in both directions: weights of a seed times weights of a group, the null imposed, t with the
    pair's own variances."""
    ps = []
    for a, b in drawn.pairs:
        d_RG = drawn.sums_ARG[b] - drawn.sums_ARG[a]
        R, G = d_RG.shape
        seed_R, group_G = d_RG.sum(axis=1) - d_RG.sum(axis=1).mean(), d_RG.mean(axis=0)
        rest_RG = d_RG - group_G - seed_R[:, None] * drawn.q_G
        v_BR, v_BG = drawn.rng.choice(WEBB, (B, R, 1)), drawn.rng.choice(WEBB, (B, 1, G))
        drawn_BRG = v_BG * group_G + v_BR * seed_R[:, None] * drawn.q_G + v_BR * v_BG * rest_RG
        t_B = two_way_t(drawn_BRG, drawn.q_G)
        seen = float(two_way_t(d_RG[None], drawn.q_G)[0])
        ps.append((1 + int((t_B >= seen).sum())) / (B + 1))
    return holm(drawn, ps)


def two_way_t(d_BRG: Array, q_G: Array) -> Array:
    """|t| with variances of seeds and groups, the cells' counted once."""
    R, G = d_BRG.shape[1:]
    rows_BR = d_BRG.sum(axis=2)
    u_BRG = d_BRG - rows_BR[:, :, None] * q_G
    mean_BG = u_BRG.mean(axis=1)
    of_seeds = rows_BR.var(axis=1, ddof=1) / R
    of_groups = (mean_BG**2).sum(axis=1) * G / (G - 1)
    rest = u_BRG - mean_BG[:, None] - u_BRG.mean(axis=2, keepdims=True) + mean_BG.mean(axis=1)[:, None, None]
    of_cells = (rest**2).sum(axis=(1, 2)) * G / ((R - 1) * (G - 1) * R)
    variance = of_seeds + np.maximum(of_groups - of_cells, 0)
    t_B: Array = np.abs(rows_BR.mean(axis=1)) / np.sqrt(np.maximum(variance, 1e-300))
    return t_B


def max_t(drawn: Drawn) -> Adjusted:
    """Step-down max-T (Westfall & Young 1993) in place of Holm: groups by a wild bootstrap that all arms share, seeds
    by normal draws of each arm with one chi-squared of the pooled variance."""
    u_AG = (drawn.sums_ARG - drawn.sums_ARG.sum(axis=2, keepdims=True) * drawn.q_G).mean(axis=1)
    v_BG = drawn.rng.choice(WEBB, (B, len(drawn.q_G)))
    normal_BA = drawn.rng.normal(size=(B, len(u_AG)))
    T_BP, t_P = np.empty((B, len(drawn.pairs))), np.empty(len(drawn.pairs))
    chi_B = drawn.rng.random(B)
    kish = float((drawn.q_G**2).sum())
    for p, ((a, b), one) in enumerate(zip(drawn.pairs, drawn.terms, strict=True)):
        (of_seeds, df), (of_groups, _) = one.terms
        e_BG = v_BG * (u_AG[b] - u_AG[a])
        mean_B = e_BG.sum(axis=1)
        seen = float(((u_AG[b] - u_AG[a]) ** 2 / (1 - 2 * drawn.q_G + kish)).sum())
        kept = of_groups / seen if seen > 0 else 0.0  # without the cells' part, which counts as the seeds'
        variance_B = kept * ((e_BG - mean_B[:, None] * drawn.q_G) ** 2 / (1 - 2 * drawn.q_G + kish)).sum(axis=1)
        noise_B = (normal_BA[:, b] - normal_BA[:, a]) * (of_seeds / 2) ** 0.5
        share_B = 2 * special.gammaincinv(df / 2, chi_B) / df
        T_BP[:, p] = np.abs(mean_B * kept**0.5 + noise_B) / np.sqrt(of_seeds * share_B + variance_B)
        t_P[p] = abs(one.estimate) / one.se
    order = np.argsort(-t_P)
    largest_BP = np.maximum.accumulate(T_BP[:, order[::-1]], axis=1)[:, ::-1]
    ps = np.maximum.accumulate((1 + (largest_BP >= t_P[order]).sum(axis=0)) / (B + 1))
    return {drawn.pairs[place]: float(p) for place, p in zip(order, ps, strict=True)}


def mixed(drawn: Drawn, *, own: bool) -> Adjusted:
    """score ~ arm + (1|seed) + (1|group) on means of seed × group, Wald z of every pair with Holm. `own` adds what is
    missing from it in a design like ours: (1|arm:seed) + (1|arm:group)."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    A, R, G = drawn.sums_ARG.shape
    arm, seed, group = (index.ravel() for index in np.indices((A, R, G)))
    data = pd.DataFrame({"score": (drawn.sums_ARG / drawn.q_G).ravel(), "arm": arm, "seed": seed, "group": group})
    data["arm_seed"], data["arm_group"], data["whole"] = arm * R + seed, arm * G + group, 1
    names = ["seed", "group", *(["arm_seed", "arm_group"] if own else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance at its boundary, 0, is an answer here
        fitted = MixedLM.from_formula(
            "score ~ 0 + C(arm)",
            groups="whole",
            re_formula="0",
            vc_formula={n: f"0 + C({n})" for n in names},
            data=data,
        ).fit(method=["lbfgs"])
    mean_A, covariance = fitted.fe_params.to_numpy(), fitted.cov_params().to_numpy()[:A, :A]
    ps = []
    for a, b in drawn.pairs:
        variance = covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]
        ps.append(float(2 * special.ndtr(-abs(mean_A[b] - mean_A[a]) / max(variance, 1e-300) ** 0.5)))
    return holm(drawn, ps)


def classic(name: str) -> Callable[[Drawn], Adjusted]:
    def test(drawn: Drawn) -> Adjusted:
        return others(drawn.x_ARE, drawn.w_E, drawn.cell.each)[name]

    return test


def mixed_plain(drawn: Drawn) -> Adjusted:
    return mixed(drawn, own=False)


def mixed_own(drawn: Drawn) -> Adjusted:
    return mixed(drawn, own=True)


RIVALS: dict[str, Callable[[Drawn], Adjusted]] = {
    "ours": our_tests, "former": former, "wild (groups)": wild_groups, "wild (both)": wild_two_way, "max-T": max_t,
}  # fmt: skip
MIXED: dict[str, Callable[[Drawn], Adjusted]] = {
    "ours": our_tests, "former": former, "mixed": mixed_plain, "mixed, arm's own": mixed_own,
    "paired t": classic("paired t"), "pooled t": classic("pooled t"), "permutation": classic("permutation"),
}  # fmt: skip
