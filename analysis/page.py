"""What the report shows, as plain data: tables of rows that charts draw, arms with their modules and commands, texts.

Tables are by column and name arms by `id`. A page that watches a running study is sent the same tables.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sweeper import installation

from . import charted, charts, predictions, provenance, shown, spectra, verdicts
from .analyse import COSTS, Analysis
from .arms import BASE, FULL, Arm, higher_is_better
from .claims import sentences
from .load import STATUSES
from .style import FADED
from .tables import TITLES, Sheet, sheets

FACTORS = ("model", "dataset", "method", "placement", "allocation", "rank", "alpha")
SET = ("trainer.max_steps", "trainer.batch_size")
"""Fields that a command repeats besides what tells arms apart."""
MOST_CURVES, MOST_POINTS = 150, 120
"""Arms whose curves a page has, the best ones, and points of a curve."""
MOST_COMPARISONS = 4000
AXES = (
    "rank", "optim.lr", "trainable_parameters", "train_flops", "train_seconds_solo", "peak_memory_solo_bytes",
    "forgetting",
)  # fmt: skip
UNITS = {
    "trainable_parameters": "trainable parameters", "trainable_percent": "trained, % of model",
    "nll": "NLL (nats/token)", "train_flops": "training FLOPs", "train_seconds_solo": "training seconds alone",
    "peak_memory_solo_bytes": "peak memory alone (bytes)", "tokens_per_second_solo": "tokens/s alone",
    "adapter_bytes": "adapter (bytes)", "train_tokens": "training tokens",
    "train_seconds_amortised": "seconds, share of a pack", "optim.lr": "learning rate",
}  # fmt: skip


def content(analysis: Analysis, made: Sequence[Sheet] | None = None) -> dict[str, Any]:
    """All of the page but its pictures.

    Args:
        made: the tables, where they are made already.
    """
    looks = shown.all_looks(analysis) if analysis.found.arms else {}
    arms = charted.arms(analysis).reset_index(drop=True)
    ids = {key: i for i, key in enumerate(zip(arms["setting"], arms["arm"], strict=True))}
    metrics = analysis.found.metrics
    return {
        "title": f"LoRA placement study: {analysis.study.name or 'imported runs'}",
        "counts": counts(analysis),
        "metric": analysis.metric,
        "split": analysis.found.split,
        "metrics": metrics,
        "higher": [metric for metric in metrics if higher_is_better(metric)] + ["tokens_per_second_solo"],
        "titles": TITLES | UNITS,
        "axes": [key for key in AXES if key in arms or key in analysis.found.runs] + metrics,
        "settings": [setting.name for setting in analysis.found.settings],
        "verdicts": verdicts.cards(analysis),
        "answers": sentences(analysis),
        "notes": [*analysis.notes, *provenance.lines(analysis)],
        "looks": [
            {"kind": kind, "colour": look.colour, "shape": charts.SHAPES[look.marker], "faded": look == FADED}
            for kind, look in looks.items()
        ],
        "specs": charts.specs(looks),
        "tables": tables(analysis, arms, ids),
        "base": _base(analysis),
        "cards": [_card(arm) for arm in _in_order(analysis, ids)],
        "layouts": _layouts(analysis, ids),
        "predictions": predictions.browser(analysis),
        "sheets": [_sheet(sheet) for sheet in (sheets(analysis) if made is None else made)],
        "checks": analysis.tables["checks"].to_dict("records")
        + [
            {"check": row["kind"], "subject": row["where"], "message": row["message"]}
            for row in analysis.tables["failures"].head(50).to_dict("records")
        ],
    }


def tables(analysis: Analysis, arms: pd.DataFrame, ids: Mapping[tuple[str, str], int]) -> dict[str, dict[str, Any]]:
    """The rows that charts draw, by column: arms, runs, rates, training, validation, forest."""
    rates = charted.learning_rates(analysis)
    ways = charted.on_the_way(analysis)
    best = _best(analysis, arms)
    pairs = zip(ways["setting"], ways["arm"], strict=True)
    ways = ways[pd.Series([ids[pair] in best for pair in pairs], index=ways.index, dtype=bool)]
    found = {"arms": _arms(analysis, arms), "runs": _runs(analysis, ids)}
    if not isinstance(rates, str):
        found["rates"] = columns(_ids(rates, ids)[["id", "lr", "value", "mean", "chosen", "seed"]])
    for name, make in (("training", charted.training_curves), ("validation", charted.validation_curves)):
        curves = make(analysis, ways)
        if not isinstance(curves, str):
            thin = charted.thinned(curves, MOST_POINTS)
            found[name] = columns(_ids(thin, ids)[["id", "step", "mean", "low", "high"]])
    tests = shown.comparisons(analysis).head(MOST_COMPARISONS)
    if len(tests):
        tests = tests.assign(
            a=[ids.get(key) for key in zip(tests["setting"], tests["a"], strict=True)],
            b=[ids.get(key) for key in zip(tests["setting"], tests["b"], strict=True)],
        )
        shown_of = ["setting", "a", "b", "label", "difference", "low", "high", "p_holm", "significant"]
        found["forest"] = columns(tests[shown_of])
    return found


def _best(analysis: Analysis, arms: pd.DataFrame) -> set[int]:
    """Ids of the arms whose curves are shown."""
    if analysis.metric not in arms:
        return set()
    order = arms.sort_values(analysis.metric, ascending=not higher_is_better(analysis.metric))
    return {int(i) for i in order.index[:MOST_CURVES]}


def _ids(table: pd.DataFrame, ids: Mapping[tuple[str, str], int]) -> pd.DataFrame:
    return table.assign(id=[ids[key] for key in zip(table["setting"], table["arm"], strict=True)])


def _arms(analysis: Analysis, arms: pd.DataFrame) -> dict[str, Any]:
    metrics = [name for name in (*analysis.found.metrics, "forgetting") if name in arms]
    ends = [f"{name}_{end}" for name in metrics for end in ("low", "high")]
    wanted = [
        "setting", "arm", "label", "placement", "rank", "method", "allocation", "source", "seeds", "on_front",
        "front_probability", "dagger", "is_reference", "differs", "simplest", "trainable_parameters",
        "trainable_percent", *COSTS,
        "perplexity", *metrics, *ends,
    ]  # fmt: skip
    table = arms[[key for key in dict.fromkeys(wanted) if key in arms]].rename(columns={"placement": "kind"})
    rates = {(arm.setting, arm.label): arm.trial.get(charted.LEARNING_RATE) for arm in analysis.found.arms}
    keys = zip(arms["setting"], arms["arm"], strict=True)
    return columns(table.assign(**{charted.LEARNING_RATE: [rates.get(key) for key in keys]}))


def _runs(analysis: Analysis, ids: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """The columns of the runs of arms that can be axes or part of a hover text, under the names that arms have."""
    runs, split = analysis.found.runs, analysis.found.split
    renamed = {f"{split}.{name}": name for name in analysis.found.metrics}
    wanted = [
        "run_id", "status", "chosen", "seed", "trainable_parameters", *COSTS, "forgetting", charted.LEARNING_RATE,
        *renamed,
    ]  # fmt: skip
    keys = [ids.get(key) for key in zip(runs["setting"], runs["arm"], strict=True)]
    table = runs[[key for key in dict.fromkeys(wanted) if key in runs]].rename(columns=renamed).assign(id=keys)
    table = table[table["id"].notna()]
    return columns(table.assign(id=table["id"].astype(int)))


def _in_order(analysis: Analysis, ids: Mapping[tuple[str, str], int]) -> list[Arm]:
    arms = {(arm.setting, arm.label): arm for arm in analysis.found.arms}
    return [arms[key] for key in ids]


def _card(arm: Arm) -> dict[str, Any]:
    """What an arm's card says besides its row: its configuration, command, doubts and runs."""
    config = {key: value for key, value in (arm.factors | arm.trial).items() if _plain(value) is not None}
    return {
        "config": [[key, show(value)] for key, value in config.items()],
        "command": _command(arm),
        "doubts": list(arm.doubts),
        "tried": arm.tried,
        "runs": [str(name) for name in arm.runs["run_id"].head(12)],
        "count": len(arm.runs),
    }


