"""Figures of runs of several tasks: together against alone, one task through another's blocks, one after another."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import continual, draw, layout, shown
from .analyse import Analysis
from .experts import by_expert
from .library import BEST
from .style import GREY, Look, looks
from .tables import title
from .together import ALONE, FIELD, THEN
from .venues import DEFAULT, LEAST_FONT, Venue

MOST_ARMS = 6
CELL, AROUND = 0.28, 1.05
"""Inches of a row of a transfer matrix, and of what is around its rows."""


def together(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """What training with others did to each task: the difference to the same arm of it alone."""
    tests = analysis.tables["tests"]
    tests = tests[(tests["family"] == FIELD) & (tests["metric"] == analysis.metric) & tests["low"].notna()]
    if tests.empty:
        return "no task was trained alone as it was with others"
    names = {name: shown.named(analysis, str(name)) for name in tests["setting"].unique()}
    labels = [brief(analysis, names[row["setting"]][row["b"]][1]) for row in tests.to_dict("records")]
    tests = shown.first(tests.assign(label=labels).sort_values(["setting", "label"], kind="stable"))
    figure, axes = layout.panels(
        venue, shown.settings(tests), height=layout.TEST[1] + layout.TEST[0] * shown.most_of(tests),
        wide=max(map(len, labels)) > layout.LONG,
    )  # fmt: skip
    for name, ax in axes.items():
        draw.forest(ax, tests[tests["setting"] == name])
        layout.shorten(ax, share=0.6)
        ax.set_xlabel(f"{title(analysis.metric)},\ntogether − alone")
    layout.finish(figure, axes, {}, "", beside=True)
    layout.thin(figure, axes.values())
    return figure


def brief(analysis: Analysis, label: str) -> str:
    """The name of an arm, shorter: without what all arms that were trained with others have in common."""
    runs = analysis.found.runs
    known = [str(one) for one in runs[FIELD].unique() if one != ALONE] if FIELD in runs else []
    if len(known) > 1:
        return label
    labels = {
        arm.label for setting in analysis.found.settings for arm in setting.arms if f"{FIELD}={known[0]}" in arm.label
    }
    every = [one.replace(f"{FIELD}={known[0]}", "").split() for one in {*labels, label}]
    options = [key.split(".")[-1] for key in runs if key.startswith(f"{FIELD}.option.")]
    common = set.intersection(*map(set, every)) if len(every) > 1 else set()
    words = [
        word.removeprefix("sharing=")
        for word in label.replace(f"{FIELD}={known[0]}", "").split()
        if word.split("=")[0] not in options and word not in common
    ]
    return " ".join(words) or label


def transfer(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """How far the NLL of each task through another's blocks lies above that through its own, an arm a panel."""
    table = analysis.tables["transfer"]
    if table.empty:
        return "no run has tasks with blocks of their own"
    table = table.assign(arm=[brief(analysis, label) for label in table["arm"]])
    arms = list(dict.fromkeys(table["arm"]))[:MOST_ARMS]
    tasks = sorted(set(table["task"]) | set(table["adapter"]))
    figure, axes = layout.panels(venue, arms, height=AROUND + CELL * len(tasks), wide=len(tasks) > 3)
    top = float(table["rise"].max())
    for name, ax in axes.items():
        matrix_TT = np.zeros((len(tasks), len(tasks)))
        for row in table[table["arm"] == name].to_dict("records"):
            matrix_TT[tasks.index(row["task"]), tasks.index(row["adapter"])] = row["rise"]
        _matrix(ax, matrix_TT, tasks, top)
        ax.set_xlabel("through the blocks of")
    layout.finish(figure, axes, {}, "task scored", beside=True)
    return figure


