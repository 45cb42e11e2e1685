"""Drawing: each function puts one table on one Axes. Nothing here reads files or chooses colours."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from .style import DIVERGING, FADED, GREY, SEQUENTIAL, Look
from .tables import DAGGER
from .venues import LEAST_FONT


def amount(value: float, _: Any = None) -> str:
    """1.2M for 1,200,000."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g}T"


def level(ax: Axes, row: pd.Series, metric: str, look: Look, *, upright: bool = False) -> None:
    """One arm as a line over the whole panel, with its bar as a band: a level to compare with."""
    line, span = (ax.axvline, ax.axvspan) if upright else (ax.axhline, ax.axhspan)
    line(row[metric], color=look.colour, linestyle=look.line, linewidth=0.9, zorder=1.5)
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    if np.isfinite([low, high]).all():
        span(low, high, color=look.colour, alpha=0.12, linewidth=0, zorder=0.5)


def reference_level(ax: Axes, arms: pd.DataFrame, metric: str, *, upright: bool = False) -> None:
    """A thin line at the score of the reference arm, which a bar reaches where its arm does not differ."""
    for value in arms.loc[arms["is_reference"], metric].head(1):
        (ax.axvline if upright else ax.axhline)(value, color=GREY, linewidth=0.5, linestyle=(0, (6, 3)), zorder=1)


def scatter(ax: Axes, arms: pd.DataFrame, metric: str, cost: str, looks: Mapping[str, Look]) -> None:
    """Cost against quality: an arm a point with its bar; members of the front filled and joined."""
    for placement, group in arms.groupby("placement", sort=False):
        look = looks[str(placement)]
        for inside, part in group.groupby(group["on_front"].fillna(False).astype(bool)):
            ax.errorbar(
                part[cost], part[metric], yerr=None if look == FADED else _errors(part, metric), fmt=look.marker,
                capsize=0, markerfacecolor=look.colour if inside else "white", **_weights(look),
            )  # fmt: skip
    members = arms[arms["on_front"].fillna(False).astype(bool)].sort_values(cost)
    ax.step(members[cost], members[metric], where="post", color=GREY, linewidth=0.8, zorder=1)
    _log_ticks(ax, arms[cost])
    _room(ax, arms, metric)


def _weights(look: Look) -> dict[str, Any]:
    """How heavily points and bars of a look are drawn: grey ones lie behind."""
    if look == FADED:
        return {"color": look.colour, "elinewidth": 0.4, "markersize": 2.5, "markeredgewidth": 0.6, "zorder": 2}
    return {"color": look.colour, "elinewidth": 0.8, "markeredgewidth": 1.0, "zorder": 3}


def _errors(arms: pd.DataFrame, metric: str) -> Any:
    """(2, A) lengths of the bars below and above; NaN where an arm has none."""
    values = arms[[f"{metric}_low", f"{metric}_high"]].to_numpy(dtype=float).T - arms[metric].to_numpy(dtype=float)
    return np.abs(values)


