"""The engine follows transformers.Trainer + PEFT step by step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from sweeper.engine.bank.adapters import AdapterSpec
from sweeper.engine.pack import Job, Pack
from sweeper.models import BaseModel

# PEFT still asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

STEPS, BATCH = 20, 4
OPTIM = {"lr": 5e-3, "weight_decay": 0.1, "warmup_fraction": 0.2, "max_grad_norm": 0.03, "beta2": 0.99}


class Recording(Trainer):
    """Keeps the exact loss of every forward pass, and reads the data in the order given."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.seen.append(float(loss))
        return loss


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["ids"]) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example["ids"])
        ids[row, :length] = torch.tensor(example["ids"])
        labels[row, example["prompt"] : length] = ids[row, example["prompt"] : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


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


def trainer_run(model: Any, job: Job, accumulation: int, folder: Path) -> list[float]:
    order = [i for n in range(STEPS * accumulation) for i in job.order.batch(n)]
    rows = [{"ids": job.examples[i].input_ids, "prompt": job.examples[i].prompt_length} for i in order]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation, learning_rate=OPTIM["lr"], weight_decay=OPTIM["weight_decay"],
        adam_beta2=OPTIM["beta2"], max_grad_norm=OPTIM["max_grad_norm"], lr_scheduler_type="cosine",
        warmup_steps=int(STEPS * OPTIM["warmup_fraction"]), use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = Recording(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.seen = []
    trainer.train()
    return [sum(trainer.seen[n : n + accumulation]) for n in range(0, len(trainer.seen), accumulation)]


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
    losses = trainer_run(model, job, accumulation, tmp_path)

    assert max(ours.norms) > OPTIM["max_grad_norm"]  # clipping was at work
    assert ours.losses == pytest.approx(losses, rel=1e-5)
    for module_name, (a, b, *_) in ours.adapter.items():
        module = model.base_model.model.get_submodule(module_name)
        torch.testing.assert_close(a, module.lora_A.default.weight.data, rtol=0, atol=1e-4)
        torch.testing.assert_close(b.t(), module.lora_B.default.weight.data, rtol=0, atol=1e-4)
