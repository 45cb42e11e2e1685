"""Tiny random models and adapters for them."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sweeper import models
from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel
from sweeper.models.architecture import number_of_layers
from sweeper.placement.placement import PLACEMENTS, resolve
from sweeper.spec import ModelSpec, PlacementSpec

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 288, "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 288},
}  # fmt: skip


@functools.cache
def _load(kind: str) -> BaseModel:
    spec = ModelSpec(name=f"tiny_{kind}", source="random", location=kind, config=CONFIGS[kind])
    return models.load(spec, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def load() -> Callable[[str], BaseModel]:
    """A tiny random model, float32 on the CPU, shared: a store must be taken off it again."""
    return _load


def _adapter(base: BaseModel, name: str = "full", rank: int = 4, *, seed: int = 0, **fields: Any) -> AdapterSpec:
    spec = PlacementSpec(name=name, roles=PLACEMENTS[name])
    names = [target.name for target in resolve(base.targets, spec, layers=number_of_layers(base.targets))]
    given = {"scales": dict.fromkeys(names, 2.0), "dropout": 0.0, "seed": seed} | fields
    return AdapterSpec(ranks=dict.fromkeys(names, rank), **given)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., AdapterSpec]:
    """An adapter of scale 2 on a placement: `make_adapter(base, "attn", 3, seed=1)`; `fields` of it win."""
    return _adapter
