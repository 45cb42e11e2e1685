"""The paper's figures: which there are, what each needs, and how they are laid out and saved."""

import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from analysis import aggregate, captions, draw, manifest
from analysis.analyse import Analysis
from analysis.arms import BASE, FULL, higher_is_better, kinds
from analysis.pareto import front
from analysis.style import COLUMN, GREY, TEXT, Look, looks, styled
from analysis.tables import number, title

Maker = Callable[[Analysis], Figure | str]
"""Makes a figure, or says why the study has no data for it."""

MOST_SETTINGS, MOST_ARMS = 6, 30
LEAST_TASKS = 3  # of a profile, whose bands say little over two
PANEL_HEIGHT = 1.95


def pareto(analysis: Analysis, metric: str, cost: str = "trainable_parameters") -> Figure | str:
    """Cost against the metric, with the front."""
    arms = _trained(analysis, metric)
    if cost not in arms or arms[cost].isna().all():
        return f"no run has {cost}" + (" (solo calibration was off)" if "solo" in cost else "")
    arms = arms[arms[cost] > 0]
    if cost != "trainable_parameters":
        arms = _front_by(arms, metric, cost)
    label = {"train_seconds_solo": "training time alone (s)", "trainable_parameters": "trainable parameters"}
    look = _looks(analysis, arms)
    figure, axes = _panels(_names(arms))
    for name, ax in axes.items():
        draw.scatter(ax, arms[arms["setting"] == name], metric, cost, look)
        ax.set_xlabel(label.get(cost, cost))
        _base_note(ax, analysis, name, metric)
    _finish(figure, axes, look, _axis(analysis, metric), lines=False)
    figure.draw_without_rendering()  # the layout decides how far apart points are
    for name, ax in axes.items() if _over_ranks(arms) else ():
        draw.rank_labels(ax, arms[arms["setting"] == name], metric, cost, higher=higher_is_better(metric))
    return figure


def every_arm(analysis: Analysis, metric: str) -> Figure | str:
    """Every arm with its interval, best first, up to `MOST_ARMS` a panel."""
    arms = _trained(analysis, metric)
    if arms.groupby("setting").size().max() < 2:
        return "fewer than two arms"
    arms = arms.assign(label=_labels(arms)).sort_values(metric, ascending=not higher_is_better(metric), kind="stable")
    arms = arms.groupby("setting").head(MOST_ARMS)
    rows = int(arms.groupby("setting").size().max())
    figure, axes = _panels(_names(arms), height=0.45 + 0.135 * rows)
    for name, ax in axes.items():
        draw.dots(ax, arms[arms["setting"] == name], metric)
        _shorten(ax)
        ax.set_xlabel(_axis(analysis, metric))
    _finish(figure, axes, {}, "")
    return figure


def rank_curves(analysis: Analysis, metric: str) -> Figure | str:
    """The metric against rank, a line a placement (or method)."""
    arms = _trained(analysis, metric)
    if not _over_ranks(arms):
        return "no arms differ in rank alone"
    look = _looks(analysis, arms)
    figure, axes = _panels(_names(arms))
    for name, ax in axes.items():
        draw.rank_lines(ax, _simplest(analysis, arms[arms["setting"] == name]), metric, look)
    _finish(figure, axes, look, _axis(analysis, metric))
    return figure


def heat_map(analysis: Analysis, metric: str) -> Figure | str:
    """Placement (or method) × rank."""
    arms = _trained(analysis, metric)
    arms = arms[arms["rank"].notna()]
    if not _over_ranks(arms):
        return "no arms differ in rank alone"
    look = _looks(analysis, arms)
    figure, axes = _panels(_names(arms), height=0.75 + 0.28 * arms["placement"].nunique())
    size, higher = 7 if min(len(axes), 3) * arms["rank"].nunique() <= 12 else 5, higher_is_better(metric)
    for name, ax in axes.items():
        draw.heat(ax, _simplest(analysis, arms[arms["setting"] == name]), metric, look, higher=higher, size=size)
        _shorten(ax)
    _finish(figure, axes, {}, "")
    figure.suptitle(_axis(analysis, metric), fontsize=8)
    return figure


