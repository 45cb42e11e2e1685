"""Which arms a figure shows, what they are called there, how they look, and which bear a dagger."""

import re
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from . import contrasts
from .analyse import Analysis
from .arms import BASE, FULL, higher_is_better, kinds
from .pareto import front
from .style import FADED, OTHERS, WHOLE, Look, looks
from .tables import DAGGER, daggers

Looks = Mapping[str, Look]
"""How each kind of arm is drawn."""

MOST_SETTINGS, MOST_ARMS, MOST_RANKED = 6, 30, 40
MOST_KINDS, BEST_KINDS = 10, 8
"""Kinds that have a look each; of more than these the best ones do, and the others are grey."""


def every(analysis: Analysis) -> pd.DataFrame:
    """The arms that were trained, with their kind as placement; `dagger` says whose hyperparameters are in doubt."""
    arms = analysis.arms[analysis.arms["arm"] != BASE]
    if arms.empty:
        return arms.assign(dagger=False)
    marks = daggers(analysis)
    doubted = [key in marks for key in zip(arms["setting"], arms["arm"], strict=True)]
    return arms.assign(placement=kinds(arms), dagger=pd.Series(doubted, index=arms.index, dtype=bool))


def trained(analysis: Analysis, metric: str) -> pd.DataFrame:
    """Those that have a metric, of the settings that are shown; `METRIC_low` and `METRIC_high` are the ends of the
    paired difference to the reference arm, about the arm's own mean (`contrasts.about`)."""
    arms = every(analysis)
    arms = arms[arms[metric].notna()] if metric in arms else arms.iloc[:0]
    if metric != analysis.metric:
        arms = front_by(arms, metric, "trainable_parameters")
    shown = sorted(arms["setting"].unique())[:MOST_SETTINGS]
    arms = arms[arms["setting"].isin(shown)].reset_index(drop=True)
    return contrasts.about(arms, analysis.tables["contrasts"], metric) if len(arms) else arms


def front_by(arms: pd.DataFrame, metric: str, cost: str) -> pd.DataFrame:
    """The arms with `on_front` of another metric or cost."""
    sign = -1.0 if higher_is_better(metric) else 1.0
    arms = arms.copy()
    for _, group in arms.groupby("setting"):
        losses = sign * group[metric].to_numpy(dtype=float)
        arms.loc[group.index, "on_front"] = front(group[cost].to_numpy(dtype=float), losses)
    return arms


def simplest(analysis: Analysis, arms: pd.DataFrame) -> pd.DataFrame:
    """One arm a kind and rank: the best where other factors make several."""
    best = arms.sort_values(analysis.metric, ascending=not higher_is_better(analysis.metric))
    return best.drop_duplicates(["placement", "rank"]).sort_index()


