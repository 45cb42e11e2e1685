"""Comparisons between arms as tables: tests with Holm correction, matched budgets, share of a gain kept, power."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from analysis import stats
from analysis.arms import FULL, Arm, Arrangement, Scores, Setting, aligned, higher_is_better
from analysis.stats import Array, Components, Draws

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
TEST_COLUMNS = [
    "setting", "metric", "family", "a", "b", "difference", "low", "high", "p", "p_holm", "p_permutation", "effect",
    "share_improved", "seeds", "examples", "significant", "better",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms to compare, and the family of tests the comparison belongs to."""

    setting: Setting
    family: str
    a: Arm
    b: Arm


def pairs(found: Arrangement) -> Iterator[Pair]:
    """Arms of one setting that differ in exactly one factor (neighbouring ranks only), and each arm against the base
    model and against full fine-tuning.
    """
    for setting in found.settings:
        factors = list(setting.arms[0].factors) if setting.arms else []
        for factor in factors:
            groups: dict[tuple[str, ...], list[Arm]] = {}
            for arm in setting.arms:
                groups.setdefault(tuple(repr(arm.factors[key]) for key in factors if key != factor), []).append(arm)
            for group in groups.values():
                chosen = pairwise(group) if factor == "rank" else combinations(group, 2)
                yield from (Pair(setting=setting, family=factor, a=a, b=b) for a, b in chosen)
        if setting.base is not None:
            yield from (Pair(setting=setting, family="base model", a=setting.base, b=arm) for arm in setting.arms)
        for full in [arm for arm in setting.arms if arm.factors["placement"] == FULL]:
            others = [arm for arm in setting.arms if arm is not full]
            yield from (Pair(setting=setting, family=FULL, a=full, b=arm) for arm in others)


def tests(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """Paired tests of b − a, Holm-corrected over each family and metric (all settings together)."""
    rows = []
    for pair in pairs(found):
        for metric in found.metrics:
            tested = _tested(pair.a.scores.get(metric), pair.b.scores.get(metric), metric, draws)
            if tested is not None:
                names = {"setting": pair.setting.name, "metric": metric, "family": pair.family}
                rows.append({**names, "a": pair.a.label, "b": pair.b.label, **tested})
    return corrected(pd.DataFrame(rows, columns=[*TEST_COLUMNS, "interval"]))


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Moderates the seed variances (`stats.moderated`) per setting, family and metric, corrects per family and metric
    (p_holm), and names the better arm where the difference is significant.
    """
    for _, group in table.groupby(["setting", "family", "metric"]):
        for i, one in zip(group.index, stats.moderated(list(group["interval"])), strict=True):
            table.loc[i, ["low", "high", "p"]] = [one.low, one.high, stats.p_value(one)]
    table = table.drop(columns="interval")
    for _, group in table.groupby(["family", "metric"]):
        table.loc[group.index, "p_holm"] = stats.holm(group["p"].to_numpy(dtype=float))
    table["p_holm"] = table["p_holm"].astype(float)
    table["significant"] = table["p_holm"] < 0.05
    up = table["metric"].map(higher_is_better).astype(bool)
    b_wins = (table["difference"].astype(float) > 0) == up
    table["better"] = np.where(~table["significant"], "", np.where(b_wins, table["b"], table["a"]))
    return table


def _tested(a: Scores | None, b: Scores | None, metric: str, draws: Draws) -> dict[str, Any] | None:
    shared = aligned(a, b) if a is not None and b is not None else None
    if shared is None or a is None:
        return None
    a_RE, b_RE, w_E = shared
    found = stats.paired(a_RE, b_RE, w_E, draws=draws)
    share = 1 - found.share if higher_is_better(metric) else found.share
    return {
        "interval": found.difference, "difference": found.difference.estimate,
        "low": found.difference.low, "high": found.difference.high,
        "p": found.p, "p_permutation": found.p_permutation, "effect": found.effect, "share_improved": share,
        "seeds": found.difference.seeds, "examples": found.difference.examples if a.ids else np.nan,
    }  # fmt: skip


def matched(found: Arrangement, *, draws: Draws, tolerance: float = 0.05) -> pd.DataFrame:
    """Placements at equal trainable parameters: each arm against another placement's arm within `tolerance`, else
    against that placement's scores interpolated in log parameters between the two neighbouring ranks."""
    rows: list[dict[str, Any]] = []
    for setting in found.settings:
        ladders = _ladders(setting.arms)
        for (placement_a, rest_a), arms in ladders.items():
            for (placement_b, rest_b), others in ladders.items():
                if placement_a == placement_b or rest_a != rest_b:
                    continue
                for arm in arms:
                    rows += _matched_rows(setting, found.metrics, arm, others, draws, tolerance)
    table = pd.DataFrame(rows, columns=[*TEST_COLUMNS, "parameters_a", "parameters_b", "interval"])
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
    setting: Setting, metrics: Sequence[str], arm: Arm, others: Sequence[Arm], draws: Draws, tolerance: float
) -> Iterator[dict[str, Any]]:
    close = [other for other in others if abs(np.log(other.parameters / arm.parameters)) <= np.log1p(tolerance)]
    around = [(low, high) for low, high in pairwise(others) if low.parameters < arm.parameters < high.parameters]
    for metric in metrics:
        a = arm.scores.get(metric)
        if close:
            other = min(close, key=lambda one: abs(np.log(one.parameters / arm.parameters)))
            b, label, size = other.scores.get(metric), other.label, other.parameters
        elif around:
            low, high = around[0]
            b = _blend(low, high, arm.parameters, metric)
            label, size = f"{low.label} … {high.label}", arm.parameters
        else:
            return
        tested = _tested(a, b, metric, draws)
        if tested is not None:
            names = {"setting": setting.name, "metric": metric, "family": "matched budget", "a": arm.label, "b": label}
            yield {**names, **tested, "parameters_a": arm.parameters, "parameters_b": size}