def learning_rate(analysis: Analysis) -> Figure | str:
    """Sensitivity to the learning rate of each placement (or method), at up to three ranks."""
    found = analysis.found
    runs = found.runs
    if "optim.lr" not in found.tuned or found.select not in runs:
        return "every run has the same learning rate"
    runs = runs[(runs["status"] == "completed") & runs[found.select].notna() & (runs["source"] == "study")]
    runs = _of_simplest(analysis, runs)
    if runs.empty:
        return f"no run has a score on {found.select.split('.')[0]}"
    runs, ranks = _at_ranks(runs)
    trials = pd.DataFrame(
        {
            "setting": runs["setting"], "placement": runs["placement"], "rank": runs["rank"], "lr": runs["optim.lr"],
            "value": runs[found.select], "chosen": runs["chosen"],
        }
    )  # fmt: skip
    look = _looks(analysis, trials)
    settings = _names(trials)[:3]
    figure, axes = _by_rank(settings, ranks, sharex=True)
    for (name, rank), ax in axes.items():
        part = trials[(trials["setting"] == name) & (trials["rank"] == rank)]
        if len(part):
            shared = trials[trials["setting"].isin(settings)] if len(ranks) > 1 else part
            draw.learning_rates(ax, part, look, rates=shared["lr"])
        if name == settings[-1] or len(ranks) == 1:
            ax.set_xlabel("learning rate")
        if rank == ranks[0]:
            ax.set_ylabel(_axis(analysis, analysis.metric, "validation").replace(" (", "\n("))
    _legend(figure, look)
    return figure


def training_curves(analysis: Analysis) -> Figure | str:
    """Training loss of the chosen trials, at up to three ranks."""
    runs = analysis.found.runs
    runs = _of_simplest(analysis, runs[runs["chosen"] & runs["folder"].notna()]) if "folder" in runs else runs.iloc[:0]
    if runs.empty:
        return "no run left a training curve"
    settings = _names(runs)[:3]
    runs, ranks = _at_ranks(runs[runs["setting"].isin(settings)])
    runs = runs.groupby(["setting", "placement", "rank"], dropna=False).head(5)
    table = analysis.study.curves(runs["run_id"])
    if table.empty:
        return "no run left a training curve"
    table = table.merge(runs[["run_id", "setting", "placement", "rank"]], on="run_id")
    look = _looks(analysis, table)
    figure, axes = _by_rank(settings, ranks)
    unit = "\n(nats/token)" if set(runs["objective"]) == {"nll"} else ""  # each objective has its own
    for (name, rank), ax in axes.items():
        part = table[(table["setting"] == name) & (table["rank"] == rank)]
        if len(part):
            draw.curves(ax, part, look)
        if name != settings[-1] and len(ranks) > 1:
            ax.set_xlabel("")
        if rank == ranks[0]:
            ax.set_ylabel(f"training loss{unit}")
    _legend(figure, look)
    return figure


def learn_forget(analysis: Analysis) -> Figure | str:
    """Learning against forgetting."""
    arms = _trained(analysis, analysis.metric)
    if "forgetting" not in arms or arms["forgetting"].isna().all():
        return "no run was scored on text outside its task (a split besides train, validation and test)"
    arms = arms[arms["forgetting"].notna()].reset_index(drop=True)
    look = _looks(analysis, arms)
    figure, axes = _panels(_names(arms))
    for name, ax in axes.items():
        draw.learn_forget(ax, arms[arms["setting"] == name], analysis.metric, look)
    _finish(figure, axes, look, _axis(analysis, analysis.metric), lines=False)
    return figure


