"""Effects on the score: fixed-effects analysis of variance of placement × rank, slopes over rank, and hyperparameter
importance."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special
from scipy.linalg import solve_triangular

from .arms import Arrangement, varying
from .stats import Array

NDArrayInt = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def anova(y: Array, factors: pd.DataFrame, interactions: Sequence[tuple[str, str]] = ()) -> pd.DataFrame:
    """Analysis of variance with categorical fixed effects, type II sums of squares (each factor after all others, an
    interaction after the main effects; Fox 2016, chapter 8). Columns: term, ss, df, f, p, partial_eta2."""
    names = list(factors.columns)
    designs = {name: _dummies(factors[name]) for name in names}
    for a, b in interactions:
        designs[f"{a} × {b}"] = _dummies(factors[a].astype(str) + "\x1f" + factors[b].astype(str))
    terms = [*names, *(f"{a} × {b}" for a, b in interactions)]
    rss_all, rank_all = _fit(y, [designs[term] for term in terms])
    free = len(y) - rank_all
    rows = []
    for term in terms:
        related = [other for other in terms if other != term and not (term in names and term in other.split(" × "))]
        without, rank_without = _fit(y, [designs[other] for other in related])
        with_term, rank_with = _fit(y, [designs[other] for other in [*related, term]])
        ss, df = max(without - with_term, 0.0), rank_with - rank_without
        f = (ss / df) / (rss_all / free) if df and free > 0 and rss_all > 0 else np.nan
        p = float(special.fdtrc(df, free, f)) if not np.isnan(f) else np.nan
        eta = ss / (ss + rss_all) if ss + rss_all > 0 else np.nan
        rows.append({"term": term, "ss": ss, "df": df, "f": f, "p": p, "partial_eta2": eta})
    rows.append({"term": "residual", "ss": rss_all, "df": free, "f": np.nan, "p": np.nan, "partial_eta2": np.nan})
    return pd.DataFrame(rows)


def placement_by_rank(found: Arrangement, metric: str = "nll") -> pd.DataFrame:
    """One row per term and setting: score ~ placement + rank + placement × rank + all other factors, with the seed as a
    block. Methods without a rank are included only where rank is not a factor."""
    parts = []
    for name, every in _chosen(found, metric):
        ranked = every[every["rank"].notna()]
        runs = ranked if "rank" in _factors(found, name, ranked) else every
        factors = _factors(found, name, runs)
        if factors.empty:
            continue
        crossed = [("placement", "rank")] if {"placement", "rank"} <= set(factors) else []
        if runs["seed"].nunique() > 1:
            factors["seed"] = runs["seed"].astype(str)
        table = anova(runs[f"{found.split}.{metric}"].to_numpy(dtype=float), factors, crossed)
        parts.append(table.assign(setting=name, metric=metric))
    columns = ["setting", "metric", "term", "ss", "df", "f", "p", "partial_eta2"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def slopes(found: Arrangement, metric: str = "nll") -> pd.DataFrame:
    """Change of the score per doubling of the rank, over arms that differ in rank alone: least squares on log2(rank),
    t interval."""
    rows, others = [], _others(found)
    for name, runs in _chosen(found, metric):
        runs = runs[runs["rank"].notna()]
        for keys, group in runs.groupby(["placement", *others], dropna=False):
            x = np.log2(group["rank"].to_numpy(dtype=float))
            y = group[f"{found.split}.{metric}"].to_numpy(dtype=float)
            if len(np.unique(x)) < 2 or len(x) < 3:
                continue
            (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
            error = covariance[0, 0] ** 0.5
            half = float(special.stdtrit(len(x) - 2, 0.975)) * error
            p = float(2 * special.stdtr(len(x) - 2, -abs(slope) / error)) if error > 0 else 0.0
            values = {"slope": slope, "low": slope - half, "high": slope + half, "p": p}
            arm = dict(zip(["placement", *others], keys, strict=True))
            rows.append({"setting": name, "metric": metric, **arm, **values, "runs": len(x)})
    columns = ["setting", "metric", "placement", *others, "slope", "low", "high", "p", "runs"]
    return pd.DataFrame(rows, columns=columns)


def importance(found: Arrangement, *, metric: str = "nll", draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Share of the variance of the validation score, over all completed runs, that each varied field explains.

    The functional analysis of variance of Hutter et al. (2014), which on a grid is the classical one: type II sum of
    squares of the main effect over the total. The remainder is interactions and noise. Numeric fields with more than 8
    values are binned at their quantiles into 6. A field determined by another (each method at its own rank) has no
    variance of its own and is left out. Intervals: normal, with the bootstrap standard error over runs. Bootstrap
    percentiles would be biased upwards for small shares, because runs drawn twice explain each other.
    """
    rows = []
    rng = np.random.default_rng(seed)
    for setting in found.settings:
        runs = found.runs[(found.runs["setting"] == setting.name) & (found.runs["status"] == "completed")]
        runs = runs[runs[found.select].notna()] if found.select in runs else runs.iloc[:0]
        own = ["method", "placement", "allocation", "rank"]
        own += [key for arm in setting.arms[:1] for key in arm.factors if key not in own]
        own = list(_independent(runs, [key for key in varying(runs, own) if key in runs]))
        names = [*own, *(key for key in varying(runs, [*found.tuned, "seed"]) if key not in own)]
        if len(runs) < 4 or len(names) < 2:
            continue
        y, codes = runs[found.select].to_numpy(dtype=float), [_codes(runs[key]) for key in names]
        x, of_field = _design(codes)
        point = _shares(y, x, of_field)
        picks = rng.integers(0, len(y), (draws, min(len(y), 2000)))
        drawn = np.array([_shares(y[pick], x[pick], of_field) for pick in picks])
        half = special.ndtri(0.975) * drawn.std(axis=0, ddof=1) * (picks.shape[1] / len(y)) ** 0.5
        low, high = np.clip([point - half, point + half], 0, 1)
        for i, name in enumerate([*names, "interactions and noise"]):
            rows.append(
                {"setting": setting.name, "field": name, "importance": point[i], "low": low[i], "high": high[i]}
            )
    return pd.DataFrame(rows, columns=["setting", "field", "importance", "low", "high"])


