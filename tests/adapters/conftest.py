"""Runs with random adapters, as training leaves them, on tiny random models."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import models
from sweeper.models import BaseModel
from sweeper.placement.placement import PLACEMENTS, number_of_layers, resolve
from sweeper.record import ADAPTER, Module, Record, write_record
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import RunSpec, run_spec, to_mapping
from sweeper.training.export import write_adapter

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 288, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 288}
NEOX = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 288}
CONFIGS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": NEOX}
_BASES: dict[str, BaseModel] = {}


def model_of(kind: str) -> dict[str, Any]:
    return {"name": f"tiny_{kind}", "source": "random", "location": kind, "config": CONFIGS[kind]}


def base_of(spec: RunSpec) -> BaseModel:
    """The base model of a run, float32; shared, so leave it as it is."""
    key = repr(spec.model)
    if key not in _BASES:
        _BASES[key] = models.load(spec.model, dtype=torch.float32, device=torch.device("cpu"))
    return _BASES[key]


@pytest.fixture
def base() -> Callable[[RunSpec], BaseModel]:
    return base_of


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Saved]:
    """A completed run whose adapter is random: `saved("a", "gpt2", "attn", rank=4)`. `ranks` by role win over rank.

    Each rank's A and B are `decay` times those before it.
    """

    def make(
        name: str, kind: str = "llama", placement: str = "attn", *, rank: int = 4, seed: int = 0, size: float = 0.2,
        decay: float = 1.0, alpha: float | None = None, ranks: Mapping[str, int] | None = None,
        method: Mapping[str, Any] | None = None, **place: Any,
    ) -> Saved:  # fmt: skip
        spec = run_spec(
            {
                "model": model_of(kind),
                "dataset": {
                    "name": "chain_sum", "family": "chain_sum", "train_examples": 8, "validation_examples": 4,
                    "test_examples": 6, "max_length": 64, "template": "plain",
                },
                "method": {"name": "lora"} | dict(method or {}),
                "placement": {"name": placement, "roles": list(PLACEMENTS.get(placement, ())), **place},
                "allocation": {"name": "uniform"}, "rank": rank, "alpha": alpha or 2.0 * rank, "optim": {"lr": 1e-3},
                "trainer": {"max_steps": 1, "batch_size": 2, "precision": "float32"},
                "evaluation": {"name": "default", "splits": ["test"]}, "seed": seed,
            }
        )  # fmt: skip
        every = base_of(spec).targets
        targets = resolve(every, spec.placement, layers=number_of_layers(every))
        chosen = {target: (ranks or {}).get(target.role, rank) for target in targets}
        generator = torch.Generator().manual_seed(seed)
        factors = {
            target.name: tuple(
                size * decay ** torch.arange(one)[:, None] * torch.randn(one, side, generator=generator)
                for side in (target.in_features, target.out_features)
            )
            for target, one in chosen.items()
        }
        folder = tmp_path / "study" / name
        write_adapter(folder, spec, targets, factors)  # type: ignore[arg-type]
        return _recorded(folder, spec, chosen)

    return make


def _recorded(folder: Path, spec: RunSpec, chosen: Mapping[Any, int]) -> Saved:
    modules = tuple(
        Module(name=target.name, role=target.role, layer=target.layer, rank=rank, parameters=1)
        for target, rank in chosen.items()
    )
    done = Record(run_id=folder.name, study="study", status="completed", spec=to_mapping(spec), modules=modules)
    write_record(folder, done)
    (found,) = rescore.find([folder])
    return found


@pytest.fixture
def by_peft(saved: Callable[..., Saved]) -> Callable[..., Saved]:
    """A run whose adapter is of any PEFT kind, with random weights: `by_peft("a", VeraConfig, r=4)`."""

    def make(name: str, config: Any, kind: str = "llama", **fields: Any) -> Saved:
        from peft import get_peft_model

        run = saved(name, kind)
        names = list(run.ranks)
        built = config(target_modules=names, task_type="CAUSAL_LM", **fields)
        model = get_peft_model(copy.deepcopy(base_of(run.spec).model), built)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(run.folder / ADAPTER)
        return run

    return make


def updates_of(run: Saved) -> dict[str, torch.Tensor]:
    """dW [out, in] of every module of a LoRA run, by hand: every module has the run's scale, whatever its rank."""
    scale = run.spec.alpha / (run.spec.rank**0.5 if run.spec.method.rank_stabilised else run.spec.rank)
    saved = rescore.read_adapter(run.folder)
    pairs = {target.name: saved.parts(target) for target in base_of(run.spec).targets if saved.has(target)}
    return {name: scale * b.t() @ a for name, (a, b) in pairs.items()}