def where_rank_went(analysis: Analysis) -> Figure | str:
    """Rank by layer and role, for up to four arms: those of uneven rank (of the same ranks one arm), else the highest
    rank of each placement (or method)."""
    found = [arm for arm in analysis.found.arms if not pd.isna(arm.factors["rank"])]
    arms = [arm for arm in found if analysis.study.layouts.get(arm.runs["layout"].iloc[0])]
    arms = [arm for arm in arms if arm.setting == arms[0].setting]
    layouts = {arm.runs["layout"].iloc[0]: arm for arm in reversed(arms)}
    arms = [arm for arm in arms if layouts[arm.runs["layout"].iloc[0]] is arm]
    tables = {arm.label: analysis.study.modules([arm.runs["run_id"].iloc[0]]) for arm in arms}
    tables = {label: table[table["layer"].notna()] for label, table in tables.items() if len(table)}
    if not any(len(table) for table in tables.values()):
        return "no record lists its adapted modules"
    uneven = [label for label, table in tables.items() if table["rank"].nunique() > 1]
    names = _named(analysis, arms[0].setting)
    chosen = (uneven or _last(names, tables))[:4]
    top = max(float(tables[label]["rank"].max()) for label in chosen)
    lowest = sorted({float(tables[label]["rank"].min()) for label in chosen})
    ticks = [rank for rank in lowest if rank < 0.85 * top]  # others would be written over the highest
    return _module_maps({names[label][1]: tables[label] for label in chosen}, "rank", "rank", top, ticks=[*ticks, top])


def where_energy_went(analysis: Analysis) -> Figure | str:
    """Share of the update's squared norm by layer and role, mean over seeds: the highest rank of each placement (or
    method)."""
    tables: dict[str, pd.DataFrame] = {}
    with_spectra = [a for a in analysis.found.arms if "update_norm" in a.runs and a.runs["update_norm"].notna().any()]
    for arm in (arm for arm in with_spectra if arm.setting == with_spectra[0].setting):
        rows = analysis.study.spectra(arm.runs["run_id"])
        if len(rows):
            percent = rows[rows["layer"].notna()].assign(share=100 * rows["energy_share"])
            tables[arm.label] = percent.groupby(["role", "layer"], sort=False, as_index=False)["share"].mean()
    if not tables:
        return "no run has spectra (python adapters.py spectra outputs/STUDY makes them)"
    names = _named(analysis, with_spectra[0].setting)
    chosen = _last(names, tables)[:4]
    top = max(float(tables[label]["share"].max()) for label in chosen)
    return _module_maps({names[label][1]: tables[label] for label in chosen}, "share", "energy (%)", top)


def importance(analysis: Analysis) -> Figure | str:
    """Importance of each varied field."""
    table = analysis.tables["importance"]
    if table.empty:
        return "fewer than two fields vary, or fewer than four runs"
    figure, axes = _panels(_names(table)[:MOST_SETTINGS], height=0.7 + 0.22 * table["field"].nunique())
    for name, ax in axes.items():
        draw.bars(ax, table[table["setting"] == name])
    _finish(figure, axes, {}, "")
    return figure


def share_kept(analysis: Analysis) -> Figure | str:
    """Share of full fine-tuning's gain kept; of the full placement's where the study has no full fine-tuning."""
    table = analysis.tables["share_kept"]
    table = table[(table["metric"] == analysis.metric) & table["share"].notna() & table["percent"].notna()]
    if table.empty:
        return "no full fine-tuning and no full placement whose gain over the base model is clear"
    reference = FULL if (table["reference"] == FULL).any() else "full placement"
    table = table[table["reference"] == reference]
    table = table.drop(columns="placement").merge(_trained(analysis, analysis.metric)[["setting", "arm", "placement"]])
    # of what else differs at one rank the best, as in the other figures: a line joins ranks
    table = table.sort_values("share", ascending=False).drop_duplicates(["setting", "placement", "rank"]).sort_index()
    look = _looks(analysis, table)
    figure, axes = _panels(_names(table))
    for name, ax in axes.items():
        draw.share_kept(ax, table[table["setting"] == name], look)
    what = f"{FULL}'s" if reference == FULL else "the full placement's"
    _finish(figure, axes, look, f"gain in {title(analysis.metric)} kept\n(% of {what})")
    return figure


