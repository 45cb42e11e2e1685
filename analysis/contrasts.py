"""Differences of all arms of a setting to one reference arm, which the figures draw as bars.

The interval of an arm's own score contains the variance of the evaluation examples, which all arms share, so that bars
of arms that surely differ overlap. The interval of a paired difference does not contain it. The reference is chosen
without a look at the scores: of the plain LoRA arms (of all where there are none), uniform before allocated, the one
that trains most parameters.
"""

import numpy as np
import pandas as pd

from . import compare
from .arms import FULL, Arm, Arrangement, Scores, Setting, pool

FAMILY = "reference arm"
FORGETTING = "forgetting"


def reference(setting: Setting, metric: str) -> Arm | None:
    """The arm that the others of a setting are compared with; None where none has the metric."""
    arms = [arm for arm in setting.arms if metric in arm.scores and arm.factors["placement"] != FULL]
    for key, plain in (("method", "lora"), ("allocation", "uniform")):
        arms = [arm for arm in arms if arm.factors.get(key) == plain] or arms
    sizes = [-np.inf if np.isnan(arm.parameters) else arm.parameters for arm in arms]
    return arms[int(np.argmax(sizes))] if arms else None


def references(found: Arrangement, metric: str) -> dict[str, str]:
    """Setting -> label of its reference arm, of settings that have one."""
    chosen = {setting.name: reference(setting, metric) for setting in found.settings}
    return {name: arm.label for name, arm in chosen.items() if arm is not None}


def table(found: Arrangement, metric: str) -> pd.DataFrame:
    """Paired differences arm (b) − reference (a) of every metric and of forgetting, on shared seeds and examples, with
    95% intervals and p Holm-corrected over the arms of all settings (`p_holm`). Columns: `compare.TEST_COLUMNS`.

    Args:
        metric: which an arm must have to be the reference.
    """
    rows = []
    for setting in found.settings:
        chosen = reference(setting, metric)
        if chosen is None:
            continue
        scores = {name: {arm.label: arm.scores.get(name) for arm in setting.arms} for name in found.metrics}
        scores[FORGETTING] = dict(_forgetting(setting))
        for name, by_arm in scores.items():
            for label, mine in by_arm.items():
                tested = compare.tested(by_arm.get(chosen.label), mine, name) if label != chosen.label else None
                if tested is not None:
                    names = {"setting": setting.name, "metric": name, "family": FAMILY}
                    rows.append({**names, "a": chosen.label, "b": label, **tested})
    return compare.corrected(pd.DataFrame(rows, columns=compare.TEST_COLUMNS))


def _forgetting(setting: Setting) -> dict[str, Scores]:
    """The rise of NLL elsewhere of each arm, by seed; variances between seeds are pooled over the arms."""
    found = {}
    for arm in setting.arms:
        runs = arm.runs[arm.runs[FORGETTING].notna()] if FORGETTING in arm.runs else arm.runs.iloc[:0]
        if len(runs):
            values = runs[FORGETTING].to_numpy(dtype=float)
            found[arm.label] = Scores(x_RE=values[:, None], w_E=np.ones(1), seeds=tuple(runs["seed"]), ids=())
    pool(list(found.values()))
    return found


def about(arms: pd.DataFrame, contrasts: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The arms with `METRIC_low` and `METRIC_high` put where the interval of the paired difference lies about the arm's
    mean; NaN of the reference, and of arms that cannot be paired with it. Columns besides: `differs` (significant after
    Holm's correction) and `is_reference`.

    Args:
        arms: with columns setting, arm and the metric.
        contrasts: of `table`.
    """
    mine = contrasts[contrasts["metric"] == metric].set_index(["setting", "b"])
    keys = pd.MultiIndex.from_frame(arms[["setting", "arm"]])
    found = mine.reindex(keys)
    arms = arms.assign(
        differs=(found["significant"] == True).to_numpy(),  # noqa: E712 - missing pairs are NaN
        is_reference=keys.isin(pd.MultiIndex.from_frame(mine.reset_index()[["setting", "a"]])),
    )
    for side in ("low", "high"):
        arms[f"{metric}_{side}"] = arms[metric] + (found[side] - found["difference"]).to_numpy(dtype=float)
    return arms
