"""How much of what a task gains by itself it gains together with others.

Share = (base − together) / (base − alone), on the same test examples; 1 where nothing is lost. It is left out where the
task gains nothing by itself that is told from 0.
"""

import numpy as np
import pandas as pd

from . import compare
from .arms import Arrangement

COLUMNS = ["model", "arm", "metric", "task", "tasks", "share", "low", "high"]
MEAN, WORST = "mean", "worst"


def table(found: Arrangement) -> pd.DataFrame:
    """One row per arm, metric and task, with the interval of `compare.kept`; then the mean over an arm's tasks, whose
    interval takes tasks as independent, and its worst task. `tasks` counts those that have a share."""
    rows = [
        {"model": setting.model, "arm": pair.b.label, "metric": metric, "task": setting.dataset, "tasks": 1, **share}
        for setting in found.settings
        for pair in compare.from_alone(setting)
        for metric in found.metrics
        if (share := compare.kept(setting, pair.b, pair.a, metric)) is not None and not np.isnan(share["share"])
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    for (model, arm, metric), own in table.groupby(["model", "arm", "metric"], sort=False):
        half = float(np.sqrt(np.square(own["high"] - own["low"]).sum())) / 2 / len(own)
        mean, worst = float(own["share"].mean()), own.loc[own["share"].idxmin()]
        about = {"model": model, "arm": arm, "metric": metric, "tasks": len(own)}
        rows.append({**about, "task": MEAN, "share": mean, "low": mean - half, "high": mean + half})
        rows.append({**about, "task": f"{WORST}: {worst['task']}", **worst[["share", "low", "high"]].to_dict()})
    return pd.DataFrame(rows, columns=COLUMNS)