def forest(analysis: Analysis) -> Figure | str:
    """Differences between placements, and methods, with their intervals: what the examples share is not in them."""
    tests = analysis.tables["tests"]
    tests = tests[(tests["metric"] == analysis.metric) & tests["family"].isin(("placement", "method"))]
    tests = tests[tests["low"].notna() & tests["setting"].isin(sorted(tests["setting"].unique())[:MOST_SETTINGS])]
    if tests.empty:
        return "no two placements or methods were compared at equal rank"
    names = {name: _named(analysis, name) for name in tests["setting"].unique()}
    labels = [
        f"{names[row['setting']][row['b']][1]} − {names[row['setting']][row['a']][1]}"
        for row in tests.to_dict("records")
    ]
    tests = tests.assign(label=labels).groupby("setting").head(MOST_ARMS)
    rows = int(tests.groupby("setting").size().max())
    figure, axes = _panels(_names(tests), height=0.55 + 0.15 * rows)
    for name, ax in axes.items():
        draw.forest(ax, tests[tests["setting"] == name])
        _shorten(ax)
        ax.set_xlabel("difference in " + _axis(analysis, analysis.metric))
    _finish(figure, axes, {}, "")
    return figure


def detectable(analysis: Analysis) -> Figure | str:
    """How small a difference a study of so many seeds and groups of examples finds in 80% of cases."""
    table = analysis.tables["power"]
    table = table[(table["metric"] == analysis.metric) & (table["detectable"] > 0) & (table["seeds"] > 2)]
    if table.empty:
        return "no two placements or methods have scores of single examples at equal rank"
    figure, axes = _panels(_names(table)[:MOST_SETTINGS])
    for name, ax in axes.items():
        draw.detectable(ax, table[table["setting"] == name])
        ax.set_xlabel("seeds")
    _finish(figure, axes, {}, "difference found in 80%\n" + _axis(analysis, analysis.metric))
    return figure


def performance_profile(analysis: Analysis) -> Figure | str:
    """The share of runs over tasks that reach each normalised score (Agarwal et al. 2021)."""
    several = aggregate.normalised(analysis.found, analysis.metric, draws=analysis.draws)
    found = [one for one in several if len(one.tasks) >= LEAST_TASKS][:MOST_SETTINGS]
    if not found:
        return f"fewer than {LEAST_TASKS} tasks have the same arms of one model"
    every = _every(analysis)
    look = _looks(analysis, every)
    figure, axes = _panels([one.model for one in found])
    for one in found:
        kinds_of = _named(analysis, one.tasks[0])
        last = _last(kinds_of, one.arms)
        middle = float(one.x_ATR.mean())
        spread = 4 * float(one.x_ATR.std()) or 0.1
        table = aggregate.profile(one, np.linspace(middle - spread, middle + spread, 81))
        draw.profiles(
            axes[one.model], table[table["arm"].isin(last)], {arm: (look[kinds_of[arm][0]], arm) for arm in last}
        )
        axes[one.model].set_xlabel("normalised score (0 base, 1 mean arm)")
        axes[one.model].legend()
    _finish(figure, axes, {}, "share of runs that reach it")
    return figure


def makers(analysis: Analysis) -> dict[str, Maker]:
    """Name of each figure file -> its maker."""
    found: dict[str, Maker] = {}
    for metric in [analysis.metric, *(name for name in analysis.found.metrics if name != analysis.metric)][:3]:
        found[f"pareto_{metric}"] = lambda one, metric=metric: pareto(one, metric)  # type: ignore[misc]
        found[f"rank_{metric}"] = lambda one, metric=metric: rank_curves(one, metric)  # type: ignore[misc]
    found[f"arms_{analysis.metric}"] = lambda one: every_arm(one, one.metric)
    found["pareto_seconds"] = lambda one: pareto(one, one.metric, "train_seconds_solo")
    found[f"heatmap_{analysis.metric}"] = lambda one: heat_map(one, one.metric)
    return found | {
        "forest": forest, "detectable": detectable, "performance_profile": performance_profile,
        "share_kept": share_kept, "learning_rate": learning_rate, "training_curves": training_curves,
        "learn_forget": learn_forget, "where_rank_went": where_rank_went,
        "where_energy_went": where_energy_went, "importance": importance,
    }  # fmt: skip


