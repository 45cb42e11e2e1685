"""What the report's browser of predictions shows: the examples on which arms differ most, with scores and texts."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from . import texts
from .analyse import Analysis
from .arms import Arm, Setting, higher_is_better

MOST_NUMBERS = 60_000
"""Scores of single examples in a page: of many arms fewer examples are kept."""
FEWEST, MOST_EXAMPLES = 20, 200
MOST_TEXTS = 12
"""Arms whose texts are kept, the best ones: a text is long, and says little in the fiftieth version."""
LONGEST = 1200


class Chosen(NamedTuple):
    """Columns of the scores that are kept, and how many there are in all."""

    ids: list[str]
    among: int


def browser(analysis: Analysis) -> list[dict[str, Any]]:
    """For each setting whose arms were scored example by example: ids, prompts, references, and by arm its score of
    each example, mean over seeds, with the texts of one seed; `before` are those of the base model."""
    settings = [setting for setting in analysis.found.settings if _scored(setting, analysis.metric)]
    return [_setting(analysis, setting, MOST_NUMBERS // len(settings)) for setting in settings]


def _scored(setting: Setting, metric: str) -> list[Arm]:
    return [arm for arm in setting.arms if metric in arm.scores and arm.scores[metric].ids]


def _setting(analysis: Analysis, setting: Setting, numbers: int) -> dict[str, Any]:
    metrics = [analysis.metric, *(name for name in analysis.found.metrics if name != analysis.metric)][:2]
    arms = _scored(setting, analysis.metric)
    chosen = _differing(arms, analysis.metric, max(FEWEST, min(MOST_EXAMPLES, numbers // (len(arms) * len(metrics)))))
    best = sorted(arms, key=lambda arm: _mean(arm, analysis.metric), reverse=higher_is_better(analysis.metric))
    written = {arm.label: _texts(analysis, arm, chosen.ids) for arm in best[:MOST_TEXTS]}
    before = _texts(analysis, arms[0], chosen.ids, phase="before")
    asked = before if before else next((table for table in written.values() if table), {})
    return {
        "setting": setting.name, "metrics": metrics, "ids": chosen.ids, "among": chosen.among,
        "prompts": [_short(asked.get(name, {}).get("prompt")) for name in chosen.ids],
        "references": [_short(asked.get(name, {}).get("reference")) for name in chosen.ids],
        "before": {"text": [_short(before.get(name, {}).get("text")) for name in chosen.ids],
                   **{name: _scores(setting.base, name, chosen.ids) for name in metrics}},
        "arms": {
            arm.label: {name: _scores(arm, name, chosen.ids) for name in metrics}
            | ({"text": [_short(own.get(name, {}).get("text")) for name in chosen.ids]}
               if (own := written.get(arm.label)) else {})
            for arm in arms
        },
    }  # fmt: skip


def _mean(arm: Arm, metric: str) -> float:
    scores = arm.scores[metric]
    return float((scores.x_RE @ scores.w_E / scores.w_E.sum()).mean())


def _differing(arms: list[Arm], metric: str, most: int) -> Chosen:
    """Ids of the examples that every arm has, those first on which the arms' means over seeds differ most."""
    shared = set(arms[0].scores[metric].ids).intersection(*(arm.scores[metric].ids for arm in arms))
    ids = sorted(shared) or sorted(arms[0].scores[metric].ids)
    of_arms = [arm for arm in arms if shared or arm is arms[0]]
    x_AE = np.array([_scores(arm, metric, ids) for arm in of_arms], dtype=float)
    order = np.argsort(-np.nan_to_num(np.ptp(x_AE, axis=0)), kind="stable")
    return Chosen([ids[i] for i in order[:most]], len(ids))


def _scores(arm: Arm | None, metric: str, ids: list[str]) -> list[float | None]:
    """Mean over seeds of an arm's score of each example; None where it has none."""
    scores = arm.scores.get(metric) if arm is not None else None
    if scores is None:
        return [None] * len(ids)
    known = dict(zip(scores.ids, scores.x_RE.mean(axis=0).tolist(), strict=False))
    return [float(f"{known[name]:.4g}") if name in known else None for name in ids]


def _texts(analysis: Analysis, arm: Arm, ids: list[str], phase: str = "after") -> dict[str, dict[str, Any]]:
    """id -> prompt, reference and text of one run; empty where none was kept."""
    runs = arm.runs[arm.runs["folder"].notna()] if "folder" in arm.runs else arm.runs.iloc[:0]
    table = texts.examples(analysis.study, runs["run_id"].head(1), split=analysis.found.split, phase=phase)
    table = table[table["id"].astype(str).isin(ids)] if len(table) else table
    rows = table[["id", "prompt", "reference", "text"]].to_dict("records") if len(table) else []
    kept = [row for row in rows if any(isinstance(row[key], str) for key in ("prompt", "reference", "text"))]
    return {str(row["id"]): row for row in kept}


def _short(text: Any) -> str | None:
    if text is None or (not isinstance(text, str) and pd.isna(text)):
        return None
    whole = str(text)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}… ({len(whole):,} characters)"
