"""Validation scores on the way of a run: means over seeds with intervals. Letters: A arms, R seeds."""

import numpy as np
import pandas as pd

from . import seeds, stats
from .load import Study

COLUMNS = ["setting", "arm", "step", "mean", "low", "high", "seeds"]
LEAST_STEPS = 3
"""Scores on the way of a run, below which there is no curve: before and after are two."""


def validation(study: Study, runs: pd.DataFrame, metric: str = "nll") -> pd.DataFrame:
    """Mean validation score of each arm at each step that all of its seeds reached, with a 95% interval over seeds. The
    variance between seeds is pooled over arms of one setting and step that have the same seeds. All seeds are scored on
    the same examples, whose variance is not in it. Empty where no run was scored while it trained.

    Args:
        runs: with columns run_id, setting, arm, seed.
    """
    scores = study.evaluations(runs["run_id"])
    if scores.empty or metric not in scores:
        return pd.DataFrame(columns=COLUMNS)
    scores = scores[scores[metric].notna()].drop_duplicates(["run_id", "step"], keep="last")
    scores = scores[scores.groupby("run_id")["step"].transform("nunique") >= LEAST_STEPS]
    table = scores.merge(runs[["run_id", "setting", "arm", "seed"]], on="run_id")
    wide = table.pivot_table(index=["setting", "step", "arm"], columns="seed", values=metric)
    every = table.groupby("arm")["seed"].nunique()
    rows = []
    for (setting, step), group in wide.groupby(level=["setting", "step"]):
        by_seeds: dict[tuple[object, ...], list[tuple[str, np.ndarray]]] = {}
        for (_, _, arm), values in group.iterrows():
            known = values.dropna()
            if len(known) == every[arm]:
                by_seeds.setdefault(tuple(known.index), []).append((arm, known.to_numpy(dtype=float)))
        for same in by_seeds.values():
            shared = seeds.pooled(np.stack([x_R for _, x_R in same]), blocks=False)
            for i, (arm, x_R) in enumerate(same):
                one = stats.interval(x_R[:, None], seed_variance=shared[i] if shared else None)
                rows.append((setting, arm, step, one.estimate, one.low, one.high, len(x_R)))
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["setting", "arm", "step"], kind="stable")
