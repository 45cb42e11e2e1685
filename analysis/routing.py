"""What it costs that nobody names an example's task: scores through the blocks of the task it is taken for."""

import pandas as pd

from . import stats
from .arms import Arrangement
from .stats import Draws
from .together import RIGHT, ROUTED

COLUMNS = ["model", "arm", "task", "router", "seeds", "right", "metric", "known", "routed", "change", "low", "high"]


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm, task and metric: test scores where the task is known, and where it is not.

    `right` is the share of examples taken for the task they are of; `change` is routed less known, with its interval
    over seeds.
    """
    rows = []
    for setting in found.settings:
        for arm in setting.arms:
            for metric in found.metrics:
                column = f"{ROUTED}{setting.dataset}.{metric}"
                known = arm.runs[arm.runs[column].notna()] if column in arm.runs else arm.runs.iloc[:0]
                if known.empty:
                    continue
                changes = (known[column] - known[f"{found.split}.{metric}"]).to_numpy(dtype=float)
                one = stats.interval(changes[:, None], draws=draws)
                rows.append({
                    "model": setting.model, "arm": arm.label, "task": setting.dataset,
                    "router": known["router"].iloc[0], "seeds": len(known), "metric": metric,
                    "right": float(known[f"{ROUTED}{setting.dataset}.{RIGHT}"].mean()),
                    "known": float(known[f"{found.split}.{metric}"].mean()), "routed": float(known[column].mean()),
                    "change": one.estimate, "low": one.low, "high": one.high,
                })  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