def _design(codes: Sequence[NDArrayInt]) -> tuple[Array, NDArrayInt]:
    """Indicators of the levels of all fields but the first of each, after an intercept, and the field of each column
    (-1 of the intercept)."""
    designs = [np.eye(int(code.max()) + 1)[code][:, 1:] for code in codes]
    of_field = np.concatenate([[-1], *(np.full(one.shape[1], i) for i, one in enumerate(designs))]).astype(int)
    return np.column_stack([np.ones(len(codes[0])), *designs]), of_field


def _shares(y: Array, x: Array, of_field: NDArrayInt) -> Array:
    """Type II main-effect shares of the fields and the remainder, of rows of a `_design`."""
    count = int(of_field.max()) + 1
    y = y - y.mean()
    total = float(y @ y)
    if total == 0:
        return np.zeros(count + 1)
    gram, moment = x.T @ x, x.T @ y
    rss = _rest(gram, moment, total)
    without = [_rest(gram[np.ix_(kept, kept)], moment[kept], total) for kept in (of_field != i for i in range(count))]
    return np.array([*(max(one - rss, 0.0) / total for one in without), rss / total])


def _rest(gram: Array, moment: Array, total: float) -> float:
    """Residual sum of squares from the normal equations: hundreds of fits to thousands of rows need each row once."""
    present = np.diag(gram) > 0  # a draw need not have every level
    gram, moment = gram[np.ix_(present, present)], moment[present]
    try:
        factor = np.linalg.cholesky(gram)
        pivots = np.diag(factor) ** 2 / np.diag(gram)
    except np.linalg.LinAlgError:
        pivots = np.zeros(1)
    if pivots.min() < SINGULAR:
        return max(total - float(moment @ np.linalg.lstsq(gram, moment, rcond=SINGULAR)[0]), 0.0)
    half = solve_triangular(factor, moment, lower=True)
    return max(total - float(half @ half), 0.0)


SINGULAR = 1e-9
"""Share of a column that the columns before it do not explain, below which it says nothing of its own."""


def _codes(values: pd.Series) -> NDArrayInt:
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 8:
        values = pd.qcut(values, 6, duplicates="drop")
    codes: NDArrayInt = pd.factorize(values, use_na_sentinel=False)[0]
    return codes


def _chosen(found: Arrangement, metric: str) -> list[tuple[str, pd.DataFrame]]:
    runs = found.runs[found.runs["chosen"]]
    column = f"{found.split}.{metric}"
    runs = runs[runs[column].notna()] if column in runs else runs.iloc[:0]
    return [(str(name), group) for name, group in runs.groupby("setting")]


def _others(found: Arrangement) -> list[str]:
    """Factors that differ between arms besides placement and rank."""
    factors = list(found.arms[0].factors) if found.arms else []
    keys = [key for key in factors if key not in ("placement", "rank", "alpha")]
    return [key for key in keys if len({repr(arm.factors[key]) for arm in found.arms}) > 1]


def _factors(found: Arrangement, setting: str, runs: pd.DataFrame) -> pd.DataFrame:
    """A setting's factors that vary over these runs and are not determined by another, as text."""
    factors = next(list(arm.factors) for arm in found.arms if arm.setting == setting)
    keys = ["placement", "rank", *(key for key in factors if key not in ("placement", "rank"))]
    return _independent(runs, [key for key in keys if runs[key].nunique(dropna=False) > 1]).astype(str)


def _independent(runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The columns that no other column determines; of two equivalent ones, the first."""
    kept = list(keys)
    for key in reversed(keys):
        others = [other for other in kept if other != key]
        if any(runs.groupby(other, dropna=False)[key].nunique(dropna=False).max() <= 1 for other in others):
            kept.remove(key)
    return runs[kept]


def _dummies(values: pd.Series) -> Array:
    dummies: Array = pd.get_dummies(values, drop_first=True).to_numpy(dtype=float)
    return dummies


def _fit(y: Array, designs: Sequence[Array]) -> tuple[float, int]:
    """Residual sum of squares and rank of the least-squares fit with an intercept."""
    y = y - y.mean()  # so that a constant score has a sum of squares of exactly 0
    x = np.column_stack([np.ones(len(y)), *designs])
    solution, _, rank, _ = np.linalg.lstsq(x, y)
    rest = y - x @ solution
    return float(rest @ rest), int(rank)