def experts(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Which experts of a learnt gate the examples of each task go through, an arm a panel."""
    maps = {brief(analysis, arm): one for arm, one in by_expert(analysis.found).items()}
    shown_maps = dict(list(maps.items())[:MOST_ARMS])
    most = max(len(one) for one in shown_maps.values())
    figure, axes = layout.panels(venue, list(shown_maps), height=AROUND + CELL * most)
    for name, ax in axes.items():
        gates_TK = shown_maps[name]
        ax.imshow(gates_TK, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
        for i, j in np.ndindex(gates_TK.shape):
            gate = float(gates_TK.iloc[i, j])
            colour = "white" if gate > 0.55 else "black"
            ax.text(j, i, f"{gate:.2f}", ha="center", va="center", fontsize=LEAST_FONT, color=colour)
        ax.set_xticks(range(gates_TK.shape[1]), [str(k + 1) for k in range(gates_TK.shape[1])])
        ax.set_yticks(range(len(gates_TK)), [layout.shortened(str(task), 14) for task in gates_TK.index])
        ax.set_xlabel("expert")
        ax.tick_params(length=0)
        ax.grid(visible=False)
    layout.finish(figure, axes, {}, "", beside=True)
    return figure


def _matrix(ax: Axes, matrix_TT: np.ndarray, tasks: Sequence[str], top: float) -> None:
    ax.imshow(matrix_TT, cmap="cividis_r", vmin=min(0.0, float(matrix_TT.min())), vmax=max(top, 1e-9), aspect="auto")
    places = 2 if len(tasks) < 4 else 1  # more would run into one another
    for i in range(len(tasks)):
        for j in range(len(tasks)):
            text = "own" if i == j else f"{matrix_TT[i, j]:+.{places}f}"
            dark = matrix_TT[i, j] > 0.55 * top
            ax.text(j, i, text, ha="center", va="center", fontsize=LEAST_FONT, color="white" if dark else "black")
    short = [layout.shortened(task, 14) for task in tasks]
    ax.set_xticks(range(len(tasks)), short, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(tasks)), short)
    ax.tick_params(length=0)
    ax.grid(visible=False)


def forgetting_curves(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Scores of each task while the tasks are learnt one after another, an arm a panel; of the first order there is."""
    panels: dict[str, pd.DataFrame] = {}
    tasks: list[str] = []
    for (_, arm), runs in continual.sequences(analysis.found).items():
        order = runs[0][0]
        tasks = tasks or order.split(THEN)
        found = [_curve(folder, one.split(THEN), analysis) for one, folder in runs if one == order]
        found = [curve for curve in found if len(curve)]
        if found and len(panels) < MOST_ARMS:
            panels[arm] = pd.concat(found).groupby(["task", "step"], as_index=False)["value"].mean()
    if not panels:
        return "no run has tasks one after another"
    look: dict[str, Look] = looks(tasks)
    panels = dict(zip(_without_common(list(panels)), panels.values(), strict=True))
    figure, axes = layout.panels(venue, list(panels), wide=True)
    for name, ax in axes.items():
        for task, part in panels[name].groupby("task", sort=False):
            one = look[str(task)]
            ax.plot(
                part["step"], part["value"], color=one.colour, marker=one.marker, linestyle=one.line, markersize=3.5
            )
        ends = np.linspace(0, panels[name]["step"].max(), len(tasks) + 1)[1:-1]
        for end in ends:
            ax.axvline(end, color=GREY, linewidth=0.5, linestyle=":")
        ax.set_xlabel("step")
    layout.finish(figure, axes, look, f"{analysis.found.split} {title(analysis.metric)}")
    return figure


def library(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """What each rule over a library of adapters does beside the best single member, a task a panel."""
    table = analysis.tables["library"]
    table = table[(table["metric"] == "nll") & (table["rule"] != BEST) & table["low"].notna()]
    if table.empty:
        return "no library was scored on a task of several examples"
    several = table.groupby("task")["library"].nunique()
    names = [f"{t} {one}" if several[t] > 1 else t for t, one in zip(table["task"], table["library"], strict=True)]
    table = table.assign(setting=names, label=table["rule"], significant=table["p_holm"] < 0.05)
    figure, axes = layout.panels(
        venue, shown.settings(table), height=layout.TEST[1] + layout.TEST[0] * shown.most_of(table)
    )
    for name, ax in axes.items():
        draw.forest(ax, table[table["setting"] == name])
        ax.set_xlabel(f"{title('nll')},\nrule − best single member")
    layout.finish(figure, axes, {}, "", beside=True)
    layout.thin(figure, axes.values())
    return figure


def _curve(folder: Path, tasks: Sequence[str], analysis: Analysis) -> pd.DataFrame:
    return continual.curve(folder, tasks, analysis.metric, split=analysis.found.split)


def learning_forgetting(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """What arms learn of each task while they learn it against what they forget of it later, with the front of both."""
    table = analysis.tables["continual"]
    table = table[(table["metric"] == analysis.metric) & table["forgetting"].notna()].reset_index(drop=True)
    if table.empty:
        return "no run has tasks one after another"
    look = _by_strategy(list(dict.fromkeys(table["arm"])))
    names = dict(zip(look, _without_common(list(look)), strict=True))
    figure, axes = layout.panels(venue, list(dict.fromkeys(table["model"])), wide=len(look) > layout.MANY)
    unit = " (nats/token)" if analysis.metric == "nll" else ""
    for name, ax in axes.items():
        draw.learning_forgetting(ax, table[table["model"] == name], look)
        ax.set_xlabel(f"forgotten by the end{unit}")
    layout.finish(
        figure, axes, look, f"gain in {title(analysis.metric)}\nwhile learnt{unit}", lines=False, names=names
    )  # fmt: skip
    layout.thin(figure, axes.values())
    return figure


def _by_strategy(arms: Sequence[str]) -> dict[str, Look]:
    """A colour for how tasks share, and a marker for the rest: placement and rank; where that is one, for both."""
    own = {arm: " ".join(word for word in arm.split() if "=" in word) for arm in arms}
    rest = {arm: " ".join(word for word in arm.split() if "=" not in word) for arm in arms}
    colours, marks = looks(sorted(set(own.values()))), looks(sorted(set(rest.values())))
    if len(marks) == 1:
        return {arm: colours[own[arm]] for arm in arms}
    return {
        arm: replace(colours[own[arm]], marker=marks[rest[arm]].marker)
        for arm in sorted(arms, key=lambda one: (own[one], rest[one]))
    }


def _without_common(arms: Sequence[str]) -> list[str]:
    """Names of arms without the words that all have, and the sharing by its value alone."""
    words = [arm.split() for arm in arms]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set[str]()
    kept = [[word.removeprefix("sharing=") for word in own if word not in common] for own in words]
    return [" ".join(own) or arm for own, arm in zip(kept, arms, strict=True)]


MAKERS = {
    "together": together, "transfer": transfer, "forgetting_curves": forgetting_curves,
    "learning_forgetting": learning_forgetting,
}  # fmt: skip
"""Of a study that has runs of several tasks."""
