"""What the adapter of one task does on another: its rows sent through the blocks of that task's path."""

import pandas as pd

from . import stats
from .arms import Arrangement
from .stats import Draws

COLUMNS = ["model", "arm", "adapter", "task", "seeds", "nll", "rise", "rise_low", "rise_high"]
THROUGH = "through."  # begins the columns of NLLs by task and by whose blocks


def table(found: Arrangement, *, draws: Draws) -> pd.DataFrame:
    """One row per model, arm, task and whose adapter its test examples went through: NLL in nats a token.

    `rise` is how far it lies above that through the task's own adapter, with its interval over seeds.
    """
    rows = []
    for setting in found.settings:
        for arm in setting.arms:
            prefix = f"{THROUGH}{setting.dataset}."
            for column in (str(name) for name in arm.runs if str(name).startswith(prefix)):
                known = arm.runs[arm.runs[column].notna()]
                if known.empty:
                    continue
                rises = (known[column] - known["test.nll"]).to_numpy(dtype=float)
                one = stats.interval(rises[:, None], draws=draws)
                rows.append({
                    "model": setting.model, "arm": arm.label, "adapter": column.removeprefix(prefix),
                    "task": setting.dataset, "seeds": len(known), "nll": float(known[column].mean()),
                    "rise": one.estimate, "rise_low": one.low, "rise_high": one.high,
                })  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
