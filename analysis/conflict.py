"""How the gradients of a run's tasks lie to one another while it trains: cosines by pair, role and layer.

A cosine below 0 means that a step along one task's gradient raises the other's loss, to first order. Every run is one
replicate: its cosines are averaged first, over the steps at which they were taken and the modules that are looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from sweeper.record import RECORD, read_json, read_text

from . import stats
from .arms import Arm, Arrangement
from .stats import Draws
from .together import COMPARED

ADAPTER, EVERY = "whole adapter", "all pairs"
COLUMNS = ["model", "arm", "pair", "role", "seeds", "cosine", "low", "high", "negative", "start", "end"]
BY_LAYER = ["model", "arm", "role", "layer", "seeds", "cosine", "low", "high", "negative"]
LONG = ["run", "step", "pair", "role", "layer", "cosine"]


def arms(found: Arrangement) -> Iterator[tuple[str, Arm]]:
    """Model and arm of runs whose tasks' gradients were compared; each once, though it is an arm of all its tasks."""
    seen: set[tuple[str, frozenset[str]]] = set()
    for setting in found.settings:
        for arm in setting.arms:
            if COMPARED not in arm.runs or arm.runs[COMPARED].isna().all():
                continue
            key = setting.model, frozenset(str(run).partition("/")[0] for run in arm.runs["run_id"])
            if key not in seen:
                seen.add(key)
                yield setting.model, arm


def rows(arm: Arm) -> pd.DataFrame:
    """Every cosine of an arm's runs: run, step, pair, role (`ADAPTER`: over all modules at once), layer, cosine."""
    runs = zip(arm.runs["run_id"], arm.runs["folder"], strict=True)
    parts = [part for run, folder in runs if len(part := _of_run(str(run), _read(folder)))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=LONG)


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm, pair of tasks (and all pairs) and role (and the whole adapter).

    `cosine` is the mean over steps and modules with its interval over seeds, `negative` the share of cosines below 0,
    `start` and `end` the means at the first and the last step that was looked at.
    """
    made = []
    for model, arm in arms(found):
        every = rows(arm)
        several = every["pair"].nunique() > 1
        for pair, of_pair in [*([(EVERY, every)] if several else []), *every.groupby("pair", sort=False)]:
            for role, part in of_pair.groupby("role", sort=False):
                row = {"model": model, "arm": arm.label, "pair": pair, "role": role, **_summary(part, draws)}
                by_step = part.groupby("step")["cosine"].mean()
                made.append(row | {"start": float(by_step.iloc[0]), "end": float(by_step.iloc[-1])})
    return pd.DataFrame(made, columns=COLUMNS)


def by_layer(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm, role and layer: the mean over pairs and steps, as in `table`."""
    made = []
    for model, arm in arms(found):
        inside = rows(arm)
        inside = inside[inside["layer"].notna()]
        for (role, layer), part in inside.groupby(["role", "layer"], sort=False):
            made.append(
                {"model": model, "arm": arm.label, "role": role, "layer": int(cast(float, layer))}
                | _summary(part, draws)
            )
    return pd.DataFrame(made, columns=BY_LAYER)


def over_training(arm: Arm) -> pd.DataFrame:
    """Cosines over the whole adapter by step: pair, step, and the mean, low and high over an arm's runs.

    The interval is over seeds, and none where there is one.
    """
    whole = rows(arm)
    whole = whole[whole["role"] == ADAPTER]
    made = []
    for (pair, step), part in whole.groupby(["pair", "step"], sort=False):
        one = stats.interval(part["cosine"].to_numpy(dtype=float)[:, None])
        low, high = _within(one)
        made.append({"pair": pair, "step": step, "cosine": one.estimate, "low": low, "high": high})
    return pd.DataFrame(made, columns=["pair", "step", "cosine", "low", "high"])


def _summary(part: pd.DataFrame, draws: Draws) -> dict[str, Any]:
    by_run = part.groupby("run", sort=False)["cosine"].mean()
    one = stats.interval(by_run.to_numpy(dtype=float)[:, None], draws=draws)
    low, high = _within(one)
    found: dict[str, Any] = {"seeds": len(by_run), "cosine": one.estimate, "low": low, "high": high}
    return found | {"negative": float((part["cosine"] < 0).mean())}


def _within(one: stats.Interval) -> tuple[float, float]:
    """The ends of an interval of a cosine."""
    low, high = np.clip([one.low, one.high], -1.0, 1.0)
    return float(low), float(high)


def _of_run(run: str, record: Mapping[str, Any]) -> pd.DataFrame:
    conflict = record.get("conflict") or {}
    try:
        steps = [int(step) for step in conflict["steps"]]
        pairs = [" × ".join(pair) for pair in conflict["pairs"]]
        found = _long(conflict["adapter"], steps, pairs, ADAPTER, None)
        for module in record["modules"]:
            own = conflict["modules"].get(module["name"])
            if own is not None:
                found += _long(own["cosine"], steps, pairs, module["role"], module["layer"])
    except (KeyError, TypeError, ValueError):
        return pd.DataFrame(columns=LONG)
    return pd.DataFrame(found, columns=LONG[1:]).assign(run=run)[LONG]


def _long(
    cosines_SP: Sequence[Sequence[float | None]], steps: Sequence[int], pairs: Sequence[str], role: str,
    layer: int | None,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """Rows of cosines by step and pair, without those of tasks that share nothing."""
    return [
        (step, pair, role, np.nan if layer is None else layer, float(value))
        for step, own in zip(steps, cosines_SP, strict=True)
        for pair, value in zip(pairs, own, strict=True)
        if value is not None and np.isfinite(value)
    ]


def _read(folder: Any) -> Mapping[str, Any]:
    """A run's record as plain data; empty where it has none that can be read."""
    try:
        plain = read_json(read_text(Path(folder) / RECORD))
    except (OSError, ValueError, TypeError):
        return {}
    return plain if isinstance(plain, dict) else {}