def point_labels(ax: Axes, arms: pd.DataFrame, metric: str, cost: str, *, higher: bool, ranks: bool) -> None:
    """The rank beside each point (of many arms: those of the front) of a `scatter` that has its final layout, and a
    dagger beside those that are `marked`.

    A rank that would cover another label or another point in all four places is left out; a dagger never is.
    """
    inside = arms["on_front"].fillna(False).astype(bool)
    numbered = (inside | (len(arms) <= MOST_NUMBERED)) & arms["rank"].notna() & ranks
    point = ax.figure.dpi / 72
    places = ax.transData.transform(arms[[cost, metric]].to_numpy(dtype=float))
    taken = [Bbox([place - 3 * point, place + 3 * point]) for place in places]
    taken += [
        Bbox([[x - point, down], [x + point, up]])
        for (x, _), down, up in zip(
            places, *(_pixels(ax, arms[f"{metric}_{side}"]) for side in ("low", "high")), strict=True
        )
        if np.isfinite(down)
    ]
    rows = arms.assign(numbered=numbered)[numbered | arms["marked"]]
    # from above, so that the upper one of two takes the upper side
    for row in rows.sort_values(metric, ascending=False).to_dict("records"):
        x, y = ax.transData.transform((row[cost], row[metric]))
        # No arm lies on the cheap and good side of the front, so its labels stand there; the others' opposite.
        first, below = bool(row["on_front"]), higher != bool(row["on_front"])
        sides = [(first, below), (first, not below), (not first, below), (not first, not below)]
        mark = DAGGER if row["marked"] else ""
        texts = [f"{row['rank']:g}{mark}", mark] if row["numbered"] else [mark]
        free = [(text, left, down) for text in texts if text for left, down in sides]
        boxes = {one: _beside(x, y, one, point) for one in free}
        chosen = next(
            (one for one in free if not boxes[one].count_overlaps(taken)), (mark, *sides[0]) if mark else None
        )
        if chosen is None:
            continue
        text, left, down = chosen
        taken.append(_beside(x, y, chosen, point))
        label = ax.annotate(
            text, (row[cost], row[metric]), xytext=(-4 if left else 4, -3 if down else 3), fontsize=LEAST_FONT,
            textcoords="offset points", ha="right" if left else "left", va="top" if down else "bottom",
        )  # fmt: skip
        label.set(color=GREY, zorder=5, path_effects=[withStroke(linewidth=1.5, foreground="white")])


MOST_NUMBERED = 12


def _pixels(ax: Axes, values: pd.Series) -> Any:
    """Heights on the canvas."""
    return ax.transData.transform(np.column_stack([np.full(len(values), ax.get_xlim()[0]), values.astype(float)]))[:, 1]


def _beside(x: float, y: float, label: tuple[str, bool, bool], point: float) -> Bbox:
    """The box of a label that lies left or right of a point, and below or above it."""
    text, left, down = label
    wide, tall = 4.6 * len(text) * point, 7 * point
    return Bbox.from_bounds(
        x - 4 * point - wide if left else x + 4 * point, y - 3 * point - tall if down else y + 3 * point, wide, tall
    )


def dagger(ax: Axes, x: float, y: float, colour: str = GREY, offset: tuple[float, float] = (3.5, 2.0)) -> None:
    """A dagger beside a point."""
    mark = ax.annotate(
        DAGGER, (x, y), xytext=offset, textcoords="offset points", fontsize=LEAST_FONT, color=colour, ha="left",
        va="bottom", annotation_clip=False,
    )  # fmt: skip
    mark.set(zorder=6, path_effects=[withStroke(linewidth=1.5, foreground="white")])


def _over_bar(ax: Axes, x: float, y: float, end: float, look: Look) -> None:
    """A dagger over the bar of a point, or over a point that has none."""
    bare = look == FADED or not np.isfinite(end)
    dagger(ax, x, y if bare else end, look.colour, (-2.0, 3.0 if bare else 0.5))


