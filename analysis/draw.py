"""Drawing: each function puts one table on one Axes. Nothing here reads files or chooses colours."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from analysis.style import GREY, SEQUENTIAL, Look


def amount(value: float, _: Any = None) -> str:
    """1.2M for 1,200,000."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def scatter(ax: Axes, arms: pd.DataFrame, metric: str, cost: str, looks: Mapping[str, Look]) -> None:
    """Cost against quality: an arm a point with its interval; members of the front filled and joined."""
    for placement, group in arms.groupby("placement", sort=False):
        look = looks[str(placement)]
        for inside, part in group.groupby(group["on_front"].fillna(False).astype(bool)):
            errors = np.abs(part[[f"{metric}_low", f"{metric}_high"]].to_numpy().T - part[metric].to_numpy())
            ax.errorbar(
                part[cost], part[metric], yerr=errors, fmt=look.marker, color=look.colour, elinewidth=0.8, capsize=0,
                markerfacecolor=look.colour if inside else "white", markeredgewidth=1.0, zorder=3,
            )  # fmt: skip
    members = arms[arms["on_front"].fillna(False).astype(bool)].sort_values(cost)
    ax.step(members[cost], members[metric], where="post", color=GREY, linewidth=0.8, zorder=1)
    _log_ticks(ax, arms[cost])
    _room(ax, arms, metric)


def rank_labels(ax: Axes, arms: pd.DataFrame, metric: str, cost: str, *, higher: bool) -> None:
    """The rank beside each point (of many arms: those of the front) of a `scatter` that has its final layout.

    A label that would cover another one or another point in all four places is left out.
    """
    labelled = arms if len(arms) <= 12 else arms[arms["on_front"].fillna(False).astype(bool)]
    point = ax.figure.dpi / 72
    places = ax.transData.transform(arms[[cost, metric]].to_numpy(dtype=float))
    taken = [Bbox([place - 3 * point, place + 3 * point]) for place in places]
    # from above, so that the upper one of two takes the upper side
    for row in labelled.sort_values(metric, ascending=False).to_dict("records"):
        if pd.isna(row["rank"]):
            continue
        text = f"{row['rank']:g}"
        x, y = ax.transData.transform((row[cost], row[metric]))
        wide, tall = 4 * len(text) * point, 6 * point
        # No arm lies on the cheap and good side of the front, so its labels stand there; the others' opposite.
        first, below = bool(row["on_front"]), higher != bool(row["on_front"])
        for left, down in ((first, below), (first, not below), (not first, below), (not first, not below)):
            x0 = x - 4 * point - wide if left else x + 4 * point
            y0 = y - 3 * point - tall if down else y + 3 * point
            box = Bbox.from_bounds(x0, y0, wide, tall)
            if not box.count_overlaps(taken):
                taken.append(box)
                label = ax.annotate(
                    text, (row[cost], row[metric]), xytext=(-4 if left else 4, -3 if down else 3), fontsize=6,
                    textcoords="offset points", ha="right" if left else "left", va="top" if down else "bottom",
                )  # fmt: skip
                label.set(color=GREY, zorder=5, path_effects=[withStroke(linewidth=1.5, foreground="white")])
                break