def _blend(low: Arm, high: Arm, parameters: float, metric: str) -> Scores | None:
    a, b = low.scores.get(metric), high.scores.get(metric)
    shared = aligned(a, b) if a is not None and b is not None else None
    if shared is None or a is None or b is None or a.ids != b.ids:
        return None
    share = float(np.log(parameters / low.parameters) / np.log(high.parameters / low.parameters))
    seeds = tuple(seed for seed in a.seeds if seed in b.seeds)
    return Scores(x_RE=(1 - share) * shared[0] + share * shared[1], w_E=shared[2], seeds=seeds, ids=a.ids)


def shares(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """Share of a reference's gain over the base model that an arm keeps, with its interval.

    Share = (base − arm)/(base − reference). The references are full fine-tuning, where the study has it, and the full
    placement at the same rank. The interval is the delta method's on the paired differences; if the reference's own
    gain is not significantly different from 0, the share is NaN.
    """
    rows = []
    for setting in found.settings:
        for arm in setting.arms:
            for reference, name in _references(setting, arm):
                for metric in found.metrics:
                    kept = _kept(setting, arm, reference, metric, draws)
                    if kept is not None:
                        names: dict[str, Any] = {"setting": setting.name, "metric": metric}
                        names |= {"arm": arm.label, "reference": name}
                        percent = 100 * arm.parameters / setting.total
                        relative = 100 * arm.parameters / reference.parameters
                        names |= {"percent": percent, "percent_of_reference": relative, "rank": arm.factors["rank"]}
                        rows.append(names | {"placement": arm.factors["placement"], **kept})
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


def _kept(setting: Setting, arm: Arm, reference: Arm, metric: str, draws: Draws) -> dict[str, float] | None:
    base = setting.base.scores.get(metric) if setting.base is not None else None
    a, b = arm.scores.get(metric), reference.scores.get(metric)
    if base is None or a is None or b is None or a.ids != b.ids or a.ids != base.ids:
        return None
    shared = aligned(a, b)
    if shared is None:
        return None
    gain_arm, gain_reference = base.x_RE - shared[0], base.x_RE - shared[1]
    reference_gain = stats.interval(gain_reference, shared[2], draws=draws, strict=True)
    if not stats.p_value(reference_gain) < 0.05:
        return {"share": np.nan, "low": np.nan, "high": np.nan}
    share = stats.interval(gain_arm, shared[2], draws=draws).estimate / reference_gain.estimate
    rest = stats.interval(gain_arm - share * gain_reference, shared[2], draws=draws, strict=True)
    half = (rest.high - rest.low) / 2 / abs(reference_gain.estimate)
    return {"share": share, "low": share - half, "high": share + half}


def power(difference: float, parts: Components, seeds: int, examples: int, level: float = 0.05) -> float:
    """Chance that the paired test finds a true difference, given the variance components of the paired differences.

    The estimate is normal; the test's half width depends on the estimated variances of seeds and examples, which are
    chi-squared; both are averaged over (two-dimensional quadrature).
    """
    cell = parts.cell / (seeds * examples)
    by_seeds, by_examples = parts.seeds / seeds + cell, parts.examples / examples + cell
    sd = (by_seeds + by_examples - cell) ** 0.5
    if sd <= 0:
        return 1.0 if difference else level
    width = np.zeros((1, 1))
    if seeds > 1:
        width = width + special.stdtrit(seeds - 1, 1 - level / 2) ** 2 * by_seeds * _chi2_share(seeds - 1)[:, None]
    if examples > 1:
        drawn = by_examples * _chi2_share(examples - 1) - cell * (seeds > 1)
        width = width + special.stdtrit(examples - 1, 1 - level / 2) ** 2 * np.maximum(drawn, 0)
    reach, shift = np.sqrt(width) / sd, abs(difference) / sd
    tails = special.ndtr(shift - reach) + special.ndtr(-reach - shift)
    rows = _WEIGHTS @ tails / 2 if seeds > 1 else tails[0]
    return float(rows @ _WEIGHTS / 2 if examples > 1 else rows[0])


@lru_cache(maxsize=4096)
def _chi2_share(df: int) -> Array:
    """Quantiles of chi-squared over its degrees of freedom, at the nodes of the quadrature."""
    quantiles: Array = 2 * special.gammaincinv(df / 2, (_NODES + 1) / 2) / df
    return quantiles


def _enough(
    difference: float, parts: Components, seeds: int | None, examples: int | None, target: float, n: int
) -> bool:
    """Whether n seeds (or examples, whichever is None) reach the target power."""
    reached = power(difference, parts, n if seeds is None else seeds, n if examples is None else examples)
    return reached >= target


def needed(enough: Callable[[int], bool], start: int, most: int) -> int | None:
    """Smallest n in [start, most] with enough(n), which must be monotone; None if even `most` is not enough."""
    n = start + bisect_left(range(start, most + 1), True, key=enough)
    return n if n <= most else None


def power_table(found: Arrangement, *, metric: str = "nll", target: float = 0.8) -> pd.DataFrame:
    """For each pair of placements or methods at equal rank: the power this study had for the difference it saw, and how
    many seeds (at these examples) or examples (at these seeds) would reach `target`. None: more than 1,000 seeds or a
    million examples."""
    rows = []
    for pair in pairs(found):
        a, b = pair.a.scores.get(metric), pair.b.scores.get(metric)
        shared = aligned(a, b) if a is not None and b is not None and pair.family in ("placement", "method") else None
        if shared is None or min(shared[0].shape) < 2:
            continue
        d_RE: Array = shared[1] - shared[0]
        parts, (R, E) = stats.components(d_RE, shared[2]), d_RE.shape
        difference = float((d_RE @ shared[2] / shared[2].sum()).mean())
        rows.append(
            {
                "setting": pair.setting.name,
                "metric": metric,
                "a": pair.a.label,
                "b": pair.b.label,
                "difference": difference,
                "sd_seeds": parts.seeds**0.5,
                "sd_examples": parts.examples**0.5,
                "sd_cell": parts.cell**0.5,
                "seeds": R,
                "examples": E,
                "power": power(difference, parts, R, E),
                "seeds_needed": needed(partial(_enough, difference, parts, None, E, target), 2, 1000),
                "examples_needed": needed(partial(_enough, difference, parts, R, None, target), 2, 1_000_000),
            }
        )
    columns = ["setting", "metric", "a", "b", "difference", "sd_seeds", "sd_examples", "sd_cell", "seeds", "examples"]
    table = pd.DataFrame(rows, columns=[*columns, "power", "seeds_needed", "examples_needed"])
    return table.astype({"seeds_needed": "Int64", "examples_needed": "Int64"})
