"""How each arm was searched: what was tried, how far, what was chosen, and what the search may have missed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special

from sweeper.record import SEARCHES, read_json, read_text

from .arms import Arm, Arrangement, higher_is_better
from .load import Problem

Note = Callable[[Problem], None]

RATE = "optim.lr"
LEAST_RATES = 4
NEAR = 1.0
"""Log10 of the rate: trials this near to the chosen one say how good it is."""


def judge(found: Arrangement) -> None:
    """Adds to each arm's doubts what its trials say against the choice: a pruned trial beside it, and a rate that a fit
    says is better by more than half a standard deviation between seeds, and by more than the fit's own error."""
    by_arm = _by_arm(found)
    for arm in found.arms:
        runs = _tried(by_arm[arm.setting, arm.label])
        chosen = arm.trial.get(RATE)
        if (runs["status"] == "pruned").any() and _beside(runs, chosen):
            arm.search_doubts.append("a pruned trial lies beside the chosen one")
        missed = miss(runs[runs["status"] == "completed"], chosen, found.select)
        scores = arm.scores.get(found.select.removeprefix("validation."))
        spread = scores.seed_variance.variance**0.5 if scores is not None and scores.seed_variance is not None else 0.0
        if missed and missed["miss_low"] > 0 and missed["miss"] > spread / 2:
            arm.search_doubts.append(f"a rate near {missed['best_rate']:.2g} may be better")


def table(found: Arrangement, note: Note = lambda problem: None) -> pd.DataFrame:
    """One row per arm: the selected values, its trials (`whole`: trained to their end; `followed`: the least steps that
    one of the others was), how often its space was widened, and what weakens the choice (`doubts`).

    `miss` is how much better the best learning rate of a parabola through the whole trials is than the chosen one, in
    the metric's units, with a 95% interval; from `LEAST_RATES` rates within a factor of ten of the chosen one on.
    """
    searches = _searches(found.runs, note)
    by_arm = _by_arm(found)
    rows = [_row(found, arm, by_arm[arm.setting, arm.label], searches) for arm in found.arms]
    columns = [
        "setting", "arm", "trials", "whole", *found.tuned, found.select, "best_rate", "miss", "miss_low", "miss_high",
        "followed", "widened", "edge", "confirmed", "doubts",
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    empty = [name for name in ("best_rate", "miss", "miss_low", "miss_high", "followed") if frame[name].isna().all()]
    return frame.drop(columns=empty)


def _by_arm(found: Arrangement) -> dict[tuple[str, str], pd.DataFrame]:
    """Runs of each (setting, arm), with the columns that tell how it was searched."""
    wanted = ("status", "steps", "trial", "search.arm", "search.purpose", "search.widened", RATE, found.select)
    columns = [key for key in dict.fromkeys(wanted) if key in found.runs]
    return {(str(keys[0]), str(keys[1])): rows for keys, rows in found.runs.groupby(["setting", "arm"])[columns]}


def _tried(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of an arm's trials, without those that confirm its choice."""
    return runs if "search.purpose" not in runs else runs[runs["search.purpose"] != "confirm"]


def _searches(runs: pd.DataFrame, note: Note) -> dict[str, dict[str, Any]]:
    """What the studies' searches wrote of themselves, by the arm's key; a file that cannot be read is noted."""
    folders = runs["folder"].dropna() if "folder" in runs else []
    found: dict[str, dict[str, Any]] = {}
    for study in sorted({Path(folder).parent for folder in folders if isinstance(folder, str)}):
        if not (study / SEARCHES).is_file():
            continue
        try:
            told = read_json(read_text(study / SEARCHES))
            if not (isinstance(told, dict) and all(isinstance(one, dict) for one in told.values())):
                raise ValueError("no mapping of arms")
            if not all(isinstance(one.get("widened", 0), int) for one in told.values()):
                raise ValueError("widened is no whole number")
        except (OSError, ValueError) as error:
            note(Problem(folder=str(study), kind="broken searches", message=f"{SEARCHES}: {error}"))
            continue
        found |= told
    return found


def _row(
    found: Arrangement, arm: Arm, everything: pd.DataFrame, searches: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    runs = _tried(everything)
    keys = everything["search.arm"].dropna().unique() if "search.arm" in everything else []
    told = [searches[key]["widened"] for key in keys if "widened" in searches.get(key, {})]
    if "search.widened" in everything:
        told += list(everything["search.widened"].dropna())
    whole = runs[runs["status"] == "completed"]
    cut = runs[runs["status"] == "pruned"]
    row: dict[str, Any] = {
        "setting": arm.setting, "arm": arm.label, "trials": arm.tried, "whole": int(whole["trial"].nunique()),
        **arm.trial,
        found.select: float(arm.runs[found.select].mean()) if found.select in arm.runs else np.nan,
        "followed": float(cut["steps"].min()) if len(cut) else np.nan,
        "widened": int(max(told, default=0)),
        "edge": ", ".join(f"{key} {side}" for key, side in arm.edges.items()),
        "confirmed": "on fresh seeds" if arm.confirmed else "",
    }  # fmt: skip
    row |= miss(whole, arm.trial.get(RATE), found.select)
    return row | {"doubts": "; ".join(arm.doubts)}


def _beside(runs: pd.DataFrame, chosen: Any) -> bool:
    """Whether a rate next to the chosen one has no whole trial."""
    if not isinstance(chosen, float) or RATE not in runs:
        return False
    rates = np.sort(runs[RATE].dropna().unique())
    whole = set(runs.loc[runs["status"] == "completed", RATE])
    place = int(np.searchsorted(rates, chosen))
    return any(rates[i] not in whole for i in (place - 1, place + 1) if 0 <= i < len(rates))


def miss(whole: pd.DataFrame, chosen: Any, column: str) -> dict[str, float]:
    """The best rate of a parabola in log rate, and what the chosen one lacks there, with its 95% delta-method interval.
    Empty where there are too few rates, or where the parabola has no best."""
    if not isinstance(chosen, float) or column not in whole or RATE not in whole:
        return {}
    known = whole[whole[RATE].notna() & whole[column].notna()]
    x = np.log10(known[RATE].to_numpy(dtype=float) / chosen)
    y = known[column].to_numpy(dtype=float) * (-1.0 if higher_is_better(column) else 1.0)
    near = np.abs(x) <= NEAR + 1e-9
    x, y = x[near], y[near]
    if len(np.unique(x.round(9))) < LEAST_RATES:
        return {}
    fitted, covariance = optimize.curve_fit(_parabola, x, y, p0=np.polyfit(x, y, 2))
    a, b, _ = fitted
    if not a > 0:
        return {}
    best = float(np.clip(-b / (2 * a), x.min(), x.max()))
    gain = float(b**2 / (4 * a)) if best == -b / (2 * a) else float(-(a * best**2 + b * best))
    slope = np.array([-(best**2), -best, 0.0])  # of the gain by a, b and c, the best rate held
    half = float(special.stdtrit(len(x) - 3, 0.975)) * float(slope @ covariance @ slope) ** 0.5
    if not np.isfinite(half):
        return {}
    return {
        "best_rate": float(chosen * 10**best),
        "miss": gain,
        "miss_low": max(gain - half, 0.0),
        "miss_high": gain + half,
    }


def _parabola(x: np.ndarray[Any, Any], a: float, b: float, c: float) -> np.ndarray[Any, Any]:
    return a * x**2 + b * x + c
