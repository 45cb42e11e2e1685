"""transformers' Trainer, to compare with: the same batches in the same order, and every loss it saw."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from sweeper.tasks.example import Tokens
from sweeper.training.run_state import RunState


class Recording(Trainer):
    """Keeps the exact loss of every forward pass, and reads the data in the order given."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.seen.append(float(loss))
        return loss


def collate(examples: list[Tokens]) -> dict[str, torch.Tensor]:
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, example.prompt_length : length] = ids[row, example.prompt_length : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def ordered(job: RunState, accumulation: int = 1) -> list[Tokens]:
    """The examples of a job in the order in which it sees them."""
    return [job.examples[i] for n in range(job.steps * accumulation) for i in job.order.batch(n)]


def trainer_run(model: Any, job: RunState, folder: Path, *, accumulation: int = 1) -> list[float]:
    """Trains what of `model` has gradients as `job` says; the loss of every step."""
    optim = job.optim
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=job.steps, per_device_train_batch_size=job.order.batch_size,
        gradient_accumulation_steps=accumulation, learning_rate=optim.lr, weight_decay=optim.weight_decay,
        adam_beta2=optim.beta2, max_grad_norm=optim.max_grad_norm, lr_scheduler_type=optim.schedule,
        warmup_steps=int(job.steps * optim.warmup_fraction), use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = Recording(model=model, args=arguments, train_dataset=ordered(job, accumulation), data_collator=collate)
    trainer.seen = []
    trainer.train()
    return [sum(trainer.seen[n : n + accumulation]) for n in range(0, len(trainer.seen), accumulation)]
