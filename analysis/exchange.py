"""Results to and from elsewhere: PEFT's method_comparison, published tables, Weights & Biases, CSV and Parquet.

Everything that is read becomes rows with the columns of `Study.runs`; `source` says where they come from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper import installation

from . import tables
from .analyse import Analysis
from .load import NAME, flat, score_columns
from .peft import from_peft, read_json, to_peft

Rows = list[dict[str, Any]]


def read(source: str) -> Rows:
    """Runs from `wandb:entity/project`, a published table (.json) or a folder of PEFT results.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it is of no known form.
        ModuleNotFoundError: the package wandb is needed and not installed.
    """
    if source.startswith("wandb:"):
        return from_wandb(source.removeprefix("wandb:"))
    path = Path(source)
    if path.is_dir():
        return from_peft(path)
    if path.is_file() and path.suffix == ".json":
        return from_published(path)
    raise FileNotFoundError(
        f"--import {source}: give a folder of PEFT results, a published table (.json) or wandb:entity/project"
    )


def check(kind: str) -> None:
    """Raises ModuleNotFoundError where a package is not installed that writing this kind needs."""
    if kind == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"--export parquet needs the package pyarrow: {installation.install('hub')}"
            ) from None


def write(analysis: Analysis, folder: Path, kind: str) -> list[Path]:
    """Writes the runs as `peft` (a folder a task, one JSON file a run), `csv` or `parquet` (runs and per-example
    scores).

    Raises:
        ModuleNotFoundError: as `check`.
    """
    check(kind)
    return WRITERS[kind](analysis, folder)


# ---- published tables ----


def from_published(path: Path) -> Rows:
    """A table from a paper, so that it can be checked and stand beside our runs.

    The file holds `source`, `model` (name, config with the shape), `dataset`, optionally `base` (nll, perplexity) and
    `rows`: arm, placement, rank, nll, and where stated perplexity, trainable_parameters, seed, seconds and metrics.

    Raises:
        ValueError: it does not.
    """
    plain = read_json(path)
    rows = plain.get("rows") if isinstance(plain, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--import {path}: a published table is an object with source, model, dataset and rows")
    try:
        return _published(plain, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"--import {path}: no published table ({type(error).__name__}: {error})") from None


def _published(plain: Mapping[str, Any], path: Path) -> Rows:
    model = plain.get("model") or {}
    found = []
    for i, row in enumerate(plain["rows"]):
        scores: dict[str, dict[str, dict[str, Any]]] = {"test": {"after": _published_score(row)}}
        if plain.get("base"):
            scores["test"]["before"] = _published_score(plain["base"])
        found.append(
            {
                "run_id": f"{path.stem}:{i}",
                "study": plain.get("source"),
                "source": "published",
                "folder": None,
                "layout": 0,
                "experiment": row.get("arm"),
                "status": "completed",
                **flat({"model": model}),
                "dataset": plain.get("dataset"),
                "method": row.get("method", "lora"),
                "placement": row.get("placement"),
                "allocation": None,
                "rank": row.get("rank"),
                "seed": row.get("seed", 0),
                "steps": row.get("steps"),
                "trainable_parameters": row.get("trainable_parameters"),
                "total_parameters": model.get("total_parameters"),
                "train_seconds_solo": row.get("seconds"),
                "finished": "",
                **score_columns(scores),
            }
        )
    return found


def _published_score(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"nll": row.get("nll"), "perplexity": row.get("perplexity"), "metrics": row.get("metrics") or {}}


# ---- Weights & Biases ----


def from_wandb(project: str, api: Any = None) -> Rows:
    """Runs that tracking=wandb logged, by `entity/project`; needs a key (`wandb login`). `api` is a `wandb.Api`.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    if api is None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"--import wandb: needs the package wandb: {installation.install('wandb')}"
            ) from None
        api = wandb.Api()
    rows = []
    for run in api.runs(project):
        summary, config = dict(run.summary), dict(run.config)
        row = {
            "run_id": f"wandb:{run.id}",
            "study": project,
            "source": "wandb",
            "folder": None,
            "layout": 0,
            "finished": "",
            "status": {"finished": "completed"}.get(str(run.state), "failed"),
            **flat(config),
        }
        for key, value in summary.items():
            if "/" in key:
                split, name = key.split("/", maxsplit=1)
                for phase, place in (("_after", f"{split}."), ("_before", f"{split}.before.")):
                    if name.endswith(phase) and NAME.fullmatch(split) and NAME.fullmatch(name):
                        row[f"{place}{name.removesuffix(phase)}"] = value
            elif not key.startswith("_") and isinstance(value, int | float):
                row[key] = value
        row["train_seconds_amortised"] = row.pop("train_seconds", None)
        row.pop("peak_memory_bytes", None)  # it may be a pack's
        rows.append(row)
    return rows


# ---- tables ----


def to_csv(analysis: Analysis, folder: Path) -> list[Path]:
    """runs.csv and examples.csv (of the runs that the tables are made of)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in _frames(analysis).items():
        tables.to_csv(table, folder / f"{name}.csv")
    return [folder / "runs.csv", folder / "examples.csv"]


def to_parquet(analysis: Analysis, folder: Path) -> list[Path]:
    """runs.parquet and examples.parquet; columns of mixed kinds are text there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in _frames(analysis).items():
        mixed = [column for column in table if table[column].map(type).nunique() > 1 and table[column].dtype == object]
        table.astype(dict.fromkeys(mixed, "string")).to_parquet(folder / f"{name}.parquet", index=False)
    return [folder / "runs.parquet", folder / "examples.parquet"]


def _frames(analysis: Analysis) -> dict[str, pd.DataFrame]:
    runs = analysis.found.runs.drop(columns=["layout"], errors="ignore")
    chosen = runs[runs["chosen"] & (runs["source"] == "study")]
    return {"runs": runs, "examples": analysis.study.examples(chosen["run_id"], split=analysis.found.split)}


WRITERS = {"peft": to_peft, "csv": to_csv, "parquet": to_parquet}
