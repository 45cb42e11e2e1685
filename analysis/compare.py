"""Comparisons between arms as tables: tests with Holm correction, matched budgets, share of a gain kept, power."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pandas as pd
import scipy
from scipy import special

from . import stats, together
from .arms import FULL, Aligned, Arm, Arrangement, Scores, Setting, aligned, higher_is_better
from .seeds import SeedVariance, of_blend, of_remainder
from .stats import Array, Components, Draws

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
MOST_PLACEMENTS = 24
"""That are all compared with one another."""
TEST_COLUMNS = [
    "setting", "metric", "family", "a", "b", "difference", "low", "high", "p", "p_holm", "effect",
    "share_improved", "seeds", "examples", "groups", "significant", "better",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms to compare, and the family of tests the comparison belongs to."""

    setting: Setting
    family: str
    a: Arm
    b: Arm


def pairs(found: Arrangement) -> Iterator[Pair]:
    """Arms of one setting that differ in exactly one factor (neighbouring ranks only, and of many placements those that
    add least to one another), and each arm against the base model and against full fine-tuning; a task trained with
    others against the same placement and rank trained alone.
    """
    for setting in found.settings:
        factors = list(setting.arms[0].factors) if setting.arms else []
        yield from from_alone(setting)
        for factor in (factor for factor in factors if factor != together.FIELD):
            groups: dict[tuple[str, ...], list[Arm]] = {}
            for arm in setting.arms:
                groups.setdefault(tuple(repr(arm.factors[key]) for key in factors if key != factor), []).append(arm)
            for group in groups.values():
                many = factor == "placement" and len(group) > MOST_PLACEMENTS
                chosen = pairwise(group) if factor == "rank" else _steps(group) if many else combinations(group, 2)
                yield from (Pair(setting=setting, family=factor, a=a, b=b) for a, b in chosen)
        if setting.base is not None:
            yield from (Pair(setting=setting, family="base model", a=setting.base, b=arm) for arm in setting.arms)
        for full in [arm for arm in setting.arms if arm.factors["placement"] == FULL]:
            others = [arm for arm in setting.arms if arm is not full]
            yield from (Pair(setting=setting, family=FULL, a=full, b=arm) for arm in others)


