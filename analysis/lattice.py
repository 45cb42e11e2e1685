"""What each role is worth, from a study of every subset of some roles (`placement=lattice`).

The game is v(S) = how far the score of an adapter in the roles S lies above the untouched base model's, v(∅) = 0. A
part is one role, or roles that every placement of the study has together. Values are in the metric's own unit; positive
is better, also of NLL.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
import pandas as pd

from . import stats
from .arms import FULL, Arm, Arrangement, Scores, Setting, higher_is_better
from .seeds import SeedVariance, of_blend

SHORT = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_o": "o", "ff_gate": "gate", "ff_up": "up", "ff_down": "down",
}  # fmt: skip
ORDER = tuple(SHORT)
LEAST, MOST = 3, 12  # parts; of two, the arms' own differences say it all
NEARLY = 0.75  # share of the subsets from which on the others count as missing
COLUMNS = ["setting", "metric", "study", "term", "parts", "kind", "estimate", "low", "high", "p", "arms", "seeds"]
BEST = ["setting", "metric", "study", "parts", "placement", "trainable_parameters", "estimate", "low", "high", "of"]

Subset = frozenset[int]


def shapley(parts: int, part: int) -> dict[Subset, float]:
    """Weight of each v(S) in the Shapley value of one of `parts` (Shapley 1953); they add up to 0 over S and S ∪ i."""
    found: dict[Subset, float] = {}
    for rest in _subsets([other for other in range(parts) if other != part]):
        weight = factorial(len(rest)) * factorial(parts - len(rest) - 1) / factorial(parts)
        found[rest] = -weight
        found[rest | {part}] = weight
    return found


def interaction(parts: int, i: int, j: int) -> dict[Subset, float]:
    """Weight of each v(S) in the Shapley interaction index of two of `parts` (Grabisch & Roubens 1999, equation 3).

    Above 0 the two are worth more together than apart; below 0 one does what the other does.
    """
    found: dict[Subset, float] = {}
    for rest in _subsets([other for other in range(parts) if other not in (i, j)]):
        weight = factorial(len(rest)) * factorial(parts - len(rest) - 2) / factorial(parts - 1)
        found |= {rest: weight, rest | {i}: -weight, rest | {j}: -weight, rest | {i, j}: weight}
    return found


def _subsets(of: Sequence[int]) -> Iterator[Subset]:
    for size in range(len(of) + 1):
        yield from map(frozenset, itertools.combinations(of, size))


@dataclass(kw_only=True)
class Lattice:
    """Arms of one setting that differ in their roles alone: every subset of `parts` but for `missing` ones."""

    setting: Setting
    study: str
    parts: tuple[str, ...]
    arms: Mapping[Subset, Arm]
    missing: int

    def name(self, subset: Subset) -> str:
        return "+".join(self.parts[i] for i in sorted(subset))


def lattices(found: Arrangement) -> Iterator[Lattice]:
    """The lattices of a study, also those that lack arms; a setting has one for each rank, method and so on."""
    for setting in found.settings:
        others = sorted({key for arm in setting.arms for key in arm.factors} - {"placement"})
        families: dict[tuple[Any, ...], list[Arm]] = {}
        for arm in setting.arms:
            if arm.factors.get("placement") != FULL and arm.roles:
                families.setdefault(tuple(repr(arm.factors.get(key)) for key in others), []).append(arm)
        told = [key for number, key in enumerate(others) if len({family[number] for family in families}) > 1]
        for arms in families.values():
            about = " ".join(_word(key, arms[0].factors.get(key)) for key in told)
            if (one := _lattice(setting, about, arms)) is not None:
                yield one


def _word(key: str, value: Any) -> str:
    if key == "rank":
        return f"r{value:g}" if isinstance(value, int | float) else f"r{value}"
    return str(value) if key in ("method", "allocation") else f"{key.split('.')[-1]}={value}"


def _lattice(setting: Setting, about: str, arms: Sequence[Arm]) -> Lattice | None:
    by_roles = {arm.roles: arm for arm in arms}
    members: dict[tuple[bool, ...], list[str]] = {}  # roles that lie in the same placements are one part
    for role in sorted(set().union(*by_roles), key=_place):
        members.setdefault(tuple(role in roles for roles in by_roles), []).append(role)
    parts = list(members.values())
    if not LEAST <= len(parts) <= MOST or len(by_roles) < NEARLY * (2 ** len(parts) - 1):
        return None
    chosen = {frozenset(i for i, part in enumerate(parts) if part[0] in roles): arm for roles, arm in by_roles.items()}
    names = tuple("+".join(SHORT.get(role, role) for role in part) for part in parts)
    missing = 2 ** len(parts) - 1 - len(chosen)
    return Lattice(setting=setting, study=about, parts=names, arms=chosen, missing=missing)


def _place(role: str) -> tuple[int, str]:
    return (ORDER.index(role) if role in ORDER else len(ORDER)), role


def table(found: Arrangement) -> pd.DataFrame:
    """One row per complete lattice, metric and part (`kind` value), and per pair of parts (interaction).

    Estimates are sums of the arms' paired scores; their 95% intervals and p are over seeds and groups of examples, as
    of all paired differences. p is of 0.
    """
    rows = []
    for lattice in lattices(found):
        for metric in found.metrics if not lattice.missing else ():
            scores = aligned(lattice, metric)
            if scores is None:
                continue
            n = len(lattice.parts)
            terms = [(part, "value", shapley(n, i)) for i, part in enumerate(lattice.parts)]
            for i, j in itertools.combinations(range(n), 2):
                terms.append((f"{lattice.parts[i]} × {lattice.parts[j]}", "interaction", interaction(n, i, j)))
            about = {"setting": lattice.setting.name, "metric": metric, "study": lattice.study, "parts": n}
            about |= {"arms": len(lattice.arms), "seeds": len(scores.seeds)}
            rows += [about | {"term": term, "kind": kind, **scores.of(weights)} for term, kind, weights in terms]
    return pd.DataFrame(rows, columns=COLUMNS)


def best(found: Arrangement) -> pd.DataFrame:
    """Of each number of parts the subset with the best validation score, and how far its test score lies above the
    base model's: the choice does not flatter it. `of` counts the subsets of that size that were trained."""
    rows = []
    for lattice in lattices(found):
        for metric in found.metrics:
            for size in range(1, len(lattice.parts) + 1):
                own = {s: arm for s, arm in lattice.arms.items() if len(s) == size and metric in arm.scores}
                judged = {s: _validation(found, arm) for s, arm in own.items()}
                if not own or any(np.isnan(value) for value in judged.values()):
                    continue
                pick = (max if higher_is_better(found.select) else min)(judged, key=lambda s: (judged[s], sorted(s)))
                one = Lattice(
                    setting=lattice.setting, study=lattice.study, parts=lattice.parts, arms={pick: own[pick]}, missing=0
                )
                scores = aligned(one, metric)
                if scores is not None:
                    about = {"setting": lattice.setting.name, "metric": metric, "study": lattice.study, "parts": size}
                    about |= {"placement": lattice.name(pick), "trainable_parameters": own[pick].parameters}
                    values = {key: value for key, value in scores.of({pick: 1.0}).items() if key in BEST}
                    rows.append(about | values | {"of": len(own)})
    return pd.DataFrame(rows, columns=BEST)