def of_simplest(analysis: Analysis, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the arms that `simplest` keeps, with kind and dagger of their arm: a line joins runs of one kind."""
    arms = trained(analysis, analysis.metric)
    parts = [simplest(analysis, group) for _, group in arms.groupby("setting")]
    kept = pd.concat(parts) if parts else arms
    kind_of = {(row["setting"], row["arm"]): (row["placement"], row["dagger"]) for row in kept.to_dict("records")}
    pairs = list(zip(runs["setting"], runs["arm"], strict=True))
    chosen = runs[pd.Series([pair in kind_of for pair in pairs], index=runs.index, dtype=bool)]  # of no runs, none
    found = [kind_of[pair] for pair in pairs if pair in kind_of]
    return chosen.assign(placement=[kind for kind, _ in found], dagger=[bool(dagger) for _, dagger in found])


def over_ranks(table: pd.DataFrame) -> bool:
    """Whether arms differ in rank alone: of methods at one rank each, only the methods do."""
    return bool((table.groupby(["setting", "placement"])["rank"].nunique() > 1).any())


def ranks_written(arms: pd.DataFrame) -> bool:
    """Whether ranks stand beside points: they differ, and there are not too many."""
    return over_ranks(arms) and most_of(arms) <= MOST_RANKED


def at_ranks(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[float]]:
    """Runs at up to three ranks, and these; where arms do not differ in rank alone all stand together at one."""
    ranks = _spread(sorted(runs["rank"].dropna().unique()))
    if not over_ranks(runs):
        return runs.assign(rank=0.0), [0.0]
    return runs[runs["rank"].isin(ranks)], ranks


def _spread(values: list[float], most: int = 3) -> list[float]:
    """The lowest, the middle and the highest of many."""
    return values if len(values) <= most else [values[0], values[len(values) // 2], values[-1]]


def best_kinds(analysis: Analysis) -> list[str]:
    """The kinds by their best arm, best first, on average over the settings; full fine-tuning is none of them."""
    arms, metric = every(analysis), analysis.metric
    arms = arms[arms["placement"] != FULL]
    if metric not in arms:
        return list(arms["placement"].drop_duplicates())
    loss = arms[metric].astype(float) * (-1.0 if higher_is_better(metric) else 1.0)
    best = loss.groupby([arms["setting"], arms["placement"]], sort=False).min().unstack(level=0)
    place = best.rank(na_option="bottom").mean(axis=1)
    return [str(name) for name in place.sort_values(kind="stable").index]


def all_looks(analysis: Analysis) -> dict[str, Look]:
    """The look of each kind of the study, which is the same in all its figures and in the report."""
    names = best_kinds(analysis)
    own = names if len(names) <= MOST_KINDS else names[:BEST_KINDS]
    found = looks(own) | {name: FADED for name in names if name not in own}
    return found | ({FULL: WHOLE} if (every(analysis)["placement"] == FULL).any() else {})


def looks_of(analysis: Analysis, table: pd.DataFrame) -> dict[str, Look]:
    """The looks of the kinds in a table."""
    present = {str(name) for name in table["placement"]}
    return {name: look for name, look in all_looks(analysis).items() if name in present}


def in_doubt(table: pd.DataFrame, look: Looks) -> tuple[set[str], pd.DataFrame]:
    """The entries of a legend all of whose arms bear a dagger, which then bears it for them, and the table with
    `marked`: the arms that bear one themselves. Grey kinds share an entry; one kind alone has no legend.

    Args:
        table: with columns placement and dagger.
    """
    names = [OTHERS if look.get(str(kind)) == FADED else str(kind) for kind in table["placement"]]
    whole = table["dagger"].groupby(np.array(names, dtype=object)).all() if len(table) else pd.Series(dtype=bool)
    entries = {str(name) for name, all_of_it in whole.items() if all_of_it} if len(look) > 1 else set()
    return entries, table.assign(marked=table["dagger"] & np.array([name not in entries for name in names], dtype=bool))


def labels(arms: pd.DataFrame) -> pd.Series:
    """A short name of each arm: its kind and, where ranks differ, its rank; else its full label."""
    ranked = over_ranks(arms) & arms["rank"].notna()
    short = arms["placement"].where(~ranked, arms["placement"] + " r" + arms["rank"].map("{:g}".format))
    return short.where(~pd.DataFrame({"s": arms["setting"], "l": short}).duplicated(keep=False), arms["arm"])


def named(analysis: Analysis, setting: str) -> dict[str, tuple[str, str]]:
    """The kind and the short name, with its dagger, of each arm of a setting, by its label."""
    arms = every(analysis)
    arms = arms[arms["setting"] == setting]
    texts = labels(arms) + np.where(arms["dagger"], DAGGER, "") if len(arms) else labels(arms)
    return dict(zip(arms["arm"], zip(arms["placement"].astype(str), texts, strict=True), strict=True))


def last(names: dict[str, tuple[str, str]], among: Collection[str]) -> list[str]:
    """The last of the arms of each kind: that of the highest rank."""
    return list({names[label][0]: label for label in names if label in among}.values())


def settings(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table["setting"].drop_duplicates().sort_values()]


def ranked_arms(analysis: Analysis, metric: str) -> pd.DataFrame:
    """Every arm with its short name (`label`), best first."""
    arms = trained(analysis, metric)
    arms = arms.assign(label=labels(arms) + np.where(arms["dagger"], DAGGER, "")) if len(arms) else arms
    return arms.sort_values(metric, ascending=not higher_is_better(metric), kind="stable") if len(arms) else arms


def comparisons(analysis: Analysis) -> pd.DataFrame:
    """The tests between placements, and methods, with their names (`label`), in the order of the grid, or where a
    setting has more than `MOST_ARMS` by p, then by size of the difference, largest first."""
    tests = analysis.tables["tests"]
    tests = tests[(tests["metric"] == analysis.metric) & tests["family"].isin(("placement", "method"))]
    tests = tests[tests["low"].notna()]
    tests = tests[tests["setting"].isin(sorted(tests["setting"].unique())[:MOST_SETTINGS])]
    names = {name: named(analysis, str(name)) for name in tests["setting"].unique()}
    texts = [
        _difference(*(names[row["setting"]][row[side]][1] for side in ("b", "a"))) for row in tests.to_dict("records")
    ]
    tests = tests.assign(label=pd.Series(texts, index=tests.index, dtype=object))
    if len(tests) and tests.groupby("setting").size().max() > MOST_ARMS:
        tests = tests.assign(size=-tests["difference"].abs()).sort_values(["p_holm", "p", "size"], kind="stable")
    return tests


def _difference(minuend: str, subtrahend: str) -> str:
    """The name of a difference; a rank that both have stands once."""
    parts = [re.fullmatch(rf"(.*) (r[\d.]+)({DAGGER}?)", name) for name in (minuend, subtrahend)]
    if parts[0] is None or parts[1] is None or parts[0][2] != parts[1][2]:
        return f"{minuend} − {subtrahend}"
    return f"{parts[0][1]}{parts[0][3]} − {parts[1][1]}{parts[1][3]} {parts[0][2]}"


def first(table: pd.DataFrame, most: int = MOST_ARMS) -> pd.DataFrame:
    """The first rows of each setting."""
    return table.groupby("setting", sort=False).head(most)


def most_of(table: pd.DataFrame) -> int:
    """The rows of the setting that has most."""
    return int(table.groupby("setting").size().max()) if len(table) else 0


def uneven(analysis: Analysis, most: int = 4) -> dict[str, pd.DataFrame]:
    """Short name of an arm -> its modules, for arms of one setting whose modules differ in rank (of equal ranks one):
    of more than `most` the highest rank of each kind."""
    found = [arm for arm in analysis.found.arms if not pd.isna(arm.factors["rank"])]
    arms = [arm for arm in found if analysis.study.layouts.get(arm.runs["layout"].iloc[0])]
    arms = [arm for arm in arms if arm.setting == arms[0].setting]
    layouts = {arm.runs["layout"].iloc[0]: arm for arm in reversed(arms)}
    tables: dict[str, pd.DataFrame] = {}
    for layout, arm in layouts.items():
        table = pd.DataFrame(analysis.study.layouts[layout])
        table = table[table["layer"].notna()]
        if table["rank"].nunique() > 1:
            tables[arm.label] = table
    names = named(analysis, arms[0].setting) if arms else {}
    order = [label for label in names if label in tables]
    chosen = last(names, order) if len(order) > most else order
    return {names[label][1]: tables[label] for label in chosen[:most]}


def least_range(analysis: Analysis, arms: pd.DataFrame, metric: str) -> float:
    """The least width of the range of colours of one setting: the smallest difference that the study's own design finds
    in 80% of cases, or, where that is not known, the median length of the bars; 0 without either."""
    power = analysis.tables["power"]
    own = power[power["setting"].isin(arms["setting"]) & (power["metric"] == metric) & power["own_design"].astype(bool)]
    bars = (arms[f"{metric}_high"] - arms[f"{metric}_low"]).median()
    known = [float(value) for value in (own["detectable"].max(), bars) if np.isfinite(value) and value > 0]
    return known[0] if known else 0.0