def _command(arm: Arm) -> str | None:
    """What to type to train the arm again: what tells it apart, and its length; None of imported arms."""
    first = arm.runs.iloc[0]
    if first.get("source") != "study":
        return None
    keys = dict.fromkeys([*FACTORS, *arm.factors, *arm.trial, *SET])
    values = {key: first.get(key) for key in keys} | arm.factors | arm.trial
    whole = arm.factors.get("placement") == FULL
    left_out = ("placement", "allocation", "rank", "alpha") if whole else ()
    words = [
        f"{key}={show(value)}" for key, value in values.items() if key not in left_out and _plain(value) is not None
    ]
    seeds = ",".join(show(seed) for seed in arm.runs["seed"] if _plain(seed) is not None)
    return " ".join([installation.program("train"), "-m", shlex.join([*words, *([f"seed={seeds}"] if seeds else [])])])


def show(value: Any) -> str:
    """A field's value as a command has it."""
    plain = _plain(value)
    if isinstance(plain, float) and plain.is_integer() and abs(plain) < 1e15:
        return str(int(plain))
    return (
        f"{plain:.10g}" if isinstance(plain, float) else str(plain).lower() if isinstance(plain, bool) else str(plain)
    )


def _layouts(analysis: Analysis, ids: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Which modules arms adapt. `of`: arm -> number of its layout, null where its record lists no modules; `layouts`:
    role -> layers, rank of each, parameters; `energy`: arm -> role -> share of its update's squared norm."""
    numbers: dict[Any, int] = {}
    of: list[int | None] = []
    energy: dict[int, dict[str, float]] = {}
    for i, arm in enumerate(_in_order(analysis, ids)):
        layout = arm.runs["layout"].iloc[0] if "layout" in arm.runs else None
        known = analysis.study.layouts.get(layout) if layout is not None else None
        of.append(numbers.setdefault(layout, len(numbers)) if known else None)
        prefix = spectra.ENERGY
        shares = {
            str(key).removeprefix(prefix): arm.runs[key].mean() for key in arm.runs if str(key).startswith(prefix)
        }
        shares = {role: round(float(share), 4) for role, share in shares.items() if pd.notna(share)}
        if shares:
            energy[i] = shares
    return {"of": of, "layouts": [_roles(analysis.study.layouts[layout]) for layout in numbers], "energy": energy}


def _roles(modules: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for module in modules:
        role = found.setdefault(str(module.get("role")), {"layers": [], "ranks": [], "parameters": []})
        role["layers"].append(_plain(module.get("layer")))
        role["ranks"].append(_plain(module.get("rank")))
        role["parameters"].append(_plain(module.get("parameters")))
    return found


def _base(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """Setting -> metric -> score of the base model."""
    rows = analysis.arms[analysis.arms["arm"] == BASE].to_dict("records")
    return {row["setting"]: {name: _plain(row.get(name)) for name in analysis.found.metrics} for row in rows}


def counts(analysis: Analysis) -> str:
    """How many runs of which status, how many arms, and how often there was which problem."""
    every = analysis.study.counts()
    ended = ", ".join(f"{every[status]:,} {status}" for status in STATUSES if status in every)
    runs, arms = len(analysis.study.runs), len(analysis.found.arms)
    problems = [f"{kind}: {count:,}" for kind, count in every.items() if kind not in STATUSES]
    text = f"{runs:,} run{'' if runs == 1 else 's'} ({ended}); {arms:,} arm{'' if arms == 1 else 's'}"
    return "; ".join([text, *problems]) + "."


def columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    """A table by column, as JSON has it; columns without a value are left out."""
    found = {str(name): [_plain(value) for value in values] for name, values in table.items()}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def _sheet(sheet: Sheet) -> dict[str, Any]:
    rows = [[{"v": _plain(cell.value), "t": cell.text, "b": cell.bold} for cell in row] for row in sheet.rows]
    plain = {"name": sheet.name, "caption": sheet.caption, "header": sheet.header, "rows": rows}
    return plain | {"latex": sheet.latex, "markdown": sheet.markdown}
