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
from .load import NAME

PEFT_TASKS = ("MetaMathQA", "image-gen")
"""Tasks of PEFT's method_comparison, by folder."""
_LORA = ("lora", "dora", "rslora", "pissa", "olora", "lora_plus", "lora_fa", "qlora", "relora")  # LoraConfig's
_LONGEST = 60  # characters of a name that a table or figure is to hold
_DATA_OF_METAMATHQA = "metamath"  # in dataset_info of a result of that task


def to_peft(analysis: Analysis, folder: Path) -> list[Path]:
    """TASK/results/ with one file a run: run_info, train_info and meta_info, as the table and Pareto app of PEFT's
    repository read them. The task is our dataset, named by folder, `run_info.task` and experiment.

    No folder has the name of one of PEFT's own tasks: its results are of other prompts and another test set. That
    reader needs whole numbers for memory and numbers for times. Memory is the solo peak in all three of its fields (0
    where there was no calibration); times are solo seconds if every run has them, else every run's share of its pack.
    Which of the two is said in meta_info.
    """
    runs = analysis.study.runs.assign(arm=analysis.found.runs["arm"])
    runs = runs[runs["source"] == "study"]
    done = runs[runs["status"] == "completed"]
    solo = len(done) > 0 and bool(done["train_seconds_solo"].notna().all())
    losses = _last_losses(analysis, done)
    written: dict[Path, list[Path]] = {folder: []}  # a former version wrote there
    written |= {path.parent: [] for path in folder.glob(f"*/results/{manifest.MANIFEST}")}
    for row in runs.to_dict("records"):
        row = {str(key): _absent_is_none(value) for key, value in row.items()}
        modules = analysis.study.modules([row["run_id"]])
        plain = _peft_result(row, modules, solo=solo, split=analysis.found.split, loss=losses.get(row["run_id"]))
        # names are a record's; the end of one, which has the run's id, tells it from others
        stem = re.sub(r"[^\w.+-]+|^\.", "_", plain["run_info"]["experiment_name"].replace("/", "--"))[-200:]
        results = folder / _task_folder(str(row["dataset"])) / "results"
        results.mkdir(parents=True, exist_ok=True)
        path = results / f"{stem}.json"
        path.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        written.setdefault(results, []).append(path)
    for place, paths in written.items():
        if paths or (place / manifest.MANIFEST).is_file():
            manifest.update(place, paths)
    return [path for paths in written.values() for path in paths]


def _task_folder(task: str) -> str:
    """The folder of a task; never that of one of PEFT's."""
    name = re.sub(r"[^\w.+-]+|^\.+", "_", task)[:100] or "task"
    return f"{name}-lora-atlas" if name.casefold() in map(str.casefold, PEFT_TASKS) else name