def write(
    analysis: Analysis, folder: Path, *, only: Sequence[str] = (), workers: int = 2
) -> tuple[list[Path], dict[str, str]]:
    """Saves every figure as PDF and PNG, on two processes where the system can fork. Returns the files, and for figures
    left out the reason. Those that a former analysis wrote there and this one does not have are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in makers(analysis) if not only or name in only]
    with styled():  # makes the font that the processes share
        shares = [names[i::workers] for i in range(workers)] if workers > 1 and _can_fork() else [names]
    found: dict[str, str | None] = {}
    if len(shares) > 1 and len(names) > 1:
        with ProcessPoolExecutor(
            workers, mp_context=get_context("fork"), initializer=_inherit, initargs=(analysis,)
        ) as pool:
            for part in pool.map(_save_inherited, shares, [folder] * len(shares)):
                found |= part
    else:
        found = _save(analysis, names, folder)
    drawn = [name for name in names if found[name] is None]
    for name in drawn:
        captions.write(analysis, name, folder)
    suffixes = ("pdf", "png", *captions.SUFFIXES)
    written = [folder / f"{name}.{suffix}" for name in drawn for suffix in suffixes]
    manifest.update(folder, written, among=[f"{name}.{suffix}" for name in only for suffix in suffixes] or None)
    return written, {name: reason for name in names if (reason := found[name]) is not None}


def make(analysis: Analysis) -> dict[str, Figure | str]:
    """Every figure by name, to look at in a notebook; for those left out, the reason."""
    with styled():
        found = {name: maker(analysis) for name, maker in makers(analysis).items()}
    for figure in found.values():
        if not isinstance(figure, str):
            plt.close(figure)  # so that a notebook shows it where it is asked for, and once
    return found


def _save(analysis: Analysis, names: Sequence[str], folder: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        with styled():
            made = makers(analysis)[name](analysis) if analysis.found.arms else "no completed run"
            if isinstance(made, str):
                found[name] = made
                continue
            made.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
            made.set_layout_engine("none")
            made.savefig(folder / f"{name}.png", metadata={"Software": None})
            plt.close(made)
            found[name] = None
    return found


def _can_fork() -> bool:
    return sys.platform == "linux" and threading.active_count() == 1 and (os.cpu_count() or 1) > 1


_inherited: list[Analysis] = []


def _inherit(analysis: Analysis) -> None:
    _inherited.append(analysis)


def _save_inherited(names: Sequence[str], folder: Path) -> dict[str, str | None]:
    return _save(_inherited[0], names, folder)


def _every(analysis: Analysis) -> pd.DataFrame:
    """The arms that were trained, with their kind as placement."""
    arms = analysis.arms[analysis.arms["arm"] != BASE]
    return arms.assign(placement=kinds(arms))


def _trained(analysis: Analysis, metric: str) -> pd.DataFrame:
    """Those that have a metric, of the settings that are shown."""
    arms = _every(analysis)
    arms = arms[arms[metric].notna()] if metric in arms else arms.iloc[:0]
    if metric != analysis.metric:
        arms = _front_by(arms, metric, "trainable_parameters")
    shown = sorted(arms["setting"].unique())[:MOST_SETTINGS]
    return arms[arms["setting"].isin(shown)].reset_index(drop=True)


def _front_by(arms: pd.DataFrame, metric: str, cost: str) -> pd.DataFrame:
    sign = -1.0 if higher_is_better(metric) else 1.0
    arms = arms.copy()
    for _, group in arms.groupby("setting"):
        losses = sign * group[metric].to_numpy(dtype=float)
        arms.loc[group.index, "on_front"] = front(group[cost].to_numpy(dtype=float), losses)
    return arms


def _simplest(analysis: Analysis, arms: pd.DataFrame) -> pd.DataFrame:
    """One arm a kind and rank: the best where other factors make several."""
    best = arms.sort_values(analysis.metric, ascending=not higher_is_better(analysis.metric))
    return best.drop_duplicates(["placement", "rank"]).sort_index()


def _of_simplest(analysis: Analysis, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the arms that `_simplest` keeps, with the kind of their arm: a line joins runs of one kind."""
    kind_of = {
        (name, arm): kind
        for name, arms in _trained(analysis, analysis.metric).groupby("setting")
        for arm, kind in _simplest(analysis, arms).set_index("arm")["placement"].items()
    }
    pairs = list(zip(runs["setting"], runs["arm"], strict=True))
    kept = runs[pd.Series([pair in kind_of for pair in pairs], index=runs.index, dtype=bool)]  # of no runs, none
    return kept.assign(placement=[kind_of[pair] for pair in pairs if pair in kind_of])


