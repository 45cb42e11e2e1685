"""Random base models of real shapes and random token rows, for speed and memory figures that need no weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peft_today import PLACEMENTS, SHAPES
from benchmarks.token_lengths import lengths
from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel
from sweeper.models.architecture import structure
from sweeper.models.proof import prove
from sweeper.run import Run
from sweeper.spec import (
    AllocationSpec,
    DatasetSpec,
    EvaluationSpec,
    MethodSpec,
    ModelSpec,
    OptimSpec,
    PlacementSpec,
    RunSpec,
    TrainerSpec,
)
from sweeper.training.batches import DataOrder
from sweeper.training.run_state import RunState


@dataclass(frozen=True)
class Row:
    input_ids: tuple[int, ...]
    prompt_length: int = 1


def base_model(shape: str, device: str, dtype: torch.dtype | None = None) -> BaseModel:
    """A frozen Llama of a named shape; unless told, bfloat16 on CUDA and float32 on the CPU, as the yardstick is."""
    model = random_model(shape, device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16))
    model.eval().requires_grad_(False)
    spec = ModelSpec(name=shape, source="random", location="llama")
    return BaseModel(
        model=model, tokenizer=None, targets=structure(model), spec=spec, stop_ids=(), verdict=prove(model)
    )


def random_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A Llama of a named shape, of transformers, with the weights of seed 0."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)


def adapter(base: BaseModel, placement: str, rank: int, seed: int = 0) -> AdapterSpec:
    names = [t.name for t in base.targets if t.name.rpartition(".")[2] in PLACEMENTS[placement]]
    return AdapterSpec(ranks=dict.fromkeys(names, rank), scales=dict.fromkeys(names, 2.0), dropout=0.0, seed=seed)


def rows_of(vocabulary: int, length: int, seed: int, task: str | None = None) -> list[Row]:
    """64 rows of random tokens, of one length; or as many and as long as those of a task are."""
    generator = torch.Generator().manual_seed(seed)
    if task is None:
        return [Row(tuple(row)) for row in torch.randint(0, vocabulary, (64, length), generator=generator).tolist()]
    return [
        Row(tuple(torch.randint(0, vocabulary, (total,), generator=generator).tolist()), prompt)
        for prompt, total in lengths(task)
    ]


def job(
    base: BaseModel, placement: str, rank: int, *, steps: int, batch: int, length: int, seed: int = 0,
    rows: list[Row] | None = None,
) -> RunState:  # fmt: skip
    """A run on random tokens; on `rows`, if there are any."""
    rows = rows or rows_of(base.model.config.vocab_size, length, seed)
    spec = RunSpec(
        model=base.spec, dataset=DatasetSpec(name="random", family="jsonl"), method=MethodSpec(name="lora"),
        placement=PlacementSpec(name=placement, patterns=("x",)), allocation=AllocationSpec(name="uniform"), rank=rank,
        alpha=2.0 * rank, optim=OptimSpec(lr=1e-4), trainer=TrainerSpec(max_steps=steps, batch_size=batch), seed=seed,
        evaluation=EvaluationSpec(name="none"),
    )  # fmt: skip
    run_id = f"{placement}-{rank}-{seed}"
    return RunState(
        run=Run(run_id=run_id, spec=spec, folder=Path(run_id)), adapter=adapter(base, placement, rank, seed),
        examples=rows, order=DataOrder([len(row.input_ids) for row in rows], batch, seed),
    )  # fmt: skip


def jobs_of(
    base: BaseModel, runs: list[tuple[str, int]], *, steps: int, batch: int, length: int, rows: str | None = None
) -> list[RunState]:  # fmt: skip
    """A run of each placement and rank, each with a seed of its own; on rows as long as a task's, if it is named."""
    vocabulary = base.model.config.vocab_size
    return [
        job(
            base, placement, rank, steps=steps, batch=batch, length=length, seed=seed,
            rows=rows_of(vocabulary, length, 0, rows) if rows else None,
        )
        for seed, (placement, rank) in enumerate(runs)
    ]  # fmt: skip
