"""Figures of a lattice: every subset by size and score, and what each role is worth."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import layout
from .analyse import Analysis
from .lattice import Lattice, aligned, lattices
from .style import GREY
from .tables import title
from .venues import DEFAULT, LEAST_FONT, Venue

BLUE, ORANGE = "#0072B2", "#D55E00"
ROW = 0.19
"""Inches of a row of values."""
MOST_PAIRS = 10


def subsets(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """Every subset a point at its number of parts, joined to those with one part more; the best and the worst of each
    size are named, and the best of each size joined."""
    every = list(lattices(analysis.found))
    if not every:
        return "no lattice of roles"
    figure, axes = layout.panels(venue, [_name(one) for one in every], height=3.1, wide=True, across=2)
    for one in every:
        _draw_subsets(axes[_name(one)], one, analysis.metric)
    layout.finish(figure, axes, {}, f"gain in {title(analysis.metric)} over the base model")
    return figure


def _name(lattice: Lattice) -> str:
    return f"{lattice.setting.name} {lattice.study}".strip()


def _draw_subsets(ax: Axes, lattice: Lattice, metric: str) -> None:
    scores = aligned(lattice, metric)
    if scores is None:
        return
    gain = scores.means()
    for small in gain:
        for large in gain:
            if len(large) == len(small) + 1 and small < large:
                ax.plot([len(small), len(large)], [gain[small], gain[large]], color=GREY, alpha=0.25, linewidth=0.4)
    ax.plot([len(s) for s in gain], list(gain.values()), ".", color=GREY, markersize=3, zorder=3)
    ends = []
    for size in sorted({len(s) for s in gain}):
        own = sorted((s for s in gain if len(s) == size), key=lambda s: gain[s])
        ends.append((size, gain[own[-1]]))
        for subset, colour, above in ((own[-1], BLUE, True), (own[0], ORANGE, False))[: 2 if len(own) > 1 else 1]:
            ax.plot(size, gain[subset], ".", color=colour, markersize=6, zorder=4)
            ax.annotate(
                _folded(lattice.name(subset)), (size, gain[subset]), xytext=(0, 4 if above else -4),
                textcoords="offset points", ha="center", va="bottom" if above else "top", fontsize=LEAST_FONT,
                color=colour,
            )  # fmt: skip
    ax.plot(*zip(*ends, strict=True), color=BLUE, linewidth=1.0, zorder=3.5)
    ax.margins(x=0.12, y=0.2)
    ax.set_xticks(range(1, len(lattice.parts) + 1))
    ax.set_xlabel("parts of the adapter")


def _folded(text: str, most: int = 9) -> str:
    """A sum over several lines, each of at most so many letters."""
    lines = [""]
    for part in text.replace("+", " +").split(" "):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def values(analysis: Analysis, venue: Venue = DEFAULT) -> Figure | str:
    """What each part is worth and which pairs are worth more, or less, together than apart."""
    table = analysis.tables["lattice"]
    table = table[table["metric"] == analysis.metric]
    if table.empty:
        return "no complete lattice of roles"
    names = (table["setting"] + " " + table["study"]).str.strip()
    most = 0
    shown = {}
    for name in dict.fromkeys(names):
        own = table[names == name]
        pairs = own[own["kind"] == "interaction"]
        pairs = pairs.loc[pairs["estimate"].abs().sort_values(ascending=False).index[:MOST_PAIRS]]
        own = own[own["kind"] == "value"].sort_values("estimate")
        shown[name] = pairs.sort_values("estimate"), own
        most = max(most, len(own) + len(pairs))
    figure, axes = layout.panels(venue, list(shown), height=0.6 + ROW * (most + 1), wide=True, across=2)
    for name, ax in axes.items():
        pairs, own = shown[name]
        rows = [*pairs.to_dict("records"), *own.to_dict("records")]
        for place, row in enumerate(rows):
            y = place + (row["kind"] == "value")
            colour = BLUE if row["kind"] == "value" else ORANGE
            clear = np.isfinite([row["low"], row["high"]]).all() and not row["low"] <= 0 <= row["high"]
            ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=0.9)
            ax.plot(row["estimate"], y, "o", color=colour, markersize=3.5, markerfacecolor=colour if clear else "white")
        ax.set_yticks([i + (row["kind"] == "value") for i, row in enumerate(rows)], [row["term"] for row in rows])
        ax.axvline(0, color=GREY, linewidth=0.6)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"gain in {title(analysis.metric)}")
    layout.finish(figure, axes, {}, "", beside=True)
    return figure


MAKERS: dict[str, Callable[..., Figure | str]] = {"lattice": subsets, "lattice_values": values}
