"""Which experts of a learnt gate the examples of each task go through (sharing=routed)."""

import numpy as np
import pandas as pd

from . import stats
from .arms import Arrangement
from .stats import Draws
from .together import BALANCE, GATE, TOLD_APART

COLUMNS = ["model", "arm", "task", "expert", "seeds", "gate", "low", "high", "told_apart", "balance"]


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm, task and expert: its mean gate over tokens, modules and test examples, with an interval
    over seeds.

    Experts of different seeds have nothing in common but their number, so those of a seed are put in the order of the
    task's gates, the most open first. `told_apart`: share of examples whose likeliest expert is their task's own.
    """
    rows = []
    for setting in found.settings:
        for arm in setting.arms:
            named = [column for column in arm.runs if str(column).startswith(f"{GATE}{setting.dataset}.")]
            runs = arm.runs[arm.runs[named].notna().all(axis=1)] if named else arm.runs.iloc[:0]
            if runs.empty:
                continue
            gates = np.sort(runs[named].to_numpy(dtype=float), axis=1)[:, ::-1]
            for place in range(len(named)):
                one = stats.interval(gates[:, [place]], draws=draws)
                rows.append({
                    "model": setting.model, "arm": arm.label, "task": setting.dataset, "expert": place + 1,
                    "seeds": len(runs), "gate": one.estimate, "low": one.low, "high": one.high,
                    "told_apart": float(runs[TOLD_APART].mean()), "balance": float(runs[BALANCE].mean()),
                })  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def by_expert(found: Arrangement) -> dict[str, pd.DataFrame]:
    """Arm -> mean gate by task (rows) and expert (columns) of its first seed."""
    arms: dict[str, dict[str, list[float]]] = {}
    for setting in found.settings:
        for arm in setting.arms:
            named = [column for column in arm.runs if str(column).startswith(f"{GATE}{setting.dataset}.")]
            runs = arm.runs[arm.runs[named].notna().all(axis=1)] if named else arm.runs.iloc[:0]
            if not runs.empty:
                first = runs.sort_values("seed").iloc[0]
                arms.setdefault(arm.label, {})[setting.dataset] = [float(first[column]) for column in named]
    return {arm: pd.DataFrame(tasks).T for arm, tasks in arms.items()}