def _last_losses(analysis: Analysis, runs: pd.DataFrame) -> dict[str, float]:
    """Mean training loss of the last tenth of the steps, at least one."""
    found = {}
    for run_id in runs["run_id"]:
        losses = analysis.study.curves([run_id])["loss"].dropna()
        if len(losses):
            found[run_id] = float(losses.tail(max(1, len(losses) // 10)).mean())
    return found


def _peft_result(
    row: Mapping[str, Any], modules: pd.DataFrame, *, solo: bool, split: str, loss: float | None
) -> dict[str, Any]:  # fmt: skip
    basis = "train_seconds_solo" if solo else "train_seconds_amortised"
    seconds = _number(row.get(basis)) or 0.0
    memory = int(_number(row.get("peak_memory_solo_bytes")) or 0)
    metric = _task_metric(row, split)
    full = str(row["method"]).startswith("full")
    samples = int(
        (row.get("steps") or 0) * (row.get("trainer.batch_size") or 1) * (row.get("trainer.accumulation") or 1)
    )
    rank = "" if full or row.get("rank") is None else f"-rank{row['rank']:g}"
    name = f"{row['method']}/{row['model']}-{row['dataset']}-{row['placement']}{rank}-seed{row['seed']}-{row['run_id']}"
    metrics = {
        "step": row.get("steps"),
        "valid accuracy": None if metric is None else _number(row.get(f"validation.{metric}")),
        "valid nll": _number(row.get("validation.nll")),
        "test accuracy": None if metric is None else _number(row.get(f"{split}.{metric}")),
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
            "task": row["dataset"],
            "peft_branch": "none",
            "train_config": _train_config(row),
            "peft_config": None if full else _peft_config(row, modules),
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
            "model_info": {
                "name": row["model"], "location": row.get("model.location"), "revision": row.get("model.revision"),
            },
            "dataset_info": {"name": row["dataset"], "path": row.get("dataset.path")},
            "package_info": {f"{name}-version": version for name, version in versions.items()},
            "system_info": {"accelerator": row.get("device")},
            "arm": row.get("arm"),
            "method": row["method"],
            "placement": row["placement"],
            "metric": metric,
            "git_commit": row.get("git_commit"),
            "status": row["status"],
            "notes": f"times are {basis}; the memory fields are the peak of a short solo calibration (0: not measured)",
        },
    }  # fmt: skip


def _train_config(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_id": row["model.location"] if row.get("model.source") == "hub" else row["model"],
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


def _peft_config(row: Mapping[str, Any], modules: pd.DataFrame) -> dict[str, Any]:
    """The adapter's own configuration where the run kept it, else the same fields from its record.

    `target_modules` are then the full names of the adapted modules, which PEFT takes as well as the ends of names.
    """
    path = Path(str(row.get("folder"))) / ADAPTER / "adapter_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    method, rank = str(row["method"]), int(row.get("rank") or 0)
    kind = "LORA" if method in _LORA else method.upper()
    stand_in = {
        "r": rank,
        "lora_alpha": row.get("alpha"),
        "target_modules": sorted(modules["name"]),
        "rank_pattern": {one.name: int(one.rank) for one in modules.itertuples() if one.rank != rank},
        "lora_dropout": row.get("method.dropout"),
        "use_rslora": method == "rslora" or bool(row.get("method.rank_stabilised")),
        "use_dora": method == "dora",
        "base_model_name_or_path": row["model"],
    }
    return {**stand_in, **known, "peft_type": str(known.get("peft_type") or kind).upper()}


def _versions(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("versions."): value for key, value in row.items() if key.startswith("versions.")}


def _task_metric(row: Mapping[str, Any], split: str) -> str | None:
    """Which score is written as PEFT's accuracy: one if the run has one, else the first besides NLL."""
    skipped = {"nll", "perplexity", "perplexity_stated", "tokens", "examples"}
    names = [key.removeprefix(f"{split}.") for key in row if key.startswith(f"{split}.") and key.count(".") == 1]
    known = [name for name in names if name not in skipped and _number(row[f"{split}.{name}"]) is not None]
    return next((name for name in ("exact_match", "accuracy", "final_number", *known) if name in known), None)


def from_peft(folder: Path) -> list[dict[str, Any]]:
    """Results of PEFT's method_comparison (run_info, train_info, meta_info): a folder of them, that of a task, or one
    of several tasks.

    Its accuracy is on PEFT's own test set, its memory and times are of a run alone; there are no per-example scores, so
    such rows have no paired tests. A row's dataset is the task that the file names. Files of PEFT's name none, and are
    of the task whose folder they are in; but of MetaMathQA only where they say that they trained on its data.

    Raises:
        ValueError: the folder has no such file.
    """
    rows = []
    for place in _places(folder):
        task = place.resolve().parent.name if place.resolve().name.endswith("results") else place.resolve().name
        for path in sorted(place.glob("*.json")):
            plain = read_json(path)
            if not (isinstance(plain, dict) and {"run_info", "train_info"} <= set(plain)):
                continue
            try:
                rows.append(_from_peft_result(plain, task, path))
            except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(f"--import {path}: no result of PEFT's ({type(error).__name__}: {error})") from None
    if not rows:
        raise ValueError(
            f"--import {folder}: no file with run_info and train_info; give a folder such as MetaMathQA/results"
        )
    return rows


def _places(folder: Path) -> list[Path]:
    """The folders with results: of a task its `results`, of several tasks those of each, else the folder itself."""
    inside = [path for path in (folder / "results", *sorted(folder.glob("*/results"))) if path.is_dir()]
    return inside or [folder]


def read_json(path: Path) -> Any:
    """The content of a file given to --import. Raises ValueError if it is not JSON."""
    try:
        return record.read_json(record.read_text(path))
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"--import {path}: not a JSON file ({error})") from None


def _from_peft_result(plain: Mapping[str, Any], task: str, path: Path) -> dict[str, Any]:
    run, train, meta = plain["run_info"], plain["train_info"], plain.get("meta_info") or {}
    settings, adapter = run.get("train_config") or {}, run.get("peft_config") or {}
    every = train.get("metrics") or [{}]
    last: Mapping[str, Any] = every[-1]
    validated: Mapping[str, Any] = next((one for one in reversed(every) if "valid accuracy" in one), {})
    system = meta.get("system_info") or {}
    metric = str(meta.get("metric") or "accuracy")
    if not NAME.fullmatch(metric):
        raise ValueError(f"{metric[:40]!r} is no name of a metric")
    done = train.get("status") == "success"
    return {
        "run_id": f"peft:{path.stem}",
        "study": "peft",
        "source": "peft",
        "folder": None,
        "layout": 0,
        "experiment": _short(str(meta.get("arm") or run["experiment_name"])),
        "status": "completed" if done else "failed",
        "error": None if done else str(train.get("status")),
        "error_message": run.get("error_msg"),
        "model": _short(str((meta.get("model_info") or {}).get("name") or settings.get("model_id"))),
        "dataset": _short(_task(plain, task)),
        "method": _method(adapter, meta),
        "allocation": None,
        "placement": _short(str(meta.get("placement") or _placement(adapter))),
        "rank": _number(adapter.get("target_r" if adapter.get("peft_type") == "ADALORA" else "r")),
        "alpha": _number(adapter.get("lora_alpha")),
        "seed": settings.get("seed", 0),
        "optim.lr": (settings.get("optimizer_kwargs") or {}).get("lr"),
        "trainer.max_steps": settings.get("max_steps"),
        "steps": last.get("step"),
        "trainable_parameters": train.get("num_trainable_params"),
        "total_parameters": train.get("num_total_params"),
        "train_seconds_solo": train.get("train_time"),
        "peak_memory_solo_bytes": train.get("accelerator_memory_max", train.get("cuda_memory_max")),
        "adapter_bytes": train.get("file_size"),
        "train_tokens": last.get("train total tokens"),
        "validation.nll": _number(validated.get("valid nll")),
        f"validation.{metric}": _number(validated.get("valid accuracy")),
        "test.nll": _number(last.get("test nll")),
        f"test.{metric}": _number(last.get("test accuracy")),
        "forgetting": _number(last.get("forgetting")),
        "started": run.get("created_at"),
        "finished": run.get("created_at"),
        "device": system.get("accelerator") or system.get("gpu"),
    }


def _task(plain: Mapping[str, Any], folder: str) -> str:
    """The task of a result: what the file says; of a file of PEFT's, which says nothing, its folder."""
    named = plain["run_info"].get("task") or (plain["run_info"].get("train_config") or {}).get("dataset")
    if named:
        return str(named)
    data = (plain.get("meta_info") or {}).get("dataset_info") or {}
    if folder.casefold() == "metamathqa" and data and _DATA_OF_METAMATHQA not in data:
        return "+".join(map(str, data))
    return folder


def _method(adapter: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    if meta.get("method"):
        return str(meta["method"])
    for flag, name in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if adapter.get(flag):
            return name
    return str(adapter["peft_type"]).lower() if adapter.get("peft_type") else "full-finetuning"


def _placement(adapter: Mapping[str, Any]) -> str:
    """The kinds of modules that are adapted: the last part of their names; "default" where PEFT chose."""
    targets = adapter.get("target_modules")
    if not isinstance(targets, list):
        return str(targets or "default")
    kinds = sorted({str(name).rpartition(".")[2] for name in targets})
    return "+".join(kinds) or "default"


def _short(name: str) -> str:
    """A name that fits a table: of a long one both ends."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 23]}...{name[-20:]}"


def _absent_is_none(value: Any) -> Any:
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)) else value


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str | bool) or not math.isfinite(float(value)):
        return None
    return float(value)
