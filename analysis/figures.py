"""The paper's figures: which there are, what each needs, and how they are saved."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sweeper import installation

from . import (
    aggregate,
    captions,
    charted,
    conflict_figures,
    contrasts,
    draw,
    lattice_figures,
    layout,
    manifest,
    shown,
    task_figures,
    together,
)
from .analyse import Analysis
from .arms import BASE, FULL, higher_is_better
from .style import GREY, styled
from .tables import DAGGER, number, title
from .venues import DEFAULT, LEAST_FONT, Venue

Maker = Callable[[Analysis, Venue], Figure | str]
"""Makes a figure for a venue, or says why the study has no data for it."""

LEAST_TASKS = 3  # of a profile, whose bands say little over two
COSTS = {
    "pareto_seconds": ("train_seconds_solo", "training time alone (s)"),
    "pareto_flops": ("train_flops", "training FLOPs"),
    "pareto_tokens": ("train_tokens", "training tokens"),
    "pareto_memory": ("peak_memory_solo_bytes", "peak memory alone (bytes)"),
}
SAME_COST = 1.02
"""Largest over smallest cost of a setting, below which its arms cost the same."""


def pareto(analysis: Analysis, metric: str, venue: Venue = DEFAULT, cost: str = "trainable_parameters") -> Figure | str:
    """Cost against the metric, with the front; full fine-tuning is a level."""
    arms = shown.trained(analysis, metric)
    label = dict(COSTS.values()).get(cost, "trainable parameters")
    if cost not in arms or arms[cost].isna().all():
        return f"no run has {cost}" + (" (solo calibration was off)" if "solo" in cost else "")
    arms = arms[arms[cost] > 0]
    if arms.empty:
        return f"no run has {cost} above 0"
    if cost != "trainable_parameters":
        arms = shown.front_by(arms, metric, cost)
        costs = arms.groupby("setting")[cost]
        if len(arms) > 1 and (costs.max() / costs.min()).max() < SAME_COST:
            return f"every arm has the same {label.removesuffix(' (bytes)')}"
    look = shown.looks_of(analysis, arms)
    doubted, arms = shown.in_doubt(arms, look)
    figure, axes = layout.panels(venue, shown.settings(arms), wide=len(look) > layout.MANY)
    points = {}
    for name, ax in axes.items():
        mine = arms[arms["setting"] == name]
        near = _near(mine, cost)
        points[name] = mine[near]
        draw.scatter(ax, points[name], metric, cost, look)
        draw.reference_level(ax, mine, metric)
        _whole(ax, mine, metric, look, "" if near.all() else draw.amount(float(mine.loc[~near, cost].iloc[0])))
        ax.set_xlabel(label)
        _base_note(ax, analysis, name, metric)
    layout.finish(figure, axes, look, _axis(analysis, metric), lines=False, doubted=doubted)
    figure.draw_without_rendering()  # the layout decides how far apart points are
    ranks, higher = shown.ranks_written(arms), higher_is_better(metric)
    for name, ax in axes.items():
        draw.point_labels(ax, points[name], metric, cost, higher=higher, ranks=ranks)
    return figure


def _near(arms: pd.DataFrame, cost: str) -> pd.Series:
    """Arms that are points: all but a full fine-tuning whose cost would take more than half of the axis."""
    whole = arms["placement"] == FULL
    low, high = arms.loc[~whole, cost].min(), arms.loc[~whole, cost].max()
    return ~whole | whole.all() | arms[cost].between(low**2 / high, high**2 / low)


def _whole(
    ax: Axes, arms: pd.DataFrame, metric: str, look: shown.Looks, cost: str = "", *, upright: bool = False
) -> None:
    """Full fine-tuning as a level, with its cost where that lies outside the axis: on the cheap side, where no arm
    scores as well."""
    for _, row in arms[arms["placement"] == FULL].head(1).iterrows():
        low, high = ax.get_xlim() if upright else ax.get_ylim()
        ends = (row[metric], row[f"{metric}_low"], row[f"{metric}_high"])
        draw.level(ax, row, metric, look[FULL], upright=upright)
        (ax.set_xlim if upright else ax.set_ylim)(np.nanmin([low, *ends]), np.nanmax([high, *ends]))
        if cost:
            note = ax.annotate(
                f"{cost}{DAGGER * bool(row['marked'])}", (0, row[metric]), xycoords=("axes fraction", "data"),
                xytext=(3, 2), textcoords="offset points", ha="left", va="bottom", fontsize=LEAST_FONT,
            )  # fmt: skip
            note.set(color=look[FULL].colour, zorder=5, path_effects=[withStroke(linewidth=1.5, foreground="white")])


def every_arm(analysis: Analysis, metric: str, venue: Venue = DEFAULT) -> Figure | str:
    """Every arm with its bar, best first, up to `shown.MOST_ARMS` a panel."""
    arms = shown.ranked_arms(analysis, metric)
    if shown.most_of(arms) < 2:
        return "fewer than two arms"
    names = shown.settings(arms)
    few = shown.first(arms, min(shown.MOST_ARMS, layout.rows_that_fit(venue, len(names), *layout.ARM)))
    figure, axes = layout.panels(
        venue, names, height=layout.ARM[1] + layout.ARM[0] * shown.most_of(few),
        wide=few["label"].str.len().max() > layout.LONG,
    )  # fmt: skip
    look = shown.all_looks(analysis)
    for name, ax in axes.items():
        mine = arms[arms["setting"] == name].assign(marked=False)
        draw.dots(ax, few[few["setting"] == name], metric)
        draw.reference_level(ax, mine, metric, upright=True)
        _whole(ax, mine, metric, look, upright=True)
        layout.shorten(ax)
        ax.set_xlabel(_axis(analysis, metric))
    layout.finish(figure, axes, {}, "", beside=True)
    layout.thin(figure, axes.values())
    return figure


def rank_curves(analysis: Analysis, metric: str, venue: Venue = DEFAULT) -> Figure | str:
    """The metric against rank, a line a placement (or method)."""
    arms = shown.trained(analysis, metric)
    if not shown.over_ranks(arms):
        return "no arms differ in rank alone"
    look = shown.looks_of(analysis, arms)
    parts = [shown.simplest(analysis, group) for _, group in arms.groupby("setting")]
    doubted, arms = shown.in_doubt(pd.concat(parts), look)
    figure, axes = layout.panels(venue, shown.settings(arms), wide=len(look) > layout.MANY)
    for name, ax in axes.items():
        mine = arms[arms["setting"] == name]
        draw.rank_lines(ax, mine, metric, look)
        draw.reference_level(ax, mine, metric)
    layout.finish(figure, axes, look, _axis(analysis, metric), doubted=doubted)
    return figure


HEAT_CELL = 0.42
"""Inches of a cell that can hold its numbers."""


def heat_map(analysis: Analysis, metric: str, venue: Venue = DEFAULT) -> Figure | str:
    """Placement (or method) × rank; of more than fit on a page the best."""
    arms = shown.trained(analysis, metric)
    arms = arms[arms["rank"].notna()]
    if not shown.over_ranks(arms):
        return "no arms differ in rank alone"
    names = shown.settings(arms)
    present = set(arms["placement"])
    order = [kind for kind in shown.all_looks(analysis) if kind in present]
    order = order[: layout.rows_that_fit(venue, len(names), *layout.HEAT)]  # of many they are the best, best first
    parts = {
        name: shown.simplest(analysis, arms[(arms["setting"] == name) & arms["placement"].isin(order)])
        for name in names
    }
    ranks, letters = max(part["rank"].nunique() for part in parts.values()), max(map(len, order)) + 1
    wide = not _holds_numbers(venue.width(len(names)) / min(len(names), venue.across), ranks, letters)
    figure, axes = layout.panels(venue, names, height=layout.HEAT[1] + layout.HEAT[0] * len(order), wide=wide)
    written = _holds_numbers(figure.get_figwidth() / min(len(names), venue.across), ranks, letters)
    for name, ax in axes.items():
        image = draw.heat(
            ax, parts[name], metric, order, higher=higher_is_better(metric),
            least=shown.least_range(analysis, parts[name], metric), written=written,
        )  # fmt: skip
        if not written:
            figure.colorbar(image, ax=ax, pad=0.02, aspect=30)
        layout.shorten(ax, share=0.4)
    layout.finish(figure, axes, {}, "", beside=True)
    figure.suptitle(_axis(analysis, metric), fontsize=8)
    return figure


def _holds_numbers(panel: float, columns: int, letters: int) -> bool:
    """Whether cells beside names of so many letters, in a panel so many inches wide, can hold their numbers."""
    return (panel - min(letters * LEAST_FONT * layout.LETTER / 72, 0.4 * panel) - 0.1) / columns >= HEAT_CELL


def learning_rate(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Sensitivity to the learning rate of each placement (or method), at up to three ranks."""
    trials = charted.learning_rates(analysis)
    if isinstance(trials, str):
        return trials
    trials, ranks = shown.at_ranks(trials)
    look = shown.looks_of(analysis, trials)
    settings = shown.settings(trials)[:3]
    doubted, trials = shown.in_doubt(trials[trials["setting"].isin(settings)], look)
    figure, axes = layout.by_rank(venue, settings, ranks, sharex=True)
    for (name, rank), ax in axes.items():
        part = trials[(trials["setting"] == name) & (trials["rank"] == rank)]
        if len(part):
            draw.learning_rates(ax, part, look, rates=(trials if len(ranks) > 1 else part)["lr"])
        if name == settings[-1] or len(ranks) == 1:
            ax.set_xlabel("learning rate")
        if rank == ranks[0]:
            ax.set_ylabel(_axis(analysis, analysis.metric, "validation").replace(" (", "\n("))
    layout.legend(figure, look, doubted=doubted)
    return figure


