"""The cards that the report opens with: a study's claims, a card each, with the number that one looks for."""

from typing import Any

import pandas as pd

from .analyse import Analysis
from .arms import BASE, FULL, higher_is_better
from .claims import FAMILIES, Claim, claims
from .tables import number, title

HEADINGS = {key: what for key, (_, what) in FAMILIES.items()}
HEADINGS |= {"measured": "best measured", "share kept": "smallest that keeps 95%"}
FIRST = ("measured", "placement", "matched budget", "method", "share kept", FULL)
MOST = 5
"""Cards of a setting; all claims stand below them."""


def cards(analysis: Analysis) -> list[dict[str, Any]]:
    """Plain cards in the order to be read: setting, heading, value, text, supported, and the arm that they are of."""
    by_family: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims(analysis):
        by_family.setdefault((claim.setting, claim.family), []).append(claim)
    found = []
    for setting in dict.fromkeys(setting for setting, _ in by_family):
        families = [family for family in FIRST if (setting, family) in by_family][:MOST]
        found += [_card(analysis, setting, family, by_family[setting, family]) for family in families]
    return found


def _card(analysis: Analysis, setting: str, family: str, said: list[Claim]) -> dict[str, Any]:
    # of a family the last claim counts its comparisons, those before it tell of one each
    value, arm = _value(analysis, setting, family)
    heading = HEADINGS[family][0].upper() + HEADINGS[family][1:]
    return {
        "setting": setting, "heading": heading, "value": value, "arm": arm, "text": said[-1].text,
        "supported": said[-1].supported,
    }  # fmt: skip


def _value(analysis: Analysis, setting: str, family: str) -> tuple[str, str | None]:
    """The number of a card, and the label of the arm that it is of."""
    metric, arms = analysis.metric, analysis.arms
    if family == "measured":
        mine = arms[(arms["setting"] == setting) & (arms["arm"] != BASE) & arms[metric].notna()]
        best = mine.loc[mine[metric].idxmax() if higher_is_better(metric) else mine[metric].idxmin()]
        return f"{best['arm']}: {title(metric)} {number(float(best[metric]))}", str(best["arm"])
    if family == "share kept":
        kept = _rows(analysis.tables["share_kept"], analysis, setting)
        small = kept.loc[kept.loc[(kept["low"] >= 0.95) & kept["percent"].notna(), "percent"].idxmin()]
        return f"{small['arm']}: {small['percent']:.3g}% of the model", str(small["arm"])
    tests = _rows(analysis.tables[FAMILIES[family][0]], analysis, setting)
    tests = tests[tests["family"] == family]
    return f"{int(tests['significant'].sum())} of {len(tests)} differ", None


def _rows(table: pd.DataFrame, analysis: Analysis, setting: str) -> pd.DataFrame:
    return table[(table["setting"] == setting) & (table["metric"] == analysis.metric)]
