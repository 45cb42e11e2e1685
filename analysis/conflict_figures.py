"""Figures of what tasks do to one another inside an adapter: gradients that conflict, and ranks that blocks spend."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweeper import installation

from . import conflict, layout
from .analyse import Analysis
from .blocks import EVERY
from .style import GREY, SEQUENTIAL, Look, looks
from .task_figures import MOST_ARMS, brief
from .venues import DEFAULT, LEAST_FONT, Venue

MOST_MAPS, MOST_PAIRS, MOST_BLOCKS = 4, 7, 4
CELL, AROUND = 0.24, 1.0
"""Inches of a row of a map of blocks, and of what is around its rows."""


def by_module(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Mean cosine between the tasks' gradients by role and layer, an arm a panel."""
    table = analysis.tables["conflict_by_layer"]
    if table.empty:
        return "no run compared its tasks' gradients (evaluation.conflict=8), or none of them share a block"
    arms = list(dict.fromkeys(table["arm"]))[:MOST_MAPS]
    shown = table[table["arm"].isin(arms)]
    maps = {brief(analysis, arm): shown[shown["arm"] == arm] for arm in arms}
    top = float(np.ceil(shown["cosine"].abs().max() * 20) / 20) or 0.05
    return layout.module_maps(venue, maps, "cosine", "cosine of gradients", top, ticks=[-top, 0, top], around=True)


def curves(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Cosine over the whole adapter while it trains, a line a pair of tasks, an arm a panel."""
    panels: dict[str, pd.DataFrame] = {}
    for _, arm in conflict.arms(analysis.found):
        found = conflict.over_training(arm)
        if len(found) and len(panels) < MOST_ARMS:
            panels[brief(analysis, arm.label)] = found
    if not panels:
        return "no run compared its tasks' gradients (evaluation.conflict=8), or none of them share a block"
    every = pd.concat(panels.values())
    lowest = every.groupby("pair")["cosine"].mean().sort_values()
    pairs = [str(pair) for pair in lowest.index[:MOST_PAIRS]]
    look: dict[str, Look] = looks(pairs)
    figure, axes = layout.panels(venue, list(panels), wide=True)
    shown = every[every["pair"].isin(pairs)]
    low, high = np.nanmin(shown[["cosine", "low"]]), np.nanmax(shown[["cosine", "high"]])
    for name, ax in axes.items():
        ax.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        ax.axhline(0, color=GREY, linewidth=0.6)
        for pair in pairs:
            part = panels[name][panels[name]["pair"] == pair].sort_values("step")
            _line(ax, part, look[pair])
        ax.set_xlabel("step")
    layout.finish(figure, axes, look, "cosine of gradients")
    return figure


def _line(ax: Axes, part: pd.DataFrame, look: Look) -> None:
    ax.plot(part["step"], part["cosine"], color=look.colour, marker=look.marker, linestyle=look.line, markersize=3.0)
    if part["low"].notna().any():
        ax.fill_between(part["step"], part["low"], part["high"], color=look.colour, alpha=0.12, linewidth=0)


def block_ranks(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """How much of its rank each block spends, by role; an arm a panel."""
    table = analysis.tables["block_spectra"]
    table = table[table["role"] != EVERY]
    if table.empty:
        return (
            f"no run with rank blocks has spectra ({installation.program('adapters')} spectra outputs/STUDY makes them)"
        )
    arms = list(dict.fromkeys(table["arm"]))[:MOST_BLOCKS]
    rows = max(table[table["arm"] == arm]["block"].nunique() for arm in arms)
    columns = max(table[table["arm"] == arm]["role"].nunique() for arm in arms)
    names = {brief(analysis, arm): table[table["arm"] == arm] for arm in arms}
    figure, axes = layout.panels(
        venue, list(names), height=AROUND + CELL * rows, wide=columns > 3, across=2 if columns > 4 else None
    )
    for name, ax in axes.items():
        image = _blocks(ax, names[name])
    layout.finish(figure, axes, {}, "block, its rank", beside=True)
    figure.colorbar(
        image, ax=list(axes.values()), label="effective rank over rank", shrink=0.9, pad=0.01, ticks=[0, 0.5, 1]
    )
    return figure


def _blocks(ax: Axes, part: pd.DataFrame) -> Any:
    """Effective rank over rank by block (rows) and role (columns); white where there is none. The effective rank is
    written in the cell, and the rank beside the block where it is the same everywhere."""
    used, spent, ranks = (
        part.pivot_table(index="block", columns="role", values=value, sort=False)
        for value in ("used", "effective_rank", "ranks")
    )
    image = ax.imshow(used.to_numpy(dtype=float), cmap=f"{SEQUENTIAL}_r", vmin=0, vmax=1, aspect="auto")
    for i in range(used.shape[0]):
        for j in range(used.shape[1]):
            if np.isfinite(used.iat[i, j]):
                text = f"{spent.iat[i, j]:.1f}" if spent.iat[i, j] < 9.95 else f"{spent.iat[i, j]:.0f}"
                colour = "white" if used.iat[i, j] > 0.5 else "black"
                ax.text(j, i, text, ha="center", va="center", fontsize=LEAST_FONT, color=colour)
    ax.set_xticks(
        range(used.shape[1]), [str(role) for role in used.columns], rotation=35, ha="right", rotation_mode="anchor"
    )
    given = [own.dropna().unique() for _, own in ranks.iterrows()]
    blocks = [
        layout.shortened(str(block), 14) + (f", {own[0]:g}" if len(own) == 1 else "")
        for block, own in zip(used.index, given, strict=True)
    ]
    ax.set_yticks(range(len(blocks)), blocks)
    ax.grid(visible=False)
    ax.set_xticks(np.arange(used.shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(used.shape[0] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    return image


MAKERS = {"conflict": by_module, "conflict_curves": curves, "block_ranks": block_ranks}
"""Of a study that has runs of several tasks."""
