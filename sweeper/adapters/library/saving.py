"""What a comparison leaves: its record beside the study, and on request adapters that PEFT loads."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sweeper import record
from sweeper.adapters.library import members
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench
from sweeper.adapters.library.experts import Folded
from sweeper.adapters.library.scoring import Scored
from sweeper.models.files import base_reference
from sweeper.rescoring.rescore import Saved, keeps_texts
from sweeper.spec import DatasetSpec, EvaluationSpec, MethodSpec, to_mapping
from sweeper.training import card, texts
from sweeper.training.environment import describe
from sweeper.training.export import write_adapter

SCHEMA = 1


def identity(runs: Sequence[Saved], dataset: DatasetSpec, asked: Asked, evaluation: EvaluationSpec) -> str:
    """12 hex digits that tell one comparison from another: members, task, rules and all their numbers.

    The same command gives the same, and replaces its own results; another leaves them alone.
    """
    plain = {
        "members": [[members.name(run), to_mapping(run.spec)] for run in runs],
        "dataset": to_mapping(dataset), "asked": _plain(asked),
        "generate": evaluation.generate,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(runs: Sequence[Saved]) -> Path:
    """Where results go unless somebody says where: `library/` in the study of the first member."""
    first = runs[0].folder
    run = first.parent.parent if first.parent.name == record.TASKS else first
    return run.parent / record.LIBRARY


def write(
    place: Path, name: str, bench: Bench, asked: Asked, dataset: DatasetSpec, found: Sequence[Scored]
) -> Path:  # fmt: skip
    """Writes `place/NAME.jsonl`, a line an example, and then `place/NAME.json`, which it returns; of one task."""
    rows = [{"task": one.task, "rule": one.rule, **row} for one in found for row in one.rows]
    keep = all(keeps_texts(run.folder) for run in bench.members)
    record.write_lines(place / f"{name}.jsonl", texts.bounded(rows, keep=keep))
    plain = {
        "schema": SCHEMA, "library": name, "model": bench.members[0].spec.model.name,
        "members": [
            {
                "run_id": members.name(run), "folder": str(run.folder),
                "trained_on": [task.name for task in members.tasks_of(run)], "spec": to_mapping(run.spec),
            }
            for run in bench.members
        ],
        "asked": _plain(asked), "dataset": to_mapping(dataset),
        "results": [_result(one) for one in found],
        "environment": describe(bench.pack.device, bench.pack.dtype),
    }  # fmt: skip
    return record.write_json(place / f"{name}.json", plain)


def save_adapter(folder: Path, bench: Bench, router: Folded, task: str, facts: Mapping[str, Any]) -> None:
    """Writes `folder/adapter/`, an ordinary LoRA that PEFT loads, and `folder/combined.json`.

    `evaluate.py` and `adapters.py` take the folder like a run's.
    """
    factors = {
        name: (a.float().contiguous(), b.float().contiguous()) for name, (a, b) in router.factors.items() if len(a)
    }
    rank = max(len(a) for a, _ in factors.values())
    first = bench.members[0].spec
    spec = dataclasses.replace(first, method=MethodSpec(name="lora"), rank=rank, alpha=float(rank))
    write_adapter(folder, spec, [one.target for one in bench.experts if one.target.name in factors], factors)
    parts = ", ".join(f"`{members.name(run)}`" for run in bench.members)
    card.write(folder, spec, note=f"LoRAHub's combination for {task} of the runs {parts}, made with {card.PROJECT}.")
    note = {
        "method": f"lorahub on {task}", **facts,
        "from": [{"run_id": members.name(run), "folder": str(run.folder)} for run in bench.members],
        "ranks": {name: len(a) for name, (a, _) in factors.items()}, "spec": to_mapping(spec),
    }  # fmt: skip
    record.write_json(folder / record.COMBINED, note)


def arrow_readme(folder: Path, runs: Sequence[Saved], general: Sequence[Saved], asked: Asked) -> None:
    """Says in `folder/README.md` how PEFT makes the same routed model of the members' own folders."""
    base = base_reference(runs[0].spec.model)["base_model_name_or_path"]
    config = f"top_k={asked.most(len(runs))}, router_temperature={asked.temperature:g}, rng_seed=0"
    lines = [
        f"# Arrow over {len(runs)} adapters of {runs[0].spec.model.name} ({base})", "",
        f"Nothing was trained. PEFT {importlib.metadata.version('peft')} makes the same model of the adapters as they "
        "lie; its own prototypes are 15 steps of power iteration, ours are exact. It needs one rank and the same "
        "modules in all of them.", "",
        "```python", "from peft import ArrowConfig, create_arrow_model", "", "model = create_arrow_model(",
        "    base_model,", "    task_specific_adapter_paths=[",
        *(f'        "{run.adapter.absolute()}",' for run in runs), "    ],",
        f"    arrow_config=ArrowConfig({config}{', use_gks=True' if general else ''}),",
    ]  # fmt: skip
    if general:
        lines += ["    general_adapter_paths=[", *(f'        "{run.adapter.absolute()}",' for run in general), "    ],"]
    record.write_atomically(folder / "README.md", "\n".join([*lines, ")", "```", ""]))


def _result(one: Scored) -> dict[str, Any]:
    plain = {key: getattr(one, key) for key in ("task", "rule", "right", "seconds_per_token", "cost", "fit_seconds")}
    score = asdict(one.score) | {"metrics": dict(one.score.metrics), "perplexity": one.score.perplexity}
    return plain | {"split": "test", "score": score, "facts": dict(one.facts)}


def _plain(asked: Asked) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(asked).items()}
