"""The engine follows transformers.Trainer + PEFT step by step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel
from sweeper.training.pack import Pack

from .trainer import trainer_run

# PEFT still asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

STEPS, BATCH = 20, 4
OPTIM = {"lr": 5e-3, "weight_decay": 0.1, "warmup_fraction": 0.2, "max_grad_norm": 0.03, "beta2": 0.99}


def peft_model(base: BaseModel, adapter: AdapterSpec, start: dict[str, tuple[torch.Tensor, ...]]) -> Any:
    """PEFT on a copy of the base, its A set to the engine's."""
    (rank,) = set(adapter.ranks.values())
    (scale,) = set(adapter.scales.values())
    kinds = {target.kind for target in base.targets if target.name in adapter.ranks}
    config = LoraConfig(
        r=rank, lora_alpha=int(scale * rank), target_modules=list(adapter.ranks), task_type="CAUSAL_LM",
        fan_in_fan_out=kinds == {"conv1d"},
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base.model), config)
    with torch.no_grad():
        for name, (a, b, *_) in start.items():
            module = model.base_model.model.get_submodule(name)
            assert not module.lora_B.default.weight.any()
            assert not b.any()
            module.lora_A.default.weight.copy_(a)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["attn", "ff", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_engine_equals_trainer_with_peft(
    kind: str, name: str, accumulation: int, load: Any, make_job: Any, make_adapter: Any, make_examples: Any,
    train: Any, tmp_path: Path,
) -> None:  # fmt: skip
    base = load(kind)
    adapter = make_adapter(base, name, 4, scale=2.0)
    job = make_job("x", adapter, make_examples(7), steps=STEPS, bucketed=False, **OPTIM)
    start: dict[str, tuple[torch.Tensor, ...]] = {}

    def keep_start(pack: Pack, step: int) -> None:
        if step == 0:
            start.update(pack.snapshot(0))

    ours = train(base, [job], accumulation=accumulation, before_step=keep_start)["x"]
    model = peft_model(base, adapter, start)
    losses = trainer_run(model, job, tmp_path, accumulation=accumulation)

    assert max(ours.norms) > OPTIM["max_grad_norm"]  # clipping was at work
    assert ours.losses == pytest.approx(losses, rel=1e-5)
    for module_name, (a, b, *_) in ours.adapter.items():
        module = model.base_model.model.get_submodule(module_name)
        torch.testing.assert_close(a, module.lora_A.default.weight.data, rtol=0, atol=1e-4)
        torch.testing.assert_close(b.t(), module.lora_B.default.weight.data, rtol=0, atol=1e-4)
