"""Which rank block spends how much rank where: what `adapters.py spectra` found of runs with blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper.record import SPECTRA, read_json, read_text

from . import stats
from .arms import Arm, Arrangement
from .stats import Draws

BY_BLOCK = ("block", "level", "name", "role", "layer", "rank", "update_norm", "effective_rank", "energy_share")
NUMBERS = ("rank", "update_norm", "effective_rank", "energy_share")
COLUMNS = [
    "model", "arm", "block", "role", "seeds", "ranks", "effective_rank", "low", "high", "used", "update_norm",
    "energy_share",
]  # fmt: skip
EVERY = "all"


def arms(found: Arrangement) -> Iterator[tuple[str, Arm, pd.DataFrame]]:
    """Model, arm and spectra of its runs by block and module; each once, though it is an arm of all its tasks."""
    seen: set[tuple[str, frozenset[str]]] = set()
    for setting in found.settings:
        for arm in setting.arms:
            key = setting.model, frozenset(str(run).partition("/")[0] for run in arm.runs["run_id"])
            if key in seen or "folder" not in arm.runs:
                continue
            seen.add(key)
            every = zip(arm.runs["run_id"], arm.runs["folder"], strict=True)
            parts = [read(folder).assign(run=run) for run, folder in every if isinstance(folder, str)]
            parts = [part for part in parts if len(part)]
            if parts:
                yield setting.model, arm, pd.concat(parts, ignore_index=True)


def read(folder: str) -> pd.DataFrame:
    """A row a block and module of a run folder; none where the run has no blocks, or nobody looked."""
    try:
        plain = read_json(read_text(Path(folder) / SPECTRA))
        rows: list[dict[str, Any]] = plain.get("blocks") or []
        found = pd.DataFrame(rows, columns=list(BY_BLOCK))
        return found.astype(dict.fromkeys(NUMBERS, float) | dict.fromkeys(("block", "role"), str))
    except (OSError, ValueError, TypeError, AttributeError):  # a broken file is named where the modules are read
        return pd.DataFrame(columns=list(BY_BLOCK))


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm, block and role (and all roles).

    `ranks` is what the block was given in a module on average, `effective_rank` the mean over modules of what its
    update spends of it, with its interval over seeds, `used` the share; `update_norm` the Frobenius norm over the
    modules and `energy_share` the share in the squared norms of all blocks, both means over seeds.
    """
    made = []
    for model, arm, every in arms(found):
        for block, of_block in every.groupby("block", sort=False):
            for role, part in [(EVERY, of_block), *of_block.groupby("role", sort=False)]:
                row = {"model": model, "arm": arm.label, "block": block, "role": role}
                made.append(row | _summary(part, draws))
    return pd.DataFrame(made, columns=COLUMNS)


def _summary(part: pd.DataFrame, draws: Draws) -> dict[str, Any]:
    runs = part.groupby("run", sort=False)
    spent = runs["effective_rank"].mean().to_numpy(dtype=float)
    one = stats.interval(spent[:, None], draws=draws)
    norms = runs["update_norm"].apply(lambda own: float((own**2).sum() ** 0.5))
    ranks = float(part["rank"].mean())
    return {
        "seeds": len(spent), "ranks": ranks, "effective_rank": one.estimate, "low": one.low, "high": one.high,
        "used": one.estimate / ranks, "update_norm": float(norms.mean()),
        "energy_share": float(runs["energy_share"].sum().mean()),
    }  # fmt: skip