def dots(ax: Axes, arms: pd.DataFrame, metric: str) -> None:
    """A row an arm, the first on top, with its interval; an arrow where that goes on outside the axis. Columns: label,
    the metric and its bounds."""
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
    ax.xaxis.set_major_locator(MaxNLocator(5))


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
    """The smallest difference that is found, against seeds, a line a number of groups; the study's own design ringed.
    Columns: seeds, groups, detectable, own_design."""
    for (groups, part), line in zip(power.groupby("groups"), ("-", "--", ":", "-."), strict=False):
        part = part.sort_values("seeds")
        ax.plot(part["seeds"], part["detectable"], line, color="#0072B2", marker="o", markersize=3, label=f"{groups:,}")
    own = power[power["own_design"]]
    ax.plot(own["seeds"], own["detectable"], "o", color="#D55E00", markerfacecolor="none", markersize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    seeds = sorted(power["seeds"].unique())
    ax.xaxis.set_major_locator(FixedLocator(seeds))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(title="groups", title_fontsize=7)


def profiles(ax: Axes, table: pd.DataFrame, styles: Mapping[str, tuple[Look, str]]) -> None:
    """The share of runs that reach a normalised score, a line an arm with its band. Columns: arm, level, share, low,
    high."""
    for arm, part in table.groupby("arm", sort=False):
        look, label = styles[str(arm)]
        ax.fill_between(part["level"], part["low"], part["high"], color=look.colour, alpha=0.08, linewidth=0)
        ax.plot(part["level"], part["share"], color=look.colour, linestyle=look.line, label=label)
    ax.set_ylim(-0.02, 1.02)


def rank_lines(ax: Axes, arms: pd.DataFrame, metric: str, looks: Mapping[str, Look]) -> None:
    """Score against rank, a line a placement, the 95% interval as a band."""
    for placement, group in arms.groupby("placement", sort=False):
        group, look = group.sort_values("rank"), looks[str(placement)]
        if group["rank"].isna().all():  # full fine-tuning: a level to compare with
            ax.axhline(group[metric].iloc[0], color=look.colour, linestyle=look.line, linewidth=0.9)
            continue
        low, high = group[f"{metric}_low"], group[f"{metric}_high"]
        if len(group) > 1:
            ax.fill_between(group["rank"], low, high, color=look.colour, alpha=0.15, linewidth=0)
        else:  # a band needs two ranks
            ax.vlines(group["rank"], low, high, color=look.colour, linewidth=0.8)
        ax.plot(group["rank"], group[metric], color=look.colour, marker=look.marker, linestyle=look.line)
    ax.set_xscale("log", base=2)
    ranks = sorted(arms["rank"].dropna().unique())
    shown = ranks if len(ranks) <= 7 else ranks[:: int(np.ceil(len(ranks) / 6))]
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("rank")


def heat(
    ax: Axes, arms: pd.DataFrame, metric: str, looks: Mapping[str, Look], *, higher: bool, size: float = 7
) -> None:
    """Placement × rank with the score in each cell, written in a font of `size`; lighter is better."""
    table = arms.pivot_table(index="placement", columns="rank", values=metric, sort=False)
    table = table.loc[[name for name in looks if name in table.index], sorted(table.columns)]
    values = table.to_numpy(dtype=float)
    norm = Normalize(np.nanmin(values), np.nanmax(values))
    ax.imshow(values, cmap=SEQUENTIAL if higher else f"{SEQUENTIAL}_r", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value) and values.size <= 80:
            bright = (norm(value) if higher else 1 - norm(value)) > 0.5
            colour = "black" if bright else "white"
            ax.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=size, color=colour)
    step = max(1, int(np.ceil(len(table.columns) / 8)))
    ax.set_xticks(range(0, len(table.columns), step), [f"{rank:g}" for rank in table.columns[::step]])
    ax.set_yticks(range(len(table)), [str(name) for name in table.index])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("rank")


def learning_rates(
    ax: Axes, trials: pd.DataFrame, looks: Mapping[str, Look], *, rates: pd.Series | None = None
) -> None:
    """Validation score against learning rate, a line a placement; each seed a faint point, the chosen rate ringed.
    Columns: placement, lr, value, chosen. `rates` are those of all panels that share the axis."""
    for placement, group in trials.groupby("placement", sort=False):
        look = looks[str(placement)]
        ax.plot(
            group["lr"], group["value"], look.marker, color=look.colour, alpha=0.3, markersize=2.5, markeredgewidth=0
        )
        means = group.groupby("lr")["value"].mean()
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
    _log_ticks(ax, trials["lr"] if rates is None else rates, scientific=True)
    _log_height(ax, trials["value"], 8)


