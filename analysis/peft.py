"""Results in the JSON form of PEFT's method_comparison: written for its table and Pareto app, and read from there."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper import record
from sweeper.record import ADAPTER

from . import manifest
from .analyse import Analysis


def to_peft(analysis: Analysis, folder: Path) -> list[Path]:
    """One file a run with run_info, train_info and meta_info, as the table and Pareto app of PEFT's repository read it.

    That reader needs whole numbers for memory and numbers for times. Memory is the solo peak in all three of its
    fields (0 where there was no calibration); times are solo seconds if every run has them, else every run's share of
    its pack. Which of the two is said in meta_info.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = analysis.study.runs
    runs = runs[runs["source"] == "study"]
    done = runs[runs["status"] == "completed"]
    solo = len(done) > 0 and bool(done["train_seconds_solo"].notna().all())
    losses = _last_losses(analysis, done)
    written = []
    for row in runs.to_dict("records"):
        row = {str(key): _absent_is_none(value) for key, value in row.items()}
        plain = _peft_result(row, solo=solo, split=analysis.found.split, loss=losses.get(row["run_id"]))
        # names are a record's; the end of one, which has the run's id, tells it from others
        stem = re.sub(r"[^\w.+-]+|^\.", "_", plain["run_info"]["experiment_name"].replace("/", "--"))[-200:]
        written.append(folder / f"{stem}.json")
        written[-1].write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    manifest.update(folder, written)
    return written


