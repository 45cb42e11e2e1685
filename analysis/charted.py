"""What charts show, a table each: the paper's figures draw from these and so does the report, so that the two agree.

A table has all that may be shown; a figure takes of it what fits on a page.
"""

from collections.abc import Iterable

import pandas as pd

from . import contrasts, curves, shown
from .analyse import Analysis

LEARNING_RATE = "optim.lr"
MOST_SEEDS = 5
"""Seeds of an arm whose curves are read."""


def arms(analysis: Analysis) -> pd.DataFrame:
    """Every trained arm of every setting with its kind (`placement`), short name (`label`) and `dagger`, and whether
    it is its kind's best at its rank (`simplest`); each metric between the ends of the paired difference to the
    reference arm (`contrasts.about`)."""
    table = shown.every(analysis)
    table = table.assign(label=shown.labels(table)) if len(table) else table.assign(label=None)
    kept = [shown.simplest(analysis, group).index for _, group in table.groupby("setting")]
    table = table.assign(simplest=table.index.isin([i for index in kept for i in index]))
    for metric in [name for name in (*analysis.found.metrics, contrasts.FORGETTING) if name in table]:
        about = contrasts.about(table, analysis.tables["contrasts"], metric)
        ends = [f"{metric}_low", f"{metric}_high"]
        table = table.assign(**{end: about[end] for end in ends})
        if metric == analysis.metric:
            table = table.assign(differs=about["differs"], is_reference=about["is_reference"])
    return table


def learning_rates(analysis: Analysis) -> pd.DataFrame | str:
    """Validation scores by learning rate, a row a run: setting, arm, placement, rank, lr, value, mean (of the arm's
    seeds at that rate), chosen, dagger. Or why there is none."""
    found = analysis.found
    runs = found.runs
    if LEARNING_RATE not in found.tuned or found.select not in runs:
        return "every run has the same learning rate"
    runs = runs[(runs["status"] == "completed") & runs[found.select].notna() & (runs["source"] == "study")]
    runs = shown.of_simplest(analysis, runs)
    if runs.empty:
        return f"no run has a score on {found.select.split('.')[0]}"
    runs = runs.assign(lr=runs[LEARNING_RATE], value=runs[found.select])
    return runs.assign(mean=runs.groupby(["setting", "arm", "lr"])["value"].transform("mean"))


def on_the_way(analysis: Analysis) -> pd.DataFrame:
    """The chosen runs whose curves may be shown, up to `MOST_SEEDS` an arm."""
    runs = analysis.found.runs
    runs = runs[runs["chosen"] & runs["folder"].notna()] if "folder" in runs else runs.iloc[:0]
    runs = shown.of_simplest(analysis, runs)
    return runs.groupby(["setting", "placement", "rank"], dropna=False).head(MOST_SEEDS)


def training_curves(analysis: Analysis, runs: pd.DataFrame) -> pd.DataFrame | str:
    """Smoothed training loss of each arm, mean over its runs with their range: setting, arm, placement, rank, dagger,
    step, mean, low, high. Or why there is none.

    Args:
        runs: of `on_the_way`.
    """
    table = analysis.study.curves(runs["run_id"])
    if table.empty:
        return "no run left a training curve"
    table = table.merge(runs[["run_id", "setting", "arm"]], on="run_id")
    parts = []
    for (setting, arm), group in table.groupby(["setting", "arm"], sort=False):
        wide = group.pivot_table(index="step", columns="run_id", values="loss")
        smooth = wide.ewm(span=max(2, len(wide) / 15)).mean()
        means = {"mean": smooth.mean(axis=1), "low": smooth.min(axis=1), "high": smooth.max(axis=1)}
        parts.append(pd.DataFrame(means).reset_index().assign(setting=setting, arm=arm))
    return _of_arms(pd.concat(parts, ignore_index=True), runs)


def validation_curves(analysis: Analysis, runs: pd.DataFrame) -> pd.DataFrame | str:
    """Validation NLL of each arm while it trains, columns as of `training_curves`."""
    table = curves.validation(analysis.study, runs)
    if table.empty:
        return "no run was scored on validation while it trained (evaluation.every_steps)"
    return _of_arms(table, runs)


def _of_arms(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    names = runs.drop_duplicates(["setting", "arm"])[["setting", "arm", "placement", "rank", "dagger"]]
    return table.merge(names, on=["setting", "arm"])


def thinned(table: pd.DataFrame, most: int, by: Iterable[str] = ("setting", "arm")) -> pd.DataFrame:
    """At most so many rows of each curve, its first and last among them."""
    place = table.groupby([*by]).cumcount()
    last = table.groupby([*by])["step"].transform("size") - 1
    step = ((last + most - 1) // max(most - 1, 1)).clip(lower=1)
    return table[(place % step == 0) | (place == last)]