def _over_ranks(table: pd.DataFrame) -> bool:
    """Whether arms differ in rank alone: of methods at one rank each, only the methods do."""
    return bool((table.groupby(["setting", "placement"])["rank"].nunique() > 1).any())


def _at_ranks(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[float]]:
    """Runs at up to three ranks, and these; where arms do not differ in rank alone all stand together at one."""
    ranks = _spread(sorted(runs["rank"].dropna().unique()))
    if not _over_ranks(runs):
        return runs.assign(rank=0.0), [0.0]
    return runs[runs["rank"].isin(ranks)], ranks


def _looks(analysis: Analysis, table: pd.DataFrame) -> dict[str, Look]:
    """The looks of the kinds in a table, which are the same in every figure of the study."""
    every = looks([str(name) for name in _every(analysis)["placement"].drop_duplicates()])
    present = {str(name) for name in table["placement"]}
    return {name: look for name, look in every.items() if name in present}


def _labels(arms: pd.DataFrame) -> pd.Series:
    """A short name of each arm: its kind and, where ranks differ, its rank; else its full label."""
    ranked = _over_ranks(arms) & arms["rank"].notna()
    short = arms["placement"].where(~ranked, arms["placement"] + " r" + arms["rank"].map("{:g}".format))
    return short.where(~pd.DataFrame({"s": arms["setting"], "l": short}).duplicated(keep=False), arms["arm"])


def _named(analysis: Analysis, setting: str) -> dict[str, tuple[str, str]]:
    """The kind and the short name of each arm of a setting, by its label."""
    arms = _every(analysis)
    arms = arms[arms["setting"] == setting]
    named = zip(arms["placement"].astype(str), _labels(arms), strict=True)
    return dict(zip(arms["arm"], named, strict=True))


def _last(names: dict[str, tuple[str, str]], labels: Collection[str]) -> list[str]:
    """The last of the arms of each kind: that of the highest rank."""
    return list({names[label][0]: label for label in names if label in labels}.values())


def _names(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table["setting"].drop_duplicates().sort_values()]