def _on_the_way(analysis: Analysis) -> tuple[pd.DataFrame, list[str], list[float]]:
    """The chosen runs whose curves are shown, with their settings and ranks."""
    runs = charted.on_the_way(analysis)
    settings = shown.settings(runs)[:3]
    runs, ranks = shown.at_ranks(runs[runs["setting"].isin(settings)])
    return runs, settings, ranks


def training_curves(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Training loss of the chosen trials, at up to three ranks."""
    runs, settings, ranks = _on_the_way(analysis)
    table = charted.training_curves(analysis, runs)
    if isinstance(table, str):
        return table
    unit = "\n(nats/token)" if set(runs["objective"]) == {"nll"} else ""  # each objective has its own
    return _over_steps(analysis, venue, table, settings, ranks, draw.curves, f"training loss{unit}")


def validation_curves(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Validation NLL of the chosen trials on the way, at up to three ranks."""
    runs, settings, ranks = _on_the_way(analysis)
    table = charted.validation_curves(analysis, runs)
    if isinstance(table, str):
        return table
    return _over_steps(analysis, venue, table, settings, ranks, draw.validation, "validation NLL\n(nats/token)")


def _over_steps(
    analysis: Analysis, venue: Venue, table: pd.DataFrame, settings: Sequence[str], ranks: Sequence[float],
    draw_one: Callable[[Axes, pd.DataFrame, shown.Looks], None], label: str,
) -> Figure:  # fmt: skip
    look = shown.looks_of(analysis, table)
    doubted, table = shown.in_doubt(table, look)
    figure, axes = layout.by_rank(venue, settings, ranks)
    for (name, rank), ax in axes.items():
        part = table[(table["setting"] == name) & (table["rank"] == rank)]
        if len(part):
            draw_one(ax, part, look)
        if name != settings[-1] and len(ranks) > 1:
            ax.set_xlabel("")
        if rank == ranks[0]:
            ax.set_ylabel(label)
    layout.legend(figure, look, doubted=doubted)
    return figure


def learn_forget(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Learning against forgetting, with the front of both."""
    metric = analysis.metric
    arms = shown.trained(analysis, metric)
    if "forgetting" not in arms or arms["forgetting"].isna().all():
        return "no run was scored on text outside its task (a split besides train, validation and test)"
    arms = arms[arms["forgetting"].notna()].reset_index(drop=True)
    arms = contrasts.about(arms, analysis.tables["contrasts"], contrasts.FORGETTING)
    arms = shown.front_by(arms, metric, "forgetting")
    look = shown.looks_of(analysis, arms)
    doubted, arms = shown.in_doubt(arms, look)
    figure, axes = layout.panels(venue, shown.settings(arms), wide=len(look) > layout.MANY)
    for name, ax in axes.items():
        draw.learn_forget(ax, arms[arms["setting"] == name], metric, look)
    if len(axes) > 1:  # the label is as wide as three panels
        for ax in axes.values():
            ax.set_xlabel("forgetting (nats/token)")
    layout.finish(figure, axes, look, _axis(analysis, metric), lines=False, doubted=doubted)
    layout.thin(figure, axes.values())
    return figure


def where_rank_went(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Rank by layer and role, for up to four arms whose modules differ in rank."""
    tables = shown.uneven(analysis)
    if not tables:
        listed = any(analysis.study.layouts.values())
        return "every arm has one rank in all its modules" if listed else "no record lists its adapted modules"
    top = max(float(table["rank"].max()) for table in tables.values())
    lowest = sorted({float(table["rank"].min()) for table in tables.values()})
    ticks = [rank for rank in lowest if rank < 0.85 * top]  # others would be written over the highest
    return layout.module_maps(venue, tables, "rank", "rank", top, ticks=[*ticks, top])


def where_energy_went(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
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
        return f"no run has spectra ({installation.program('adapters')} spectra outputs/STUDY makes them)"
    names = shown.named(analysis, with_spectra[0].setting)
    chosen = shown.last(names, tables)[:4]
    top = max(float(tables[label]["share"].max()) for label in chosen)
    return layout.module_maps(venue, {names[label][1]: tables[label] for label in chosen}, "share", "energy (%)", top)


def importance(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Importance of each varied field."""
    table = analysis.tables["importance"]
    if table.empty:
        return "fewer than two fields vary, or fewer than four runs"
    names = shown.settings(table)[: shown.MOST_SETTINGS]
    figure, axes = layout.panels(venue, names, height=0.7 + 0.22 * table["field"].nunique())
    for name, ax in axes.items():
        draw.bars(ax, table[table["setting"] == name])
    layout.finish(figure, axes, {}, "", beside=True)
    return figure


def share_kept(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Share of full fine-tuning's gain kept; of the full placement's where the study has no full fine-tuning."""
    table = analysis.tables["share_kept"]
    table = table[(table["metric"] == analysis.metric) & table["share"].notna() & table["percent"].notna()]
    if table.empty:
        return "no full fine-tuning and no full placement whose gain over the base model is clear"
    reference = FULL if (table["reference"] == FULL).any() else "full placement"
    table = table[table["reference"] == reference]
    arms = shown.trained(analysis, analysis.metric)[["setting", "arm", "placement", "dagger"]]
    table = table.drop(columns="placement").merge(arms)
    # of what else differs at one rank the best, as in the other figures: a line joins ranks
    table = table.sort_values("share", ascending=False).drop_duplicates(["setting", "placement", "rank"]).sort_index()
    look = shown.looks_of(analysis, table)
    doubted, table = shown.in_doubt(table, look)
    figure, axes = layout.panels(venue, shown.settings(table), wide=len(look) > layout.MANY)
    for name, ax in axes.items():
        draw.share_kept(ax, table[table["setting"] == name], look)
    what = f"{FULL}'s" if reference == FULL else "the full placement's"
    layout.finish(figure, axes, look, f"gain in {title(analysis.metric)} kept\n(% of {what})", doubted=doubted)
    return figure


def forest(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Differences between placements, and methods, with their intervals: what the examples share is not in them."""
    tests = shown.comparisons(analysis)
    if tests.empty:
        return "no two placements or methods were compared at equal rank"
    names = shown.settings(tests)
    tests = shown.first(tests, min(shown.MOST_ARMS, layout.rows_that_fit(venue, len(names), *layout.TEST)))
    figure, axes = layout.panels(
        venue, names, height=layout.TEST[1] + layout.TEST[0] * shown.most_of(tests),
        wide=tests["label"].str.len().max() > layout.LONG,
    )  # fmt: skip
    for name, ax in axes.items():
        draw.forest(ax, tests[tests["setting"] == name])
        layout.shorten(ax, share=0.6)
        ax.set_xlabel("difference in\n" + _axis(analysis, analysis.metric))
    layout.finish(figure, axes, {}, "", beside=True)
    layout.thin(figure, axes.values())
    return figure


def detectable(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """How small a difference a study of so many seeds and groups of examples finds in 80% of cases."""
    table = analysis.tables["power"]
    table = table[(table["metric"] == analysis.metric) & (table["detectable"] > 0) & (table["seeds"] > 2)]
    if table.empty:
        return "no two placements or methods have scores of single examples at equal rank"
    figure, axes = layout.panels(venue, shown.settings(table)[: shown.MOST_SETTINGS])
    for name, ax in axes.items():
        draw.detectable(ax, table[table["setting"] == name])
        ax.set_xlabel("seeds")
    layout.finish(figure, axes, {}, "difference found in 80%\n" + _axis(analysis, analysis.metric))
    return figure


def performance_profile(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """The share of runs over tasks that reach each normalised score (Agarwal et al. 2021)."""
    several = aggregate.normalised(analysis.found, analysis.metric, draws=analysis.draws)
    found = [one for one in several if len(one.tasks) >= LEAST_TASKS][: shown.MOST_SETTINGS]
    if not found:
        return f"fewer than {LEAST_TASKS} tasks have the same arms of one model"
    look = shown.all_looks(analysis)
    figure, axes = layout.panels(venue, [one.model for one in found], wide=len(look) > layout.MANY)
    drawn: dict[str, str] = {}
    doubts = tuple(arm.label for arm in analysis.found.arms if arm.doubts)
    for one in found:
        kinds_of = shown.named(analysis, one.tasks[0])
        last = shown.last(kinds_of, one.arms)
        middle, spread = float(one.x_ATR.mean()), 4 * float(one.x_ATR.std()) or 0.1
        table = aggregate.profile(one, np.linspace(middle - spread, middle + spread, 81))
        draw.profiles(axes[one.model], table[table["arm"].isin(last)], {arm: look[kinds_of[arm][0]] for arm in last})
        axes[one.model].set_xlabel("normalised score\n(0 base model, 1 mean arm)")
        drawn |= {kinds_of[arm][0]: kinds_of[arm][1].removesuffix(DAGGER) + DAGGER * (arm in doubts) for arm in last}
    layout.finish(
        figure, axes, {kind: one for kind, one in look.items() if kind in drawn}, "share of runs that reach it",
        names=drawn,
    )  # fmt: skip
    return figure


def makers(analysis: Analysis) -> dict[str, Maker]:
    """Name of each figure file -> its maker."""
    found: dict[str, Maker] = {}
    main = analysis.metric
    for metric in [main, *(name for name in analysis.found.metrics if name != main)][:3]:
        found[f"pareto_{metric}"] = lambda one, venue, metric=metric: pareto(one, metric, venue)  # type: ignore[misc]
        found[f"rank_{metric}"] = lambda one, venue, metric=metric: rank_curves(one, metric, venue)  # type: ignore[misc]
    found[f"arms_{main}"] = lambda one, venue: every_arm(one, main, venue)
    for name, (cost, _) in COSTS.items():
        found[name] = lambda one, venue, cost=cost: pareto(one, main, venue, cost)  # type: ignore[misc]
    found[f"heatmap_{main}"] = lambda one, venue: heat_map(one, main, venue)
    return found | {
        "forest": forest, "detectable": detectable, "performance_profile": performance_profile,
        "share_kept": share_kept, "learning_rate": learning_rate, "training_curves": training_curves,
        "validation_curves": validation_curves, "learn_forget": learn_forget, "where_rank_went": where_rank_went,
        "where_energy_went": where_energy_went, "importance": importance,
        **(task_figures.MAKERS | conflict_figures.MAKERS if together.FIELD in analysis.found.runs else {}),
        **({"experts": task_figures.experts} if len(analysis.tables["experts"]) else {}),
        **(lattice_figures.MAKERS if len(analysis.tables["lattice_best"]) else {}),
        **({"library": task_figures.library} if len(analysis.tables["library"]) else {}),
    }  # fmt: skip


def write(
    analysis: Analysis, folder: Path, *, only: Sequence[str] = (), workers: int = 2, venue: Venue = DEFAULT
) -> tuple[list[Path], dict[str, str]]:
    """Saves every figure as PDF and PNG, as wide as a venue prints it, on two processes where the system can fork.
    Returns the files, and for figures left out the reason. Those that a former analysis wrote there and this one does
    not have are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in makers(analysis) if not only or name in only]
    with styled():  # makes the font that the processes share
        apart = workers > 1 and len(names) > 1 and _can_fork()
    found: dict[str, str | None] = {}
    if apart:
        with ProcessPoolExecutor(
            workers, mp_context=get_context("fork"), initializer=_inherit, initargs=(analysis, venue)
        ) as pool:
            for part in pool.map(_save_inherited, ([name] for name in names), [folder] * len(names)):
                found |= part
    else:
        found = _save(analysis, names, folder, venue)
    drawn = [name for name in names if found[name] is None]
    for name in drawn:
        captions.write(analysis, name, folder, venue)
    suffixes = ("pdf", "png", *captions.SUFFIXES)
    written = [folder / f"{name}.{suffix}" for name in drawn for suffix in suffixes]
    manifest.update(folder, written, among=[f"{name}.{suffix}" for name in only for suffix in suffixes] or None)
    return written, {name: reason for name in names if (reason := found[name]) is not None}


def make(analysis: Analysis, venue: Venue = DEFAULT) -> dict[str, Figure | str]:
    """Every figure by name, to look at in a notebook; for those left out, the reason."""
    found: dict[str, Figure | str] = {}
    with styled():
        for name, maker in makers(analysis).items():
            found[name] = made = maker(analysis, venue)
            if not isinstance(made, str):
                plt.close(made)  # so that a notebook shows it where it is asked for, and once
    return found


def _save(analysis: Analysis, names: Sequence[str], folder: Path, venue: Venue) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        with styled():
            made = makers(analysis)[name](analysis, venue) if analysis.found.arms else "no completed run"
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


_inherited: list[tuple[Analysis, Venue]] = []


def _inherit(analysis: Analysis, venue: Venue) -> None:
    _inherited.append((analysis, venue))


def _save_inherited(names: Sequence[str], folder: Path) -> dict[str, str | None]:
    analysis, venue = _inherited[0]
    return _save(analysis, names, folder, venue)


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
    note = ax.text(*corner, text, transform=ax.transAxes, ha="right", va=side, fontsize=LEAST_FONT, color=GREY)
    note.set(zorder=6, path_effects=[withStroke(linewidth=2, foreground="white")])
