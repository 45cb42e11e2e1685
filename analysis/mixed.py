"""A linear mixed model of the scores, on request: score ~ placement × rank + (1|seed) + (1|group), fitted by restricted
maximum likelihood (statsmodels). It asks one question of all arms at once where the tests ask one of each pair."""

import importlib.util
import warnings
from typing import Any

import numpy as np
import pandas as pd

from sweeper import installation

from .arms import Arrangement, Setting

COLUMNS = ["setting", "metric", "term", "estimate", "low", "high", "p", "rows", "level"]
MOST_ROWS = 3000


def require() -> None:
    """Says in one line what is missing.

    Raises:
        ModuleNotFoundError: statsmodels is not installed.
    """
    if importlib.util.find_spec("statsmodels") is None:
        raise ModuleNotFoundError(f"--mixed needs statsmodels: {installation.install('mixed')}")


def table(found: Arrangement, metric: str) -> pd.DataFrame:
    """Fixed effects by setting, with Wald intervals; factors that do not vary are left out, seeds and groups (or
    examples, where records name no groups) are crossed random intercepts.

    Rows are examples; above `MOST_ROWS` they are means of seed × group, which `level` says. Settings with one arm or
    one seed have no such model.
    """
    require()
    rows: list[dict[str, Any]] = []
    for setting in found.settings:
        cells, level = _cells(setting, metric)
        factors = [name for name in ("placement", "method", "rank") if name in cells and cells[name].nunique() > 1]
        if len(cells) and factors and cells["seed"].nunique() > 1:
            rows += [{"setting": setting.name, "metric": metric, **row, "level": level} for row in _fit(cells, factors)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _cells(setting: Setting, metric: str) -> tuple[pd.DataFrame, str]:
    """One row per arm, seed and example, or per arm, seed and group."""
    parts = []
    for arm in setting.arms:
        scores = arm.scores.get(metric)
        if scores is None or not scores.ids:
            continue
        R, E = scores.x_RE.shape
        parts.append(
            pd.DataFrame(
                {
                    "score": scores.x_RE.ravel(), "weight": np.tile(scores.w_E, R),
                    "seed": np.repeat([str(seed) for seed in scores.seeds], E),
                    "group": np.tile(scores.groups or scores.ids, R),
                    "placement": str(arm.factors["placement"]), "method": str(arm.factors.get("method")),
                    "rank": np.nan if pd.isna(arm.factors["rank"]) else float(arm.factors["rank"]),
                }
            )
        )  # fmt: skip
    if not parts:
        return pd.DataFrame(), ""
    cells = pd.concat(parts, ignore_index=True).dropna(subset=["rank"])
    if len(cells) <= MOST_ROWS:
        return cells, "example"
    keys = ["placement", "method", "rank", "seed", "group"]
    weighed = cells.assign(score=cells["score"] * cells["weight"]).groupby(keys, as_index=False)[["score", "weight"]]
    means = weighed.sum()
    return means.assign(score=means["score"] / means["weight"]), "seed × group"


def _fit(cells: pd.DataFrame, factors: list[str]) -> list[dict[str, Any]]:
    from statsmodels.regression.mixed_linear_model import MixedLM

    data = cells.assign(rank=np.log2(cells["rank"]), whole=1)
    names = [name if name == "rank" else f"C({name})" for name in factors]
    formula = f"score ~ {' * '.join(names)}"
    parts = {"seed": "0 + C(seed)", "group": "0 + C(group)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance at its boundary, 0, is an answer here
        fitted = MixedLM.from_formula(formula, groups="whole", re_formula="0", vc_formula=parts, data=data).fit()
    bounds = fitted.conf_int()
    return [
        {
            "term": _term(str(name)), "estimate": float(fitted.fe_params[name]), "low": float(bounds.loc[name, 0]),
            "high": float(bounds.loc[name, 1]), "p": max(float(fitted.pvalues[name]), 1e-300), "rows": len(cells),
        }
        for name in fitted.fe_params.index
    ]  # fmt: skip


def _term(name: str) -> str:
    text = name.replace("C(placement)[T.", "placement ").replace("C(method)[T.", "method ").replace("]", "")
    return text.replace(":", " × ").replace("rank", "rank, per doubling")