def _validation(found: Arrangement, arm: Arm) -> float:
    return float(arm.runs[found.select].mean()) if found.select in arm.runs else float("nan")


@dataclass(kw_only=True)
class Gains:
    """Gains over the base model [R, E] of every subset, on shared seeds and examples."""

    gains: Mapping[Subset, Any]
    w_E: Any
    groups: tuple[str, ...]
    seeds: tuple[Any, ...]
    variances: Mapping[Subset, tuple[SeedVariance, SeedVariance]]

    def of(self, weights: Mapping[Subset, float]) -> dict[str, float]:
        """Estimate, interval and p of a weighted sum of v; v of the empty subset is 0."""
        used = {subset: weight for subset, weight in weights.items() if subset}
        x_RE = sum(weight * self.gains[subset] for subset, weight in used.items())
        found = stats.interval(x_RE, self.w_E, strict=True, groups=self.groups, seed_variance=self._seeds(used))
        return {"estimate": found.estimate, "low": found.low, "high": found.high, "p": stats.p_value(found)}

    def means(self) -> dict[Subset, float]:
        """v of every subset but the empty one."""
        return {s: float((x_RE @ self.w_E / self.w_E.sum()).mean()) for s, x_RE in self.gains.items()}

    def _seeds(self, used: Mapping[Subset, float]) -> SeedVariance | None:
        if not self.variances:
            return None
        own = of_blend([(weight, self.variances[subset][1]) for subset, weight in used.items()])
        # what all arms of a seed share leaves a sum whose weights add up to 0, as the base model's does not
        shared = np.mean([whole.variance - part.variance for whole, part in self.variances.values()])
        variance = own.variance + sum(used.values()) ** 2 * max(float(shared), 0.0)
        return SeedVariance(variance=variance, df=own.df, unequal=own.unequal)


