"""What a study may claim: sentences, each written only where its test supports it, with effect, interval, groups and
seeds; where no test does, the sentence says that, and how small a difference could have been found."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper.record import markdown_text

from . import provenance
from .analyse import Analysis
from .arms import BASE, FULL, Arm, Setting, higher_is_better
from .tables import number, title

FAMILIES = {
    "placement": ("tests", "placements at equal rank"),
    "matched budget": ("matched_budget", "placements at equal parameters"),
    "method": ("tests", "methods at equal placement and rank"),
    "rank": ("tests", "neighbouring ranks"),
    FULL: ("tests", "arms with full fine-tuning"),
    BASE: ("tests", "arms with the base model"),
}
ADJUSTED = "p_holm"
MOST = 4
"""Significant comparisons of a family that are told one by one."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence; `supported` says whether it states a difference that a test found, else what was not found."""

    setting: str
    family: str
    text: str
    supported: bool


def claims(analysis: Analysis) -> list[Claim]:
    """Every claim of the study's main metric, setting by setting, each family of tests in turn."""
    found: list[Claim] = []
    for setting in analysis.found.settings:
        found += _best(analysis, setting)
        arms = {arm.label: arm for arm in setting.arms}
        for family, (table, what) in FAMILIES.items():
            tests = analysis.tables[table]
            keep = (tests["setting"] == setting.name) & (tests["metric"] == analysis.metric)
            tests = tests[keep & (tests["family"] == family)]
            if len(tests):
                found += _family(analysis, setting.name, family, what, tests, arms)
        found += _cheapest(analysis, setting.name)
    return found


def sentences(analysis: Analysis) -> list[str]:
    """The claims as text, each with its setting in front."""
    found = [f"{claim.setting}: {claim.text}" for claim in claims(analysis)]
    return found or ["No run completed, so there is nothing to compare yet."]


def write(analysis: Analysis, folder: Path) -> Path:
    """Writes claims.md: what the study may claim, what a reviewer would ask, and where the numbers come from."""
    checks = analysis.tables["checks"]
    parts = ["# What this study may claim", "", *(f"- {text}" for text in sentences(analysis))]
    if len(checks):
        parts += ["", "## What a reviewer would ask", ""]
        parts += [f"- {row['check']}: {row['subject']}: {row['message']}" for row in checks.to_dict("records")]
    parts += ["", "## Where the numbers come from", "", *(f"- {line}" for line in provenance.lines(analysis))]
    path = folder / "claims.md"
    path.write_text(markdown_text("\n".join(parts)) + "\n", encoding="utf-8")
    return path


def _family(
    analysis: Analysis, setting: str, family: str, what: str, tests: pd.DataFrame, arms: dict[str, Arm]
) -> Iterator[Claim]:
    established = tests[tests["significant"]].sort_values(ADJUSTED, kind="stable")
    total, sample = len(tests), _sample(tests)
    if established.empty:
        text = f"no difference between {what} was established in {total} comparison{'s' * (total > 1)} ({sample})"
        least = _detectable(analysis, setting)
        text += f"; {least}." if least else "."
        yield Claim(setting=setting, family=family, text=text, supported=False)
        return
    if family in (BASE, FULL):
        yield from _against(setting, family, established, total, sample)
        return
    for row in established.head(MOST).to_dict("records"):
        text = _difference(row, analysis.metric, analysis.found.split) + _caveat(row, arms) + "."
        yield Claim(setting=setting, family=family, text=text, supported=True)
    rest = total - len(established)
    more = len(established) - MOST
    text = f"{len(established)} of {total} comparisons of {what} found a difference"
    text += f" ({more} more in the table)" if more > 0 else ""
    text += _winners(family, established, arms)
    text += f"; of the other {rest} none is claimed." if rest else "."
    yield Claim(setting=setting, family=family, text=text, supported=True)


def _winners(family: str, established: pd.DataFrame, arms: dict[str, Arm]) -> str:
    """Which placement or method was the better one how often."""
    key = "method" if family == "method" else "placement"
    if family == "rank":
        return ""
    won = Counter(str(arms[name.split(" … ")[0]].factors[key]) for name in established["better"])
    return ": " + ", ".join(f"{who} better in {count}" for who, count in won.most_common())


