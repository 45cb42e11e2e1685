"""What `adapters.py route` found of a study's runs as a library: every rule on every task, paired by example."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sweeper.record import LARGEST_LINES, LIBRARY, read_json, read_text

from . import stats
from .load import NAME, Problem, Study

SCHEMA = 1
BEST = "best_member"
"""The rule that others are compared with: the single member with the least NLL on the task's validation split."""
COLUMNS = [
    "library", "model", "members", "task", "rule", "metric", "examples", "groups", "score", "score_low", "score_high",
    "difference", "low", "high", "p", "p_holm", "right", "cost",
]  # fmt: skip


def table(study: Study) -> pd.DataFrame:
    """One row per comparison, task, rule and metric, on the test split.

    `score` has an interval over examples; `difference`, with `low` and `high`, is the score less that of the best
    single member on the same examples; `p` is of none, `p_holm` over the rules of a comparison and metric.
    `right` is the share of rows or tokens that went to a member trained on the task, `cost` the time of a token over
    that of one adapter. The study's seeds are not in these intervals: a library is one set of adapters.
    """
    rows = [row for file in _files(study) for row in _comparison(file, study)]
    found = pd.DataFrame(rows, columns=COLUMNS)
    for _, part in found[found["rule"] != BEST].groupby(["library", "metric"]):
        found.loc[part.index, "p_holm"] = stats.holm(part["p"])
    return found


def _files(study: Study) -> list[Path]:
    folders = {Path(folder).parent for folder in study.runs["folder"] if isinstance(folder, str)}
    return sorted(file for folder in folders for file in (folder / LIBRARY).glob("*.json"))


def _comparison(file: Path, study: Study) -> list[dict[str, Any]]:
    try:
        plain = read_json(read_text(file))
        lines = read_text(file.with_suffix(".jsonl"), largest=LARGEST_LINES).splitlines()
        return list(_rows(plain, [read_json(line) for line in lines]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{file.name}: {type(error).__name__}: {error}"
        study.note(Problem(folder=str(file.parent), kind="broken library", message=message))
        return []


def _rows(plain: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    if plain["schema"] != SCHEMA:
        raise ValueError(f"schema {plain['schema']!r}; this version reads {SCHEMA}")
    results = {(one["task"], one["rule"]): one for one in plain["results"]}
    by: dict[tuple[str, str], list[Mapping[str, Any]]] = {key: [] for key in results}
    for line in lines:
        by[line["task"], line["rule"]].append(line)
    for (task, rule), result in results.items():
        best = by[task, BEST]
        for metric in ("nll", *result["score"]["metrics"]):
            if not all(NAME.fullmatch(str(name)) for name in (task, rule, metric)):
                raise ValueError(f"{task!r}, {rule!r} or {metric!r} is no name of a task, rule or metric")
            if all(metric in line for line in by[task, rule]):
                common = {
                    "library": plain["library"], "model": plain["model"], "members": len(plain["members"]),
                    "task": task, "rule": rule, "metric": metric, "right": result["right"], "cost": result["cost"],
                }  # fmt: skip
                yield common | _estimates(by[task, rule], best, metric)


def _estimates(own: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    if [line["id"] for line in own] != [line["id"] for line in best]:
        raise ValueError("rules were scored on other examples")
    groups = [str(line.get("group") or line["id"]) for line in own]
    x_RE, weights_E = _scores(own, metric)
    base_RE, _ = _scores(best, metric)
    one = stats.interval(x_RE, weights_E, groups=groups)
    row: dict[str, Any] = {
        "examples": len(own), "groups": len(set(groups)), "score": one.estimate, "score_low": one.low,
        "score_high": one.high,
    }  # fmt: skip
    if own is best:
        return row
    if metric == "nll" and np.array_equal(x_RE, base_RE):  # the same adapter, which is no matter of chance
        return row | {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    pair = stats.paired(base_RE, x_RE, weights_E, groups=groups)
    found = pair.difference
    return row | {"difference": found.estimate, "low": found.low, "high": found.high, "p": pair.p}


def _scores(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores [1, E] and the weights of examples [E]: an NLL is a mean over tokens."""
    values = np.array([float(line[metric]) for line in lines])
    if metric != "nll":
        return values[None], np.ones(len(values))
    tokens = np.array([float(line["tokens"]) for line in lines])
    return (values / tokens)[None], tokens