def aligned(lattice: Lattice, metric: str) -> Gains | None:
    """The gains of a lattice's arms; None where one of them or the base model lacks the metric, or none is shared."""
    base = lattice.setting.base
    each = {subset: arm.scores.get(metric) for subset, arm in lattice.arms.items()}
    if base is None or metric not in base.scores or any(one is None for one in each.values()):
        return None
    scores: dict[Subset, Scores] = {subset: one for subset, one in each.items() if one is not None}
    first, below = next(iter(scores.values())), base.scores[metric]
    seeds = tuple(seed for seed in first.seeds if all(seed in one.seeds for one in scores.values()))
    known = [set(ids) for ids in {one.ids for one in (below, *scores.values())}]
    ids = tuple(i for i in first.ids if all(i in own for own in known))
    if not seeds or bool(first.ids) != bool(ids):
        return None
    sign = 1.0 if higher_is_better(metric) else -1.0
    before = _rows(below, (), ids)
    gains = {subset: sign * (_rows(one, seeds, ids) - before) for subset, one in scores.items()}
    place = {name: number for number, name in enumerate(first.ids)}
    columns = [place[i] for i in ids] if ids else [0]
    variances = {
        subset: (one.seed_variance, one.contrast_variance)
        for subset, one in scores.items()
        if one.seeds == seeds and one.seed_variance is not None and one.contrast_variance is not None
    }
    return Gains(
        gains=gains, w_E=first.w_E[columns], groups=tuple(first.groups[i] for i in columns) if first.groups else (),
        seeds=seeds, variances=variances if len(variances) == len(gains) else {},
    )  # fmt: skip


def _rows(scores: Scores, seeds: Sequence[Any], ids: Sequence[str]) -> Any:
    rows = [scores.seeds.index(seed) for seed in seeds] if scores.seeds else [0]
    if not ids or tuple(ids) == scores.ids:
        return scores.x_RE[rows]
    place = {name: i for i, name in enumerate(scores.ids)}
    return scores.x_RE[rows][:, [place[name] for name in ids]]


def notes(found: Arrangement) -> list[str]:
    """A line for each lattice that lacks arms, whose values are not worked out."""
    return [
        f"{one.setting.name}{f' {one.study}' if one.study else ''}: {one.missing} of {2 ** len(one.parts) - 1} subsets "
        f"of {', '.join(one.parts)} are missing, so no role's value can be told"
        for one in lattices(found)
        if one.missing
    ]