def curves(ax: Axes, table: pd.DataFrame, looks: Mapping[str, Look]) -> None:
    """Training loss over steps, smoothed; a line a placement (mean of seeds) with the range of seeds as a band.
    Columns: placement, run_id, step, loss."""
    for placement, group in table.groupby("placement", sort=False):
        look = looks[str(placement)]
        wide = group.pivot_table(index="step", columns="run_id", values="loss")
        smooth = wide.ewm(span=max(2, len(wide) / 15)).mean()
        ax.fill_between(
            smooth.index, smooth.min(axis=1), smooth.max(axis=1), color=look.colour, alpha=0.15, linewidth=0
        )
        ax.plot(smooth.index, smooth.mean(axis=1), color=look.colour, linestyle=look.line)
    _log_height(ax, table["loss"], 20)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def learn_forget(ax: Axes, arms: pd.DataFrame, metric: str, looks: Mapping[str, Look]) -> None:
    """Forgetting (rise of NLL on other text) against the score on the task; larger points are larger ranks."""
    ranks = np.log2(arms["rank"].fillna(arms["rank"].max()).astype(float))
    sizes = 14 + 40 * (ranks - ranks.min()) / max(ranks.max() - ranks.min(), 1)
    for placement, group in arms.groupby("placement", sort=False):
        look = looks[str(placement)]
        ax.scatter(
            group["forgetting"], group[metric], s=sizes[group.index], marker=look.marker, color=look.colour,
            edgecolors="white", linewidths=0.5, zorder=3,
        )  # fmt: skip
    ax.axvline(0, color=GREY, linewidth=0.6)
    ax.margins(0.08)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("forgetting: rise of NLL elsewhere (nats/token)")


def by_role_and_layer(ax: Axes, modules: pd.DataFrame, value: str, top: float) -> Any:
    """A value by role (rows) and layer (columns), white where nothing is adapted. Returns the image for colour bars."""
    table = modules.pivot_table(index="role", columns="layer", values=value, sort=False)
    image = ax.imshow(table.to_numpy(dtype=float), cmap=f"{SEQUENTIAL}_r", vmin=0, vmax=top, aspect="auto")
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
    """Share of the reference's gain against the share of the model that is trained; the dashed line is 95%."""
    for placement, group in shares.groupby("placement", sort=False):
        group, look = group.sort_values("percent"), looks[str(placement)]
        errors = 100 * np.abs(group[["low", "high"]].to_numpy().T - group["share"].to_numpy())
        ax.errorbar(
            group["percent"], 100 * group["share"], yerr=errors, color=look.colour, marker=look.marker,
            linestyle=look.line, elinewidth=0.8, capsize=0,
        )  # fmt: skip
    ax.axhline(100, color=GREY, linewidth=0.6)
    ax.axhline(95, color=GREY, linewidth=0.6, linestyle="--")
    _log_ticks(ax, shares["percent"])
    ax.set_xlabel("trained (% of model)")


def _log_height(ax: Axes, values: pd.Series, most: float) -> None:
    """A log axis where the largest value is more than `most` times the smallest; 1, 2, 5 ticks over few decades."""
    ratio = values.max() / values.min() if values.min() > 0 else 1.0
    if ratio > most:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 500 else (1.0,)))
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
        ax.set_ylim(low - 0.08 * (high - low), high + 0.12 * (high - low))


def limits(arms: pd.DataFrame, metric: str) -> tuple[float, float]:
    """From where to where an axis goes: all values, and intervals unless one is so wide that it would hide the rest."""
    values, low, high = (arms[f"{metric}{end}"].astype(float) for end in ("", "_low", "_high"))
    reach = max(values.max() - values.min(), 1.5 * float((high - low).median()))
    if not reach > 0:  # one arm, or none with an interval
        return float(low.min()), float(high.max())
    return max(float(low.min()), values.min() - reach), min(float(high.max()), values.max() + reach)
