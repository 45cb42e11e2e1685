"""Trainable parameters: the closed form, what the engine trains, and what PEFT and torch count."""

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from sweeper import methods, models
from sweeper.lora.trainee import UnpackedSpec
from sweeper.models import BaseModel, budget
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec
from sweeper.tasks.package import is_installed
from sweeper.training.pack import Pack, open_pack
from sweeper.training.pack_config import PackConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]
CPU, RANK, STEPS = torch.device("cpu"), 4, 10
OPTIONS: dict[str, dict[str, Any]] = {
    "peft": {"tuner": "ia3"},
    "relora": {"restarts": 2, "warmup_steps": 1},
    "sparse": {"sparsity": 0.75, "pattern": "random"},
}


def by_peft(base: BaseModel, targets: tuple[Target, ...], config: Any, only: str = "") -> int:
    """Trainable parameters of stock PEFT on the base in float32, of those whose name has `only` in it."""
    config.target_modules = {target.name for target in targets}
    model = get_peft_model(copy.deepcopy(base.model).float(), config)
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and only in name)


def wanted(base: BaseModel, targets: tuple[Target, ...], spec: RunSpec) -> int:
    """What stock PEFT or plain torch count for a method."""
    common: Any = {"fan_in_fan_out": targets[0].kind == "conv1d", "task_type": "CAUSAL_LM"}
    name = spec.method.name
    if name == "full_ft":
        return sum(p.numel() for p in base.model.parameters())
    if name == "bitfit":
        modules = [base.model.get_submodule(target.name) for target in targets]
        return sum(m.out_features if isinstance(m, nn.Linear) else m.weight.shape[1] for m in modules)
    if name == "adalora":
        config = AdaLoraConfig(target_r=RANK, init_r=6, tinit=1, tfinal=3, total_step=STEPS, **common)
        return by_peft(base, targets, config)
    if name == "vera":
        return by_peft(base, targets, VeraConfig(r=RANK, **common))
    if name == "peft":
        narrow = [target.name for target in targets if target.role == "ff_down"]
        return by_peft(base, targets, IA3Config(feedforward_modules=narrow, **common))
    if name == "sparse":  # PEFT has none: a quarter of each row of A and of each column of B
        return sum(RANK * (round(0.25 * t.in_features) + round(0.25 * t.out_features)) for t in targets)
    config = LoraConfig(r=RANK, use_dora=name == "dora", **common)
    return by_peft(base, targets, config, "lora_B" if name == "lora_fa" else "")


def trained(pack: Pack) -> int:
    """Values that the engine's optimiser moves for the run in slot 0."""
    store: Any = pack.store
    if store.rates is None:
        return sum(part.numel() for parts in store.views(0).values() for part in parts)
    return sum(int(part.count_nonzero()) for parts in store.views(0, store.rates).values() for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "qlora" or is_installed("bitsandbytes")])
def test_every_count_is_the_same(
    name: str, kind: str, dtype: torch.dtype, make_run: Any, make_job: Any, make_examples: Any, tiny_spec: Any,
    place: Any,
) -> None:  # fmt: skip
    method = {"name": name, "options": OPTIONS.get(name, {}), "rank_stabilised": name == "rslora"}
    spec = make_run("full", method=method, rank=RANK, alpha=8, trainer={"max_steps": STEPS})
    base = models.load(tiny_spec(kind), dtype=dtype, device=CPU)
    targets = place(base, "full")
    placed = methods.placed(spec.method, targets, base.targets, tied=models.is_tied(base.model))
    ranks = budget.uniform(placed, RANK)
    adapter = methods.adapter(spec, ranks)
    with open_pack(base, [adapter], PackConfig(batch_size=2)) as pack:
        pack.add(make_job("x", adapter, make_examples(0), batch_size=2))
        engine = pack.store.trainable if isinstance(adapter, UnpackedSpec) else trained(pack)  # type: ignore[attr-defined]
    assert engine == wanted(base, targets, spec)
    if name != "peft":  # what any tuner trains is known when it is built; a dry run says a LoRA's
        assert engine == methods.trainable(spec.method, ranks, total=models.total_parameters(base.model))