def _spread(values: list[float], most: int = 3) -> list[float]:
    """The lowest, the middle and the highest of many."""
    return values if len(values) <= most else [values[0], values[len(values) // 2], values[-1]]


def _panels(names: Sequence[str], height: float = PANEL_HEIGHT) -> tuple[Figure, dict[str, Axes]]:
    """A panel a setting: one fits a column, two or three stand side by side over both columns."""
    columns = min(len(names), 3)
    rows = -(-len(names) // 3)
    width = COLUMN if len(names) == 1 else TEXT
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, 0.25 + height * rows), squeeze=False, layout="constrained"
    )
    axes = {name: grid[i // 3][i % 3] for i, name in enumerate(names)}
    for unused in list(grid.flat)[len(names) :]:
        unused.set_visible(False)
    return figure, axes


def _by_rank(
    settings: Sequence[str], ranks: Sequence[float], *, sharex: bool = False
) -> tuple[Figure, dict[tuple[str, float], Axes]]:
    """A row a setting and a column a rank, or settings side by side where there is one rank; each panel is titled."""
    beside = len(ranks) == 1
    shape = (1, len(settings)) if beside else (len(settings), len(ranks))
    figure, grid = plt.subplots(
        *shape, figsize=(TEXT if max(shape) > 1 else COLUMN, 0.5 + 1.55 * shape[0]), sharex=sharex and not beside,
        sharey=False if beside else "row", squeeze=False, layout="constrained",
    )  # fmt: skip
    panels = grid.T if beside else grid
    axes = {(name, rank): panels[i][j] for i, name in enumerate(settings) for j, rank in enumerate(ranks)}
    for (name, rank), ax in axes.items():
        _title(ax, ", ".join([name] * (len(settings) > 1) + [f"rank {rank:g}"] * (not beside)))
    return figure, axes


def _module_maps(
    tables: dict[str, pd.DataFrame], value: str, label: str, top: float, *, ticks: Sequence[float] | None = None
) -> Figure:
    """A panel an arm with a value by role and layer, and one colour bar from 0 to `top`."""
    figure, grid = plt.subplots(
        1, len(tables), figsize=(TEXT if len(tables) > 1 else COLUMN, 1.75), squeeze=False, layout="constrained"
    )
    for ax, (name, table) in zip(grid[0], tables.items(), strict=True):
        image = draw.by_role_and_layer(ax, table, value, top)
        _title(ax, name)
    figure.colorbar(image, ax=list(grid[0]), label=label, shrink=0.9, pad=0.01, ticks=ticks)
    return figure


def _finish(figure: Figure, axes: dict[str, Axes], look: dict[str, Look], label: str, *, lines: bool = True) -> None:
    for i, (name, ax) in enumerate(axes.items()):
        if len(axes) > 1:
            _title(ax, name)
        if i % 3 == 0 and label:
            ax.set_ylabel(label)
    _legend(figure, look, lines=lines)


def _letters(ax: Axes) -> float:
    """How many letters of one point are as wide as a panel."""
    spec, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    assert spec is not None
    assert figure is not None
    return 72 * float(figure.get_figwidth()) / spec.get_gridspec().ncols / 0.62


def _shorten(ax: Axes) -> None:
    """Takes the middle out of names beside a panel that would leave it less than half of its width."""
    half = int(_letters(ax) / 7 / 4)
    names = [label.get_text() for label in ax.get_yticklabels()]
    ax.set_yticks(ax.get_yticks(), [n if len(n) <= 2 * half else f"{n[: half - 1]}…{n[-half:]}" for n in names])


def _title(ax: Axes, text: str) -> None:
    """A title that stays over its panel: a long one has two lines or is smaller."""
    letters = 0.7 * _letters(ax)
    text = text if 8 * len(text) <= letters else text.replace(", ", "\n")
    ax.set_title(text, fontsize=min(8.0, letters / max(1, *map(len, text.split("\n")))))


def _legend(figure: Figure, look: dict[str, Look], *, lines: bool = True) -> None:
    """The looks by name; without `lines` where the figure has points only."""
    if len(look) < 2:
        return
    handles = [
        Line2D([], [], color=one.colour, marker=one.marker, linestyle=one.line if lines else "none", label=name)
        for name, one in look.items()
    ]
    place: dict[str, Any] = {"handles": handles, "loc": "outside upper center", "handlelength": 2.6}
    for columns in range(min(len(look), 5), 0, -1):
        legend = figure.legend(ncols=columns, **place)
        wide = legend.get_window_extent().width / figure.bbox.width
        if wide <= 1:
            break
        legend.remove()
    else:
        figure.legend(ncols=1, fontsize=7 / wide, **place)
    rows = -(-len(look) // columns)
    figure.set_figheight(figure.get_figheight() + 0.14 * max(rows - 2, 0))  # not at the panels' cost


def _axis(analysis: Analysis, metric: str, split: str = "") -> str:
    unit = " (nats/token)" if metric == "nll" else ""
    return f"{split or analysis.found.split} {title(metric)}{unit}"


def _base_note(ax: Axes, analysis: Analysis, setting: str, metric: str) -> None:
    """The base model's score: a line where it fits on the axis, else words in the corner."""
    rows = analysis.arms[(analysis.arms["setting"] == setting) & (analysis.arms["arm"] == BASE)]
    if metric not in rows or rows[metric].isna().all():
        return
    value = float(rows[metric].iloc[0])
    low, high = ax.get_ylim()
    if low <= value <= high:
        ax.axhline(value, color=GREY, linewidth=0.6, linestyle=":")
    corner = (0.98, 0.03) if higher_is_better(metric) else (0.98, 0.95)
    side = "bottom" if higher_is_better(metric) else "top"
    text = f"base model {number(value, 3)}"
    note = ax.text(*corner, text, transform=ax.transAxes, ha="right", va=side, fontsize=6.5, color=GREY)
    note.set(zorder=6, path_effects=[withStroke(linewidth=2, foreground="white")])
