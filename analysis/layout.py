"""How panels, titles and legends lie on a venue's page. No text is smaller than `venues.LEAST_FONT`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from . import draw
from .arms import FULL
from .style import FADED, OTHERS, Look
from .tables import DAGGER
from .venues import LEAST_FONT, Venue

PANEL_HEIGHT = 1.95
WIDE = 1.3
"""How much higher a panel is that takes the whole text."""
TITLE_FONT, TITLE_ROOM = 8.0, 0.7
"""Points, and the share of a panel's width, axis labels included, that a title may take."""
LETTER = 0.62
"""Width of a letter over its height, on average."""
MINUS = " − "
MANY, LONG = 6, 24
"""Entries of a legend, and letters of the names beside a panel, from which on one panel takes the whole text."""
ARM, TEST, HEAT = (0.135, 0.45), (0.15, 0.55), (0.3, 0.75)
"""Inches of a row of these panels, and of what is above and below their rows."""


def panels(
    venue: Venue, names: Sequence[str], height: float = PANEL_HEIGHT, *, wide: bool = False, across: int | None = None
) -> tuple[Figure, dict[str, Axes]]:
    """A panel a setting: one fits a column, several, or one that is `wide`, take the text. No figure is higher than the
    page. At most `across` stand side by side, where that is less than the venue's."""
    columns = min(len(names), venue.across, across or venue.across)
    rows = -(-len(names) // columns)
    height *= WIDE if height == PANEL_HEIGHT and wide and columns == 1 else 1.0
    size = (venue.width(len(names), wide=wide), min(0.25 + height * rows, venue.height))
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = {name: grid[i // columns][i % columns] for i, name in enumerate(names)}
    for unused in list(grid.flat)[len(names) :]:
        unused.set_visible(False)
    return figure, axes


def rows_that_fit(venue: Venue, panels: int, row: float, rest: float) -> int:
    """How many rows of so many inches each of several panels can have, beside the `rest` of its height."""
    panels_below = -(-panels // min(panels, venue.across))
    return max(1, int(((venue.height - 0.6) / panels_below - rest) / row))


def by_rank(
    venue: Venue, settings: Sequence[str], ranks: Sequence[float], *, sharex: bool = False
) -> tuple[Figure, dict[tuple[str, float], Axes]]:
    """A row a setting and a column a rank, or settings side by side where there is one rank; each panel is titled."""
    beside = len(ranks) == 1
    shape = (1, len(settings)) if beside else (len(settings), len(ranks))
    figure, grid = plt.subplots(
        *shape, figsize=(venue.width(max(shape)), 0.5 + 1.55 * shape[0]), sharex=sharex and not beside,
        sharey=False if beside else "row", squeeze=False, layout="constrained",
    )  # fmt: skip
    rows = grid.T if beside else grid
    axes = {(name, rank): rows[i][j] for i, name in enumerate(settings) for j, rank in enumerate(ranks)}
    texts = [", ".join([name] * (len(settings) > 1) + [f"rank {rank:g}"] * (not beside)) for name, rank in axes]
    broken = any(
        TITLE_FONT * len(text) > TITLE_ROOM * letters(ax) for text, ax in zip(texts, axes.values(), strict=True)
    )
    for text, ax in zip(texts, axes.values(), strict=True):
        title(ax, text.replace(", ", "\n") if broken else text)
    return figure, axes


def module_maps(
    venue: Venue, tables: Mapping[str, pd.DataFrame], value: str, label: str, top: float, *,
    ticks: Sequence[float] | None = None, around: bool = False,
) -> Figure:  # fmt: skip
    """A panel an arm with a value by role and layer, and one colour bar from 0 to `top`, or from -top `around` 0."""
    columns = 2 if len(tables) == 4 else min(len(tables), venue.across)
    rows = -(-len(tables) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(venue.width(len(tables)), 0.15 + 1.6 * rows), squeeze=False, layout="constrained"
    )
    for ax, (name, table) in zip(grid.flat, tables.items(), strict=False):
        image = draw.by_role_and_layer(ax, table, value, top, around=around)
        title(ax, name)
    for unused in list(grid.flat)[len(tables) :]:
        unused.set_visible(False)
    figure.colorbar(image, ax=list(grid.flat), label=label, shrink=0.9, pad=0.01, ticks=ticks)
    return figure


def finish(
    figure: Figure, axes: Mapping[str, Axes], look: Mapping[str, Look], label: str, *, lines: bool = True,
    doubted: Collection[str] = (),
    names: Mapping[str, str] | None = None, beside: bool = False,
) -> None:  # fmt: skip
    """Titles where there are several panels, the label of the left ones, and the legend."""
    for name, ax in axes.items():
        if len(axes) > 1:
            title(ax, name, beside=beside)
        spec = ax.get_subplotspec()
        if label and spec is not None and spec.is_first_col():
            ax.set_ylabel(label)
    legend(figure, look, lines=lines, doubted=doubted, names=names)


def letters(ax: Axes) -> float:
    """How many letters of one point are as wide as a panel."""
    spec, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    assert spec is not None
    assert figure is not None
    return 72 * float(figure.get_figwidth()) / spec.get_gridspec().ncols / LETTER


def shortened(text: str, most: int) -> str:
    """At most so many letters, without the middle ones."""
    half = max(2, most // 2)
    return text if len(text) <= 2 * half else f"{text[: half - 1]}…{text[-half:]}"


def shorten(ax: Axes, share: float = 0.5) -> None:
    """Takes the middle out of names beside a panel that would take more than a share of its width."""
    most = int(share * letters(ax) / LEAST_FONT)
    names = [label.get_text() for label in ax.get_yticklabels()]
    ax.set_yticks(ax.get_yticks(), [_of_two(name, most) for name in names])


def _of_two(text: str, most: int) -> str:
    """The name of an arm, or of a difference between two, each of which is shortened."""
    parts = text.split(MINUS)
    return text if len(text) <= most else MINUS.join(shortened(one, most // len(parts) - 2) for one in parts)


def thin(figure: Figure, axes: Iterable[Axes]) -> None:
    """Fewer labels on horizontal axes where they would touch each other, once the layout is known."""
    figure.draw_without_rendering()
    for ax in axes:
        for count in (4, 3, 2, 1):
            low, high = ax.get_xlim()
            boxes = [
                tick.label1.get_window_extent()
                for tick in ax.xaxis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_text()
            ]
            if all(a.x1 + 0.3 * LEAST_FONT / 72 * figure.dpi < b.x0 for a, b in pairwise(boxes)):
                break
            ax.xaxis.set_major_locator(MaxNLocator(count))


def title(ax: Axes, text: str, *, beside: bool = False) -> None:
    """A title that stays over its panel: a long one has two lines, is smaller, or loses its middle.

    Args:
        beside: whether names beside the panel leave it little width, so that a long title starts over these.
    """
    room = TITLE_ROOM * letters(ax)
    text = text if TITLE_FONT * len(text) <= room else text.replace(", ", "\n")
    lines = [shortened(line, int(room / LEAST_FONT)) for line in text.split("\n")]
    size = min(TITLE_FONT, room / max(1, *map(len, lines)))
    ax.set_title("\n".join(lines), fontsize=max(LEAST_FONT, size))
    if beside and size * max(map(len, lines)) > 0.4 * letters(ax):
        ax.title.set(x=1.0, ha="right")


def legend(
    figure: Figure, look: Mapping[str, Look], *, lines: bool = True, doubted: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """The looks by name over the panels, grey ones together; without `lines` where the figure has points only.

    Args:
        doubted: entries that bear a dagger.
        names: what to write for a kind, if not its own name.
    """
    if len(look) < 2:
        return
    entries = {name: one for name, one in look.items() if one != FADED}
    others = len(look) - len(entries)
    texts = {name: (names or {}).get(name, name) + DAGGER * (name in doubted) for name in entries}
    if others:
        entries[OTHERS] = FADED
        texts[OTHERS] = f"{others} others" + DAGGER * (OTHERS in doubted)
    handles = [
        Line2D(
            [], [], color=one.colour, marker=one.marker, linestyle=one.line if lines or name == FULL else "none",
            label=texts[name],
        )
        for name, one in entries.items()
    ]  # fmt: skip
    place: dict[str, Any] = {"handles": handles, "loc": "outside upper center", "handlelength": 2.6}
    for columns in range(min(len(entries), 5), 0, -1):
        found = figure.legend(ncols=columns, **place)
        wide = found.get_window_extent().width / figure.bbox.width
        if wide <= 1:
            break
        found.remove()
    else:
        most = int(72 * figure.get_figwidth() / LETTER / LEAST_FONT) - 8
        for handle in handles:
            handle.set_label(shortened(str(handle.get_label()), most))
        figure.legend(ncols=1, **place)
    rows = -(-len(entries) // columns)
    figure.set_figheight(figure.get_figheight() + 0.14 * max(rows - 2, 0))  # not at the panels' cost