def _best(analysis: Analysis, setting: Setting) -> Iterator[Claim]:
    """The arm with the best measured score, as a measurement: whether it is the best is for the tests to say."""
    metric, arms = analysis.metric, analysis.arms
    group = arms[(arms["setting"] == setting.name) & (arms["arm"] != BASE)] if metric in arms else arms.iloc[:0]
    if group.empty or group[metric].isna().all():
        return
    group = group[group[metric].notna()]
    up = higher_is_better(metric)
    best = group.loc[group[metric].idxmax() if up else group[metric].idxmin()]
    low, high = float(best[f"{metric}_low"]), float(best[f"{metric}_high"])
    interval = "" if math.isnan(low) else f" [{number(low)}, {number(high)}]"
    before = arms[(arms["setting"] == setting.name) & (arms["arm"] == BASE)]
    base = f"; the base model has {number(float(before[metric].iloc[0]))}" if len(before) else ""
    measured = f"the {'highest' if up else 'lowest'} measured " if len(group) > 1 else ""
    percent = best["trainable_percent"]
    size = "" if pd.isna(percent) else f", with {percent:.3g}% of the parameters trained"
    text = f"{best['arm']} has {measured}{analysis.found.split} {title(metric)}, {number(float(best[metric]))}"
    yield Claim(setting=setting.name, family="measured", text=f"{text}{interval}{size}{base}.", supported=True)


def _against(setting: str, family: str, established: pd.DataFrame, total: int, sample: str) -> Iterator[Claim]:
    """Arms (b) against one reference (a): how many are better, how many worse."""
    ahead = int((established["better"] == established["b"]).sum())
    behind = len(established) - ahead
    parts = [f"{count} of {total} arms {what}" for count, what in ((ahead, "better"), (behind, "worse")) if count]
    text = f"against {family}, {' and '.join(parts)} ({sample}); the largest adjusted p among them is "
    text += f"{_p(float(established[ADJUSTED].max()))}."
    yield Claim(setting=setting, family=family, text=text, supported=True)


def _difference(row: dict[str, Any], metric: str, split: str) -> str:
    worse = row["a"] if row["better"] == row["b"] else row["b"]
    ends = sorted(abs(row[side]) for side in ("low", "high"))
    direction = "higher" if higher_is_better(metric) else "lower"
    return (
        f"{row['better']} has {direction} {split} {title(metric)} than {worse} by {number(abs(row['difference']), 3)} "
        f"[{number(ends[0], 3)}, {number(ends[1], 3)}] (adjusted p {_p(row[ADJUSTED])}, {_counts(row)})"
    )


def _caveat(row: dict[str, Any], arms: dict[str, Arm]) -> str:
    """What weakens a comparison: a choice at the edge of what was tried, or one that no fresh seed confirmed."""
    both = [arms[name] for name in (row["a"], row["b"]) if name in arms]
    why = []
    if any(arm.tried > 1 and not arm.confirmed for arm in both):
        why.append("hyperparameters not confirmed on fresh seeds")
    edge = [arm.label for arm in both if arm.edges]
    if edge:
        why.append(f"{' and '.join(edge)} at the edge of what was tried")
    return f"; {', '.join(why)}" if why else ""


def _cheapest(analysis: Analysis, setting: str) -> Iterator[Claim]:
    """The smallest arm whose whole interval keeps 95% of the gain of a reference."""
    shares = analysis.tables["share_kept"]
    shares = shares[(shares["setting"] == setting) & (shares["metric"] == analysis.metric) & (shares["low"] >= 0.95)]
    shares = shares[shares["percent"].notna()]
    if len(shares):
        small = shares.loc[shares["percent"].idxmin()]
        reference = FULL if small["reference"] == FULL else f"the {small['reference']}"
        text = (
            f"the smallest arm that keeps 95% of the gain of {reference} over the untrained model with its whole "
            f"interval is {small['arm']} ({100 * small['share']:.1f}% [{100 * small['low']:.1f}, "
            f"{100 * small['high']:.1f}] with {small['percent']:.3g}% of the model, "
            f"{small['percent_of_reference']:.3g}% of the reference's parameters). Part of that gain is the answer's "
            "format, which any arm learns."
        )
        yield Claim(setting=setting, family="share kept", text=text, supported=True)


def _detectable(analysis: Analysis, setting: str) -> str:
    """The smallest difference that the study had an 80% chance to find, of its own design."""
    table = analysis.tables.get("power")
    if table is None or "own_design" not in table:
        return ""
    rows = table[(table["setting"] == setting) & (table["metric"] == analysis.metric) & table["own_design"]]
    if rows.empty or rows["detectable"].isna().all():
        return ""
    return f"this design finds a difference of {number(float(rows['detectable'].max()), 2)} with 80% chance"


def _sample(tests: pd.DataFrame) -> str:
    return ", ".join(
        f"{_span(tests[name])} {name}" for name in ("seeds", "groups") if name in tests and tests[name].notna().any()
    )


def _counts(row: dict[str, Any]) -> str:
    parts = [f"{row[name]:,.0f} {name}" for name in ("seeds", "groups") if name in row and not pd.isna(row[name])]
    return ", ".join(parts)


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