def _last_losses(analysis: Analysis, runs: pd.DataFrame) -> dict[str, float]:
    """Mean training loss of the last tenth of the steps, at least one."""
    found = {}
    for run_id in runs["run_id"]:
        losses = analysis.study.curves([run_id])["loss"].dropna()
        if len(losses):
            found[run_id] = float(losses.tail(max(1, len(losses) // 10)).mean())
    return found


def _peft_result(row: Mapping[str, Any], *, solo: bool, split: str, loss: float | None) -> dict[str, Any]:
    basis = "train_seconds_solo" if solo else "train_seconds_amortised"
    seconds = _number(row.get(basis)) or 0.0
    memory = int(_number(row.get("peak_memory_solo_bytes")) or 0)
    metric = _accuracy(row, split)
    full = str(row["method"]).startswith("full")
    samples = int(
        (row.get("steps") or 0) * (row.get("trainer.batch_size") or 1) * (row.get("trainer.accumulation") or 1)
    )
    rank = "" if full or row.get("rank") is None else f"-rank{row['rank']:g}"
    name = f"{row['method']}/{row['model']}-{row['dataset']}-{row['placement']}{rank}-seed{row['seed']}-{row['run_id']}"
    metrics = {
        "step": row.get("steps"),
        "test accuracy": metric,
        "test nll": _number(row.get(f"{split}.nll")),
        "train loss": loss,
        "train samples": samples,
        "train total tokens": int(_number(row.get("train_tokens")) or 0),
        "forgetting": _number(row.get("forgetting")),
    }
    versions = dict.fromkeys(("transformers", "peft", "datasets", "bitsandbytes", "torch")) | _versions(row)
    return {
        "run_info": {
            "created_at": row.get("finished") or row.get("started") or "1970-01-01T00:00:00+00:00",
            "total_time": seconds,
            "experiment_name": name,
            "peft_branch": "none",
            "train_config": _train_config(row),
            "peft_config": None if full else _peft_config(row),
            "error_msg": str(row.get("error_message") or ""),
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": seconds,
            "file_size": int(_number(row.get("adapter_bytes")) or 0),
            "num_trainable_params": int(_number(row.get("trainable_parameters")) or 0),
            "num_total_params": int(_number(row.get("total_parameters")) or 0),
            "status": "success" if row["status"] == "completed" else "failed",
            "metrics": [metrics],
        },
        "meta_info": {
            "model_info": {"location": row.get("model.location"), "revision": row.get("model.revision")},
            "dataset_info": {"name": row["dataset"]},
            "package_info": {f"{name}-version": version for name, version in versions.items()},
            "system_info": {"accelerator": row.get("device")},
            "placement": row["placement"],
            "git_commit": row.get("git_commit"),
            "status": row["status"],
            "notes": f"times are {basis}; the memory fields are the peak of a short solo calibration (0: not measured)",
        },
    }


def _train_config(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_id": row["model"],
        "dataset": row["dataset"],
        "seed": row["seed"],
        "max_steps": row.get("trainer.max_steps"),
        "batch_size": row.get("trainer.batch_size"),
        "optimizer_type": "AdamW",
        "lr_scheduler": row.get("optim.schedule"),
        "optimizer_kwargs": {"lr": row.get("optim.lr"), "weight_decay": row.get("optim.weight_decay")},
        "grad_norm_clip": row.get("optim.max_grad_norm"),
        "max_seq_length": row.get("dataset.max_length"),
    }


def _peft_config(row: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's own configuration where the run kept it, else the same fields from its record."""
    path = Path(str(row.get("folder"))) / ADAPTER / "adapter_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    roles = [role for role in str(row.get("placement.roles") or "").split(",") if role]
    stand_in = {
        "r": int(row["rank"]),
        "lora_alpha": row.get("alpha"),
        "target_modules": roles,
        "lora_dropout": row.get("method.dropout"),
        "use_rslora": bool(row.get("method.rank_stabilised")),
        "base_model_name_or_path": row["model"],
    }
    return {**stand_in, **known, "peft_type": str(known.get("peft_type") or row["method"]).upper()}


def _versions(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("versions."): value for key, value in row.items() if key.startswith("versions.")}


def _accuracy(row: Mapping[str, Any], split: str) -> float | None:
    """The task metric: an accuracy if the run has one, else the first metric besides NLL."""
    skipped = {"nll", "perplexity", "perplexity_stated", "tokens", "examples"}
    names = [key.removeprefix(f"{split}.") for key in row if key.startswith(f"{split}.") and key.count(".") == 1]
    values = {name: _number(row[f"{split}.{name}"]) for name in names if name not in skipped}
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("exact_match", "accuracy", "final_number", *values):
        if name in values:
            return values[name]
    return None


def from_peft(folder: Path) -> list[dict[str, Any]]:
    """A folder of PEFT results (run_info, train_info, meta_info). Its accuracy is on PEFT's own test set, its memory
    and times are of a run alone; there are no per-example scores, so such rows have no paired tests.

    Raises:
        ValueError: the folder has no such file.
    """
    rows, task = [], folder.parent.name if folder.name == "results" else folder.name
    for path in sorted(folder.glob("*.json")):
        plain = read_json(path)
        if not (isinstance(plain, dict) and {"run_info", "train_info"} <= set(plain)):
            continue
        try:
            rows.append(_from_peft_result(plain, task, path))
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"--import {path}: no result of PEFT's ({type(error).__name__}: {error})") from None
    if not rows:
        raise ValueError(
            f"--import {folder}: no file with run_info and train_info; give a folder such as MetaMathQA/results"
        )
    return rows


def read_json(path: Path) -> Any:
    """The content of a file given to --import. Raises ValueError if it is not JSON."""
    try:
        return record.read_json(record.read_text(path))
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"--import {path}: not a JSON file ({error})") from None


def _from_peft_result(plain: Mapping[str, Any], task: str, path: Path) -> dict[str, Any]:
    run, train = plain["run_info"], plain["train_info"]
    settings, adapter = run.get("train_config") or {}, run.get("peft_config") or {}
    last = (train.get("metrics") or [{}])[-1]
    targets = adapter.get("target_modules")
    method = str(adapter["peft_type"]).lower() if adapter.get("peft_type") else "full-finetuning"
    for flag, name in (("use_dora", "dora"), ("use_rslora", "rslora")):
        method = name if adapter.get(flag) else method
    placement = "+".join(sorted(targets)) if isinstance(targets, list) else str(targets or "default")
    forgetting = _number(last.get("forgetting"))
    return {
        "run_id": f"peft:{path.stem}",
        "study": "peft",
        "source": "peft",
        "folder": None,
        "layout": 0,
        "experiment": run["experiment_name"],
        "status": "completed" if train.get("status") == "success" else "failed",
        "error": None if train.get("status") == "success" else str(train.get("status")),
        "error_message": run.get("error_msg"),
        "model": settings.get("model_id"),
        "dataset": settings.get("dataset") or task,
        "method": method,
        "allocation": None,
        "placement": placement,
        "rank": _number(adapter.get("r")),
        "alpha": _number(adapter.get("lora_alpha")),
        "seed": settings.get("seed"),
        "optim.lr": (settings.get("optimizer_kwargs") or {}).get("lr"),
        "trainer.max_steps": settings.get("max_steps"),
        "steps": last.get("step"),
        "trainable_parameters": train.get("num_trainable_params"),
        "total_parameters": train.get("num_total_params"),
        "train_seconds_solo": train.get("train_time"),
        "peak_memory_solo_bytes": train.get("accelerator_memory_max"),
        "adapter_bytes": train.get("file_size"),
        "train_tokens": last.get("train total tokens"),
        "test.nll": _number(last.get("test nll")),
        "test.exact_match": _number(last.get("test accuracy")),
        "forgetting": forgetting,
        "started": run.get("created_at"),
        "finished": run.get("created_at"),
        "device": ((plain.get("meta_info") or {}).get("system_info") or {}).get("accelerator"),
    }


def _absent_is_none(value: Any) -> Any:
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)) else value


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str | bool) or not math.isfinite(float(value)):
        return None
    return float(value)
