"""What tasks that are learnt one after another do to one another: average, forgetting and transfer.

With R[i, j] the score of task j after i tasks, P tasks, and higher scores better (NLL counts negative):

average     mean over j of R[P, j]
backward    mean over j < P of R[P, j] - R[j, j]: what later tasks changed (Lopez-Paz & Ranzato 2017)
forward     mean over j > 1 of R[j - 1, j] - R[0, j]: what earlier tasks gave, before a task is learnt (the same)
forgetting  mean over j < P of the best R[i, j] before the last task, less R[P, j] (Chaudhry et al. 2018)
learning    mean over j of R[j, j] - R[0, j]: what is gained of a task over the base model while it is learnt
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sweeper.record import METRICS

from . import pareto, stats
from .arms import Arrangement, higher_is_better
from .stats import Array, Draws
from .together import FIELD, ORDER, THEN

MEASURES = ("average", "backward", "forward", "forgetting", "learning")
COLUMNS = [
    "model", "arm", "metric", "tasks", "orders", "seeds",
    *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")), "on_front",
]  # fmt: skip


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm and metric: the measures with intervals over replicates, which are seeds and orders.

    Orders of the same tasks are one arm. Where there are several, an interval is over the orders' means, for seeds of
    one order are no fresh sample of orders. `on_front`: no other arm of the model learns more and forgets less.
    """
    rows = []
    for (model, arm), runs in sequences(found).items():
        for metric in found.metrics:
            by_order: dict[str, list[dict[str, float]]] = {}
            for order, folder in runs:
                scores_SP = matrix(folder, order.split(THEN), metric, split=found.split)
                if scores_SP is not None:
                    by_order.setdefault(order, []).append(measures(scores_SP, metric))
            if by_order:
                rows.append({"model": model, "arm": arm, "metric": metric, **_summary(by_order, draws)})
    return _with_fronts(pd.DataFrame(rows, columns=COLUMNS))


def _with_fronts(table: pd.DataFrame) -> pd.DataFrame:
    found = table.assign(on_front=False)
    for _, group in table.groupby(["model", "metric"]):
        forgotten, learnt = (group[name].to_numpy(dtype=float) for name in ("forgetting", "learning"))
        found.loc[group.index, "on_front"] = pareto.front(forgotten, -learnt)
    return found


def measures(scores_SP: Array, metric: str) -> dict[str, float]:
    """The measures of one run.

    Args:
        scores_SP: scores of P tasks before training and after each of them, S = P + 1.
    """
    sign = 1.0 if higher_is_better(metric) else -1.0
    good_SP = sign * np.asarray(scores_SP, dtype=float)
    last = good_SP.shape[1]
    before, at_once = good_SP[:-1], np.array([good_SP[j + 1, j] for j in range(last)])
    return {
        "average": float(sign * good_SP[last].mean()),
        "backward": float((good_SP[last] - at_once)[:-1].mean()),
        "forward": float(np.mean([good_SP[j, j] - good_SP[0, j] for j in range(1, last)])),
        "forgetting": float((before[1:, :-1].max(0) - good_SP[last, :-1]).mean()),
        "learning": float((at_once - good_SP[0]).mean()),
    }


def matrix(folder: Path, tasks: Sequence[str], metric: str, *, split: str) -> Array | None:
    """Scores of each task before training and after each of them [S, P]; None where the run does not have them all."""
    found: dict[str, dict[int, float]] = {task: {} for task in tasks}
    for row in _lines(folder):
        name, _, task = str(row.get("split")).partition("/")
        if name == split and task in found and row.get(metric) is not None:
            found[task][int(row["step"])] = float(row[metric])
    steps = sorted(set.intersection(*(set(own) for own in found.values()))) if found else []
    if len(steps) != len(tasks) + 1:
        return None
    return np.array([[found[task][step] for task in tasks] for step in steps])


def curve(folder: Path, tasks: Sequence[str], metric: str, *, split: str) -> pd.DataFrame:
    """Scores of each task over the steps of a run: step, task, value."""
    rows = [
        {"step": int(row["step"]), "task": task, "value": float(row[metric])}
        for row in _lines(folder)
        for task in tasks
        if row.get("split") == f"{split}/{task}" and row.get(metric) is not None
    ]
    return pd.DataFrame(rows, columns=["step", "task", "value"])


def sequences(found: Arrangement) -> dict[tuple[str, str], list[tuple[str, Path]]]:
    """Model and arm, whatever the order of its tasks -> that order and the folder of each of its runs."""
    arms: dict[tuple[str, str], dict[Path, str]] = {}
    for setting in found.settings:
        for arm in setting.arms:
            runs = arm.runs[arm.runs[ORDER].notna()] if ORDER in arm.runs else arm.runs.iloc[:0]
            if runs.empty:
                continue
            label = " ".join(arm.label.replace(f"{FIELD}={runs[FIELD].iloc[0]}", "").split())
            own = arms.setdefault((setting.model, label), {})
            own |= {Path(folder): str(order) for folder, order in zip(runs["folder"], runs[ORDER], strict=True)}
    return {key: [(order, folder) for folder, order in own.items()] for key, own in arms.items()}


def _summary(by_order: Mapping[str, Sequence[Mapping[str, float]]], draws: Draws) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tasks": len(next(iter(by_order)).split(THEN)), "orders": len(by_order),
        "seeds": max(len(runs) for runs in by_order.values()),
    }  # fmt: skip
    for name in MEASURES:
        means = [float(np.mean([run[name] for run in runs])) for runs in by_order.values()]
        values = means if len(means) > 1 else [run[name] for run in next(iter(by_order.values()))]
        one = stats.interval(np.array(values)[:, None], draws=draws)
        row |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
    return row


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    """Scores on the way of a run; none where there is no curve, or a damaged one."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        return [row for line in lines if '"split"' in line and "split" in (row := json.loads(line))]
    except (OSError, ValueError):
        return []