def _steps(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Arms of which the second has all roles of the first and more, with no other arm in between."""
    for a, b in product(arms, arms):
        if a.roles < b.roles and not any(a.roles < c.roles < b.roles for c in arms):
            yield a, b


def from_alone(setting: Setting) -> Iterator[Pair]:
    """Arms of a task trained with others, each against the one of it alone that is otherwise the same.

    How it was mixed, and the batch, of which others have a share, are part of that.
    """
    with_others = ("sharing", together.FIELD, "trainer.batch_size")

    def rest(arm: Arm) -> str:
        return repr({key: value for key, value in arm.factors.items() if not key.startswith(with_others)})

    alone = {rest(arm): arm for arm in setting.arms if arm.factors.get(together.FIELD) == together.ALONE}
    for arm in setting.arms:
        if together.FIELD in arm.factors and arm.factors[together.FIELD] != together.ALONE and rest(arm) in alone:
            yield Pair(setting=setting, family=together.FIELD, a=alone[rest(arm)], b=arm)


def tests(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """Paired tests of b − a, Holm-corrected over each family and metric (all settings together)."""
    rows = []
    for pair in pairs(found):
        for metric in found.metrics:
            result = tested(pair.a.scores.get(metric), pair.b.scores.get(metric), metric)
            if result is not None:
                names = {"setting": pair.setting.name, "metric": metric, "family": pair.family}
                rows.append({**names, "a": pair.a.label, "b": pair.b.label, **result})
    return corrected(pd.DataFrame(rows, columns=TEST_COLUMNS))


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Corrects p per family and metric (p_holm), and names the better arm where the difference is significant."""
    for _, group in table.groupby(["family", "metric"]):
        table.loc[group.index, "p_holm"] = stats.holm(group["p"].to_numpy(dtype=float))
    table["p_holm"] = table["p_holm"].astype(float)
    table["significant"] = table["p_holm"] < 0.05
    up = table["metric"].map(higher_is_better).astype(bool)
    b_wins = (table["difference"].astype(float) > 0) == up
    table["better"] = np.where(~table["significant"], "", np.where(b_wins, table["b"], table["a"]))
    return table


def tested(a: Scores | None, b: Scores | None, metric: str) -> dict[str, Any] | None:
    """The paired test of b − a as columns of a table; None where the two share no seed or no example."""
    shared = aligned(a, b) if a is not None and b is not None else None
    if shared is None or a is None:
        return None
    found = stats.paired(shared.a_RE, shared.b_RE, shared.w_E, groups=shared.groups, seed_variance=shared.seed_variance)
    share = 1 - found.share if higher_is_better(metric) else found.share
    return {
        "difference": found.difference.estimate, "low": found.difference.low, "high": found.difference.high,
        "p": found.p, "effect": found.effect, "share_improved": share, "seeds": found.difference.seeds,
        "examples": found.difference.examples if a.ids else np.nan,
        "groups": found.difference.groups if a.ids else np.nan,
    }  # fmt: skip


def matched(found: Arrangement, *, draws: Draws, tolerance: float = 0.05) -> pd.DataFrame:
    """Placements at equal trainable parameters: each arm against another placement's arm within `tolerance`, else
    against that placement's scores interpolated in log parameters between the two neighbouring ranks (`_blend`)."""
    rows: list[dict[str, Any]] = []
    for setting in found.settings:
        ladders = _ladders(setting.arms)
        for (placement_a, rest_a), arms in ladders.items():
            for (placement_b, rest_b), others in ladders.items():
                if placement_a == placement_b or rest_a != rest_b:
                    continue
                for arm in arms:
                    rows += _matched_rows(setting, found.metrics, arm, others, tolerance)
    table = pd.DataFrame(rows, columns=[*TEST_COLUMNS, "parameters_a", "parameters_b"])
    pair = table.apply(lambda row: "|".join(sorted((row["a"], row["b"]))), axis=1) if len(table) else None
    if pair is not None:
        table = table[~pd.concat([table[["setting", "metric"]], pair], axis=1).duplicated()].reset_index(drop=True)
    return corrected(table)


def _ladders(arms: Sequence[Arm]) -> dict[tuple[str, str], list[Arm]]:
    """Arms that differ in rank only, grouped by placement and the remaining factors, sorted by parameters."""
    found: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        rest = {key: str(value) for key, value in arm.factors.items() if key not in ("rank", "alpha", "placement")}
        found.setdefault((str(arm.factors["placement"]), repr(rest)), []).append(arm)
    return {key: sorted(group, key=lambda arm: arm.parameters) for key, group in found.items()}


def _matched_rows(
    setting: Setting, metrics: Sequence[str], arm: Arm, others: Sequence[Arm], tolerance: float
) -> Iterator[dict[str, Any]]:
    close = [other for other in others if abs(_distance(other, arm.parameters)) <= math.log1p(tolerance)]
    around = [(low, high) for low, high in pairwise(others) if low.parameters < arm.parameters < high.parameters]
    for metric in metrics:
        a = arm.scores.get(metric)
        if close:
            other = min(close, key=lambda one: abs(_distance(one, arm.parameters)))
            b, label, size = other.scores.get(metric), other.label, other.parameters
        elif around:
            low, high = around[0]
            b = _blend(others, around[0], arm.parameters, metric)
            label, size = f"{low.label} … {high.label}", arm.parameters
        else:
            return
        result = tested(a, b, metric)
        if result is not None:
            names = {"setting": setting.name, "metric": metric, "family": "matched budget", "a": arm.label, "b": label}
            yield {**names, **result, "parameters_a": arm.parameters, "parameters_b": size}


def _distance(arm: Arm, parameters: float) -> float:
    """How many times the parameters an arm has, as a logarithm; NaN where they are not known."""
    ratio = arm.parameters / parameters
    return math.log(ratio) if ratio > 0 else math.nan


def _blend(ladder: Sequence[Arm], around: tuple[Arm, Arm], parameters: float, metric: str) -> Scores | None:
    """Scores at a number of parameters between two ranks: the parabola in log parameters through these and the rank
    nearest to them, since a line between two points of a convex curve lies above it, to the measured arm's favour; a
    line where the ladder has two ranks."""
    third = [arm for arm in ladder if arm not in around]
    third.sort(key=lambda arm: abs(_distance(arm, parameters)))
    arms = sorted([*around, *third[:1]], key=lambda arm: arm.parameters)
    found = [arm.scores.get(metric) for arm in arms]
    parts = [one for one in found if one is not None and one.ids == (found[0].ids if found[0] else ())]
    if len(parts) < len(arms):
        return None
    seeds = tuple(seed for seed in parts[0].seeds if all(seed in one.seeds for one in parts))
    if not seeds:
        return None
    same = all(one.seeds == seeds for one in parts)
    at_A = [_distance(arm, parameters) for arm in arms]
    share_A = [math.prod(-other / (at - other) for other in at_A if other != at) for at in at_A]
    x_ARE = [one.x_RE if same else one.x_RE[[one.seeds.index(seed) for seed in seeds]] for one in parts]
    x_RE = np.add.reduce([share * one_RE for share, one_RE in zip(share_A, x_ARE, strict=True)])
    blended = Scores(x_RE=x_RE, w_E=parts[0].w_E, seeds=seeds, ids=parts[0].ids, groups=parts[0].groups)
    variances = [one.contrast_variance for one in parts if one.seeds == seeds and one.contrast_variance is not None]
    if len(variances) == len(parts):
        blended.contrast_variance = of_blend(list(zip(share_A, variances, strict=True)))
    return blended


def shares(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """Share of a reference's gain over the base model that an arm keeps, with its interval.

    Share = (base − arm)/(base − reference). The references are full fine-tuning, where the study has it, and the full
    placement at the same rank. The interval is the delta method's on the paired differences, over groups and seeds as
    that of a test (`seeds.of_remainder`); if the reference's own gain is not significantly different from 0, the share
    is NaN.
    """
    rows = []
    for setting in found.settings:
        for arm in setting.arms:
            for reference, name in _references(setting, arm):
                for metric in found.metrics:
                    share = kept(setting, arm, reference, metric)
                    if share is not None:
                        names: dict[str, Any] = {"setting": setting.name, "metric": metric}
                        names |= {"arm": arm.label, "reference": name}
                        percent = 100 * arm.parameters / setting.total
                        relative = 100 * arm.parameters / reference.parameters
                        names |= {"percent": percent, "percent_of_reference": relative, "rank": arm.factors["rank"]}
                        rows.append(names | {"placement": arm.factors["placement"], **share})
    columns = ["setting", "metric", "arm", "reference", "percent", "percent_of_reference", "share", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "placement", "rank"])


def _references(setting: Setting, arm: Arm) -> Iterator[tuple[Arm, str]]:
    rest = {key: str(value) for key, value in arm.factors.items() if key != "placement"}
    for other in setting.arms:
        if other is arm:
            continue
        if other.factors["placement"] == FULL:
            yield other, FULL
        same = {key: str(value) for key, value in other.factors.items() if key != "placement"} == rest
        if same and other.factors.get("placement") == "full":
            yield other, "full placement"


def kept(setting: Setting, arm: Arm, reference: Arm, metric: str) -> dict[str, float] | None:
    """`share` of a reference's gain over the base model that an arm keeps, `low` and `high` (`shares`); None without
    the same examples."""
    base = setting.base.scores.get(metric) if setting.base is not None else None
    a, b = arm.scores.get(metric), reference.scores.get(metric)
    if base is None or a is None or b is None or a.ids != b.ids or a.ids != base.ids:
        return None
    shared = aligned(a, b)
    if shared is None:
        return None
    gain_arm, gain_reference = base.x_RE - shared.a_RE, base.x_RE - shared.b_RE
    own, rest_of = _seed_variances(a, b)
    reference_gain = stats.interval(
        gain_reference, shared.w_E, strict=True, groups=shared.groups, seed_variance=own
    )  # fmt: skip
    if not stats.p_value(reference_gain) < 0.05:
        return {"share": np.nan, "low": np.nan, "high": np.nan}
    share = float((gain_arm @ shared.w_E / shared.w_E.sum()).mean()) / reference_gain.estimate
    rest = stats.interval(
        gain_arm - share * gain_reference, shared.w_E, strict=True, groups=shared.groups, seed_variance=rest_of(share)
    )
    half = (rest.high - rest.low) / 2 / abs(reference_gain.estimate)
    return {"share": share, "low": share - half, "high": share + half}


def _seed_variances(
    arm: Scores, reference: Scores
) -> tuple[SeedVariance | None, Callable[[float], SeedVariance | None]]:
    """The pooled variance of the reference's gain, and that of arm − share · reference by share; None where the arms do
    not have the same seeds, or too few."""
    found = (arm.contrast_variance, arm.seed_variance, reference.contrast_variance, reference.seed_variance)
    if arm.seeds != reference.seeds or any(one is None for one in found):
        return None, lambda share: None
    a, whole_a, b, whole_b = (one for one in found if one is not None)
    return whole_b, lambda share: of_remainder(share, (a, whole_a), (b, whole_b))


def power(
    difference: float, parts: Components, seeds: int, groups: int, *, level: float = 0.05, arms: int = 2
) -> float:
    """Chance that the paired test finds a true difference, given the variance components of the paired differences.

    The estimate is normal; the test's half width depends on the estimated variances of seeds (pooled over `arms`:
    (arms − 1)(seeds − 1) degrees of freedom) and groups, which are chi-squared; both are averaged over
    (two-dimensional quadrature).
    """
    cell = parts.cell / (seeds * groups)
    by_seeds, by_groups = parts.seeds / seeds + cell, parts.groups / groups + cell
    sd = (by_seeds + by_groups - cell) ** 0.5
    if sd <= 0:
        return 1.0 if difference else level
    width = np.zeros((1, 1))
    if seeds > 1:
        df = (arms - 1 if seeds > 2 else 1) * (seeds - 1)  # two seeds are not pooled
        width = width + special.stdtrit(df, 1 - level / 2) ** 2 * by_seeds * _chi2_share(df)[:, None]
    if groups > 1:
        drawn = by_groups * _chi2_share(groups - 1) - cell * (seeds > 1)
        width = width + special.stdtrit(groups - 1, 1 - level / 2) ** 2 * np.maximum(drawn, 0)
    reach, shift = np.sqrt(width) / sd, abs(difference) / sd
    tails = special.ndtr(shift - reach) + special.ndtr(-reach - shift)
    rows = _WEIGHTS @ tails / 2 if seeds > 1 else tails[0]
    return float(rows @ _WEIGHTS / 2 if groups > 1 else rows[0])


@lru_cache(maxsize=4096)
def _chi2_share(df: int) -> Array:
    """Quantiles of chi-squared over its degrees of freedom, at the nodes of the quadrature."""
    quantiles: Array = 2 * special.gammaincinv(df / 2, (_NODES + 1) / 2) / df
    return quantiles


def detectable(
    parts: Components, seeds: int, groups: int, *, target: float = 0.8, level: float = 0.05, arms: int = 2
) -> float:
    """Smallest true difference that the paired test finds with the chance `target`; 0 without any variance."""
    sd = (parts.seeds / seeds + parts.groups / groups + parts.cell / (seeds * groups)) ** 0.5
    if sd <= 0:
        return 0.0
    most = sd
    while power(most, parts, seeds, groups, level=level, arms=arms) < target:
        most *= 2
    miss = partial(_miss, parts=parts, seeds=seeds, groups=groups, target=target, level=level, arms=arms)
    return float(scipy.optimize.brentq(miss, 0.0, most, xtol=1e-6 * sd))


def _miss(
    difference: float, *, parts: Components, seeds: int, groups: int, target: float, level: float, arms: int
) -> float:
    return power(difference, parts, seeds, groups, level=level, arms=arms) - target


SEEDS, TIMES = (2, 3, 5, 10, 20), (1, 2, 4)


def power_table(found: Arrangement, *, metric: str = "nll", target: float = 0.8) -> pd.DataFrame:
    """Smallest difference between two placements or methods at equal rank that a study would find with the chance
    `target`, by seeds and groups of examples, for planning the next study.

    From the variance components of the paired differences, pooled over the pairs of a setting; nothing here depends on
    the differences that were seen. `level` is 5% over the number of `tests` of the largest family of these pairs.
    """
    tests = [(pair, shared) for pair, shared in _aligned_pairs(found, metric) if min(shared.a_RE.shape) > 1]
    rows = []
    for setting in found.settings:
        mine = [(pair, shared) for pair, shared in tests if pair.setting is setting]
        if not mine:
            continue
        squares = [
            stats.mean_squares(shared.b_RE - shared.a_RE, shared.w_E, groups=shared.groups) for _, shared in mine
        ]
        parts = stats.solve(*np.mean(squares, axis=0).tolist())
        count = max(Counter(pair.family for pair, _ in tests).values())
        arms = len({label for pair, _ in mine for label in (pair.a.label, pair.b.label)})
        groups = min(len(set(shared.groups)) or shared.a_RE.shape[1] for _, shared in mine)
        common = {
            "setting": setting.name, "metric": metric, "pairs": len(mine), "tests": count, "level": 0.05 / count,
            "sd_seeds": parts.seeds**0.5, "sd_groups": parts.groups**0.5, "sd_cell": parts.cell**0.5,
        }  # fmt: skip
        own = max(shared.a_RE.shape[0] for _, shared in mine)
        for times, seeds in product(TIMES, sorted({*SEEDS, own})):
            least = detectable(parts, seeds, times * groups, target=target, level=0.05 / count, arms=arms)
            size = {"seeds": seeds, "groups": times * groups, "own_design": times == 1 and seeds == own}
            rows.append({**common, **size, "detectable": least})
    return pd.DataFrame(rows, columns=POWER_COLUMNS)


POWER_COLUMNS = [
    "setting", "metric", "pairs", "tests", "level", "sd_seeds", "sd_groups", "sd_cell", "seeds", "groups", "own_design",
    "detectable",
]  # fmt: skip


def _aligned_pairs(found: Arrangement, metric: str) -> Iterator[tuple[Pair, Aligned]]:
    for pair in pairs(found):
        a, b = pair.a.scores.get(metric), pair.b.scores.get(metric)
        if pair.family in ("placement", "method") and a is not None and b is not None:
            shared = aligned(a, b)
            if shared is not None:
                yield pair, shared