def dots(ax: Axes, arms: pd.DataFrame, metric: str) -> None:
    """A row an arm, the first on top, with its bar; an arrow where that goes on outside the axis. Columns: label, the
    metric and its bounds."""
    low, high = limits(arms, metric)
    rows = np.arange(len(arms))[::-1]
    begins, ends = (arms[f"{metric}_{end}"].clip(low, high) for end in ("low", "high"))
    ax.hlines(rows, begins, ends, color="#0072B2", linewidth=0.8)
    ax.plot(arms[metric], rows, "o", color="#0072B2", markersize=3.5)
    for marker, edge, cut in (("<", low, arms[f"{metric}_low"] < low), (">", high, arms[f"{metric}_high"] > high)):
        outside = rows[cut.to_numpy()]
        ax.plot(np.full(len(outside), edge), outside, marker, color="#0072B2", markersize=3)
    ax.set_yticks(rows, [str(label) for label in arms["label"]])
    ax.set_ylim(-0.6, len(arms) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def forest(ax: Axes, tests: pd.DataFrame) -> None:
    """A row a comparison, the first on top: the difference with its interval about the line of none, filled where it is
    significant. Columns: label, difference, low, high, significant."""
    rows = np.arange(len(tests))[::-1]
    ax.axvline(0, color=GREY, linewidth=0.7)
    for sure, face in ((True, "#0072B2"), (False, "white")):
        part, at = tests[tests["significant"] == sure], rows[(tests["significant"] == sure).to_numpy()]
        ax.hlines(at, part["low"], part["high"], color="#0072B2", linewidth=0.9)
        ax.plot(part["difference"], at, "o", color="#0072B2", markerfacecolor=face, markersize=3.8)
    ax.set_yticks(rows, [str(label) for label in tests["label"]])
    ax.set_ylim(-0.6, len(tests) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def detectable(ax: Axes, power: pd.DataFrame) -> None:
    """The smallest difference that is found, against seeds, a line a number of groups, which stands at its end; the
    study's own design ringed.
    Columns: seeds, groups, detectable, own_design."""
    for (groups, part), line in zip(power.groupby("groups"), ("-", "--", ":", "-."), strict=False):
        part = part.sort_values("seeds")
        ax.plot(part["seeds"], part["detectable"], line, color="#0072B2", marker="o", markersize=3)
        end = (part["seeds"].iloc[-1], part["detectable"].iloc[-1])
        ax.annotate(f"{groups:,}", end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=LEAST_FONT)
    own = power[power["own_design"]]
    ax.plot(own["seeds"], own["detectable"], "o", color="#D55E00", markerfacecolor="none", markersize=8)
    ax.set_xscale("log")
    seeds = sorted(power["seeds"].unique())
    ax.set_xlim(seeds[0] / 1.2, seeds[-1] * (seeds[-1] / seeds[0]) ** 0.25)
    ax.xaxis.set_major_locator(FixedLocator(seeds))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    _log_height(ax, power["detectable"], 1)


def profiles(ax: Axes, table: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    """The share of runs that reach a normalised score, a line an arm with its band. Columns: arm, level, share, low,
    high."""
    for arm, part in table.groupby("arm", sort=False):
        look = looks[str(arm)]
        if look != FADED:
            ax.fill_between(part["level"], part["low"], part["high"], color=look.colour, alpha=0.08, linewidth=0)
        ax.plot(part["level"], part["share"], **_line(look))
    ax.set_ylim(-0.02, 1.02)


def _line(look: Look) -> dict[str, Any]:
    """A line of a look: grey ones are thin and lie behind."""
    faded: dict[str, Any] = {"linewidth": 0.6, "zorder": 1.5} if look == FADED else {}
    return {"color": look.colour, "linestyle": look.line, **faded}


def rank_lines(ax: Axes, arms: pd.DataFrame, metric: str, looks: Mapping[str, Look]) -> None:
    """Score against rank, a line a placement with the bars of its arms, side by side; those without a rank are levels.
    Columns: placement, rank, marked, the metric and its bounds."""
    ranks = sorted(arms["rank"].dropna().unique())
    gap = min((np.log2(high / low) for low, high in pairwise(ranks)), default=1.0)
    groups = list(arms.groupby("placement", sort=False))
    own = [name for name, _ in groups if looks[str(name)] != FADED]
    step = min(0.07, 0.36 / max(len(own), 1)) * gap
    for placement, group in groups:
        group, look = group.sort_values("rank"), looks[str(placement)]
        if group["rank"].isna().all():
            level(ax, group.iloc[0], metric, look)
            continue
        shift = 0.0 if look == FADED else step * (own.index(placement) - (len(own) - 1) / 2)
        at = group["rank"].to_numpy(dtype=float) * 2.0**shift
        faded = look == FADED
        ax.errorbar(
            at, group[metric], yerr=None if faded else _errors(group, metric), capsize=0, linestyle=look.line,
            marker="none" if faded else look.marker, linewidth=0.6 if faded else 1.2, **_weights(look),
        )  # fmt: skip
        for x, row in zip(at, group.to_dict("records"), strict=True):
            if row["marked"]:
                _over_bar(ax, x, row[metric], row[f"{metric}_high"], look)
    ax.set_xscale("log", base=2)
    shown = ranks if len(ranks) <= 7 else ranks[:: int(np.ceil(len(ranks) / 6))]
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("rank")
    _room(ax, arms, metric)


def heat(
    ax: Axes, arms: pd.DataFrame, metric: str, order: Sequence[str], *, higher: bool, least: float, written: bool
) -> Any:
    """Placement × rank with the score in each cell, ± half of its bar; lighter is better. Cells that do not differ from
    the reference, which is framed, are hatched. A row all of whose arms bear a dagger bears it for them. Returns
    the image for colour bars.

    Args:
        arms: with columns placement, rank, differs, is_reference, dagger, the metric and its bounds.
        order: the placements, from above.
        least: the least width of the colours' range, so that noise does not look like an effect.
        written: whether cells are wide enough for numbers.
    """
    arms = arms.drop_duplicates(["placement", "rank"])
    rows = [name for name in order if name in set(arms["placement"])]
    columns = sorted(arms["rank"].unique())
    values = np.full((len(rows), len(columns)), np.nan)
    cells = {(rows.index(row["placement"]), columns.index(row["rank"])): row for row in arms.to_dict("records")}
    for place, row in cells.items():
        values[place] = row[metric]
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    spare = max(least - (high - low), 0.0) / 2
    norm = Normalize(low - spare, high + spare)
    image = ax.imshow(values, cmap=SEQUENTIAL if higher else f"{SEQUENTIAL}_r", norm=norm, aspect="auto")
    halves = arms[f"{metric}_high"] - arms[metric]
    digits = 4 if 0 < halves.min() < 0.0005 else 3
    doubted = arms.groupby("placement")["dagger"].all()
    for (i, j), row in cells.items():
        shade = image.cmap(norm(row[metric]))
        ink = "black" if np.dot(shade[:3], (0.3, 0.59, 0.11)) > 0.45 else "white"
        if row["is_reference"]:
            ax.add_patch(Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, edgecolor=ink, linewidth=1.2))
        elif not row["differs"]:
            ax.add_patch(
                Rectangle(
                    (j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", linewidth=0, edgecolor=(*to_rgb(ink), 0.45)
                )
            )
        mark = DAGGER if row["dagger"] and not doubted[row["placement"]] else ""
        half = row[f"{metric}_high"] - row[metric]
        text = f"{row[metric]:.{digits}f}{mark}" + (f"\n±{half:.{digits}f}" if np.isfinite(half) else "")
        if written or mark:
            label = ax.text(
                j, i, text if written else mark, ha="center", va="center", fontsize=LEAST_FONT, color=ink,
                linespacing=1.05,
            )  # fmt: skip
            if not row["differs"]:
                label.set_path_effects([withStroke(linewidth=2, foreground=shade)])
    step = max(1, int(np.ceil(len(columns) / 8)))
    ax.set_xticks(range(0, len(columns), step), [f"{rank:g}" for rank in columns[::step]])
    ax.set_yticks(range(len(rows)), [name + DAGGER * bool(doubted[name]) for name in rows])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("rank")
    return image


def learning_rates(
    ax: Axes, trials: pd.DataFrame, looks: Mapping[str, Look], *, rates: pd.Series | None = None
) -> None:
    """Validation score against learning rate, a line a placement; each seed a faint point, the chosen rate ringed.
    Columns: placement, lr, value, mean, chosen, marked. `rates` are those of all panels that share the axis."""
    for placement, group in trials.groupby("placement", sort=False):
        look = looks[str(placement)]
        means = group.drop_duplicates("lr").set_index("lr")["mean"].sort_index()
        if look == FADED:
            ax.plot(means.index, means, **_line(look))
            continue
        ax.plot(
            group["lr"], group["value"], look.marker, color=look.colour, alpha=0.3, markersize=2.5, markeredgewidth=0
        )
        ax.plot(means.index, means, color=look.colour, linestyle=look.line, marker=look.marker)
        best = group.loc[group["chosen"], "lr"]
        if len(best):
            ring: dict[str, Any] = {
                "markersize": 8,
                "markerfacecolor": "none",
                "markeredgecolor": look.colour,
                "markeredgewidth": 0.8,
            }
            ax.plot([best.iloc[0]], [means[best.iloc[0]]], "o", **ring)
            if group["marked"].any():
                dagger(ax, best.iloc[0], means[best.iloc[0]], look.colour, (4.5, 3.0))
    _log_ticks(ax, trials["lr"] if rates is None else rates, scientific=True)
    _log_height(ax, trials["value"], 8)


def curves(ax: Axes, table: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    """Training loss over steps, smoothed; a line a placement (mean of seeds) with the range of seeds as a band.
    Columns: placement, step, mean, low, high, marked."""
    for placement, group in table.groupby("placement", sort=False):
        _curve(ax, group.set_index("step"), looks[str(placement)], marked=bool(group["marked"].any()))
    _over_steps(ax, table["mean"], 20)


def validation(ax: Axes, table: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    """Validation score over steps, a line a placement with its interval as a band. Columns: placement, step, mean, low,
    high, marked."""
    for placement, group in table.groupby("placement", sort=False):
        _curve(ax, group.set_index("step"), looks[str(placement)], marked=bool(group["marked"].any()), points=True)
    _over_steps(ax, table["mean"], 8)


def _curve(ax: Axes, means: pd.DataFrame, look: Look, *, marked: bool, points: bool = False) -> None:
    if look != FADED:
        ax.fill_between(means.index, means["low"], means["high"], color=look.colour, alpha=0.15, linewidth=0)
    marker: dict[str, Any] = {"marker": look.marker, "markersize": 2.5} if points and look != FADED else {}
    ax.plot(means.index, means["mean"], **_line(look), **marker)
    if marked:
        dagger(ax, means.index[-1], means["mean"].iloc[-1], look.colour, (1.5, -3.0))


def _over_steps(ax: Axes, values: pd.Series, most: float) -> None:
    _log_height(ax, values, most)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def learn_forget(ax: Axes, arms: pd.DataFrame, metric: str, looks: Mapping[str, Look]) -> None:
    """Forgetting (rise of NLL on other text) against the score on the task, each with its bars; members of the front
    filled and joined, larger points are larger ranks. Columns: placement, rank, forgetting, the metric, the bounds of
    both, on_front, marked."""
    ranks = np.log2(arms["rank"].fillna(arms["rank"].max()).fillna(1.0).astype(float))
    sizes = 14 + 40 * (ranks - ranks.min()) / max(ranks.max() - ranks.min(), 1)
    inside = arms["on_front"].fillna(False).astype(bool)
    for placement, group in arms.groupby("placement", sort=False):
        look, faded = looks[str(placement)], looks[str(placement)] == FADED
        if not faded:
            ax.errorbar(
                group["forgetting"], group[metric], xerr=_errors(group, "forgetting"), yerr=_errors(group, metric),
                fmt="none", ecolor=look.colour, elinewidth=0.7, capsize=0, zorder=2.5,
            )  # fmt: skip
        ax.scatter(
            group["forgetting"], group[metric], s=6 if faded else sizes[group.index], marker=look.marker,
            c=[look.colour if one else "white" for one in inside[group.index]], edgecolors=look.colour,
            linewidths=0.6 if faded else 0.9, zorder=2 if faded else 3,
        )  # fmt: skip
        for row in group[group["marked"]].to_dict("records"):
            dagger(ax, row["forgetting"], row[metric], look.colour, (4.0, 3.0))
    members = arms[inside].sort_values("forgetting")
    ax.step(members["forgetting"], members[metric], where="post", color=GREY, linewidth=0.8, zorder=1)
    ax.margins(0.08)
    low, high = ax.get_xlim()
    if low <= 0 <= high:  # else the axis would go on to it
        ax.axvline(0, color=GREY, linewidth=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("forgetting: rise of NLL elsewhere (nats/token)")
    _room(ax, arms, metric)


def learning_forgetting(ax: Axes, arms: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    """Learning against forgetting of tasks one after another, an arm a point with bars of both; members of the front
    filled and joined. Columns: arm, learning and forgetting with the bounds of both, on_front."""
    for row in arms.to_dict("records"):
        look, one = looks[str(row["arm"])], pd.DataFrame([row])
        ax.errorbar(
            one["forgetting"], one["learning"], xerr=_errors(one, "forgetting"), yerr=_errors(one, "learning"),
            fmt="none", ecolor=look.colour, elinewidth=0.7, capsize=0, zorder=2.5,
        )  # fmt: skip
        ax.scatter(
            one["forgetting"], one["learning"], s=24, marker=look.marker, c=look.colour if row["on_front"] else "white",
            edgecolors=look.colour, linewidths=0.9, zorder=3,
        )  # fmt: skip
    members = arms[arms["on_front"].astype(bool)].sort_values("forgetting")
    ax.step(members["forgetting"], members["learning"], where="post", color=GREY, linewidth=0.8, zorder=1)
    low, high = limits(arms, "forgetting", share=0.75)  # some strategies forget nothing and have no bar there
    if high > low:
        ax.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    low, high = ax.get_xlim()
    if low <= 0 <= high:  # else the axis would go on to it
        ax.axvline(0, color=GREY, linewidth=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _room(ax, arms, "learning")


def by_role_and_layer(ax: Axes, modules: pd.DataFrame, value: str, top: float, *, around: bool = False) -> Any:
    """A value by role (rows) and layer (columns), white where nothing is adapted. Returns the image for colour bars.

    Args:
        top: the colours go from 0 to it, or from -top, where they are `around` 0.
    """
    table = modules.pivot_table(index="role", columns="layer", values=value, sort=False)
    cmap, bottom = (DIVERGING, -top) if around else (f"{SEQUENTIAL}_r", 0.0)
    image = ax.imshow(table.to_numpy(dtype=float), cmap=cmap, vmin=bottom, vmax=top, aspect="auto")
    ax.set_yticks(range(len(table)), [str(role) for role in table.index])
    step = max(1, len(table.columns) // 6)
    ax.set_xticks(range(0, len(table.columns), step), [f"{layer:g}" for layer in table.columns[::step]])
    ax.grid(False)
    ax.set_xticks(np.arange(len(table.columns) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(table) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)  # a module a cell, also where all ranks are equal
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("layer")
    return image


def bars(ax: Axes, table: pd.DataFrame) -> None:
    """Importance, most important first, with intervals. Columns: field, importance, low, high."""
    table = table.sort_values("importance")
    errors = np.clip(np.abs(table[["low", "high"]].to_numpy().T - table["importance"].to_numpy()), 0, None)
    colours = ["#b8c0c8" if name == "interactions and noise" else "#0072B2" for name in table["field"]]
    ax.barh(
        table["field"].map(lambda name: name.removeprefix("optim.").replace(" and ", "\nand ")),
        100 * table["importance"],
        color=colours,
        height=0.6,
    )
    ax.errorbar(
        100 * table["importance"],
        range(len(table)),
        xerr=100 * errors,
        fmt="none",
        ecolor="black",
        elinewidth=0.8,
        capsize=2,
    )
    ax.set_xlabel("variance explained (%)")
    ax.grid(axis="y", visible=False)


def share_kept(ax: Axes, shares: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    """Share of the reference's gain against the share of the model that is trained; the dashed line is 95%. Columns:
    placement, percent, share, low, high, marked."""
    for placement, group in shares.groupby("placement", sort=False):
        group, look = group.sort_values("percent"), looks[str(placement)]
        errors = 100 * np.abs(group[["low", "high"]].to_numpy().T - group["share"].to_numpy())
        faded = look == FADED
        ax.errorbar(
            group["percent"], 100 * group["share"], yerr=None if faded else errors, linestyle=look.line, capsize=0,
            marker="none" if faded else look.marker, linewidth=0.6 if faded else 1.2, **_weights(look),
        )  # fmt: skip
        for row in group[group["marked"]].to_dict("records"):
            _over_bar(ax, row["percent"], 100 * row["share"], 100 * row["high"], look)
    ax.axhline(100, color=GREY, linewidth=0.6)
    ax.axhline(95, color=GREY, linewidth=0.6, linestyle="--")
    _log_ticks(ax, shares["percent"])
    ax.set_xlabel("trained (% of model)")


def _log_height(ax: Axes, values: pd.Series, most: float) -> None:
    """A log axis where the largest value is more than `most` times the smallest; 1, 2, 5 ticks over few decades."""
    ratio = values.max() / values.min() if values.min() > 0 else 1.0
    if ratio > most:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0) if ratio < 4 else (1.0, 2.0, 5.0) if ratio < 500 else (1.0,))
        )
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _log_ticks(ax: Axes, values: pd.Series, *, scientific: bool = False) -> None:
    """A log axis with 1, 2, 5 ticks that are written out, even where it spans less than a decade."""
    known = values[values > 0].dropna()
    ratio = known.max() / known.min() if len(known) else 1.0
    if 1 < ratio < 3 and not scientific:
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(amount))
        ax.margins(x=0.12)
        return
    ax.set_xscale("log")
    if scientific:
        distinct = sorted(known.unique())
        # of a grid the values themselves; those that a search tried are neither round nor apart
        if len(distinct) <= 5 and all(math.isclose(value, float(f"{value:.0e}")) for value in distinct):
            ax.xaxis.set_major_locator(FixedLocator(distinct))
        else:
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 50 else (1.0,)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e−")))
    else:
        subs = (1.0, 2.0, 5.0) if ratio < 100 else (1.0,)
        ax.xaxis.set_major_locator(LogLocator(subs=subs))
        ax.xaxis.set_major_formatter(FuncFormatter(amount))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if ratio < 1.01:
        ax.xaxis.set_major_locator(FixedLocator(known.head(1)))
        ax.set_xlim(known.min() / 2, known.max() * 2) if len(known) else None
    else:
        ax.set_xlim(known.min() / ratio**0.12, known.max() * ratio**0.16)


def _room(ax: Axes, arms: pd.DataFrame, metric: str) -> None:
    low, high = limits(arms, metric)
    if np.isfinite(low) and high > low:
        ax.set_ylim(low - 0.12 * (high - low), high + 0.14 * (high - low))


def limits(arms: pd.DataFrame, metric: str, *, share: float = 1.5) -> tuple[float, float]:
    """From where to where an axis goes: all values, and bars unless one is so wide that it would hide the rest."""
    values, low, high = (arms[f"{metric}{end}"].astype(float) for end in ("", "_low", "_high"))
    low, high = low.fillna(values), high.fillna(values)
    widths = (high - low)[high > low]
    reach = max(values.max() - values.min(), share * float(widths.median()) if len(widths) else 0.0)
    if not reach > 0:  # one arm, or none with an interval
        return float(low.min()), float(high.max())
    return max(float(low.min()), values.min() - reach), min(float(high.max()), values.max() + reach)
