"""Random base models of real shapes and random token rows, for speed and memory figures that need no weights."""

from dataclasses import dataclass

import torch

from benchmarks.peft_today import PLACEMENTS, SHAPES
from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel
from sweeper.models.architecture import structure
from sweeper.models.proof import prove
from sweeper.spec import ModelSpec, OptimSpec
from sweeper.training.batches import DataOrder
from sweeper.training.pack import Job


@dataclass(frozen=True)
class Row:
    input_ids: tuple[int, ...]
    prompt_length: int = 1


def base_model(shape: str, device: str, dtype: torch.dtype | None = None) -> BaseModel:
    """A frozen Llama of a named shape; unless told, bfloat16 on CUDA and float32 on the CPU, as the yardstick is."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)
    model.eval().requires_grad_(False)
    spec = ModelSpec(name=shape, source="random", location="llama")
    return BaseModel(
        model=model, tokenizer=None, targets=structure(model), spec=spec, stop_ids=(), verdict=prove(model)
    )


def adapter(base: BaseModel, placement: str, rank: int, seed: int = 0) -> AdapterSpec:
    names = [t.name for t in base.targets if t.name.rpartition(".")[2] in PLACEMENTS[placement]]
    return AdapterSpec(ranks=dict.fromkeys(names, rank), scales=dict.fromkeys(names, 2.0), dropout=0.0, seed=seed)


def job(base: BaseModel, placement: str, rank: int, *, steps: int, batch: int, length: int, seed: int = 0) -> Job:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, base.model.config.vocab_size, (64, length), generator=generator).tolist()
    rows = [Row(tuple(row)) for row in tokens]
    return Job(
        run_id=f"{placement}-{rank}-{seed}", adapter=adapter(base, placement, rank, seed), optim=OptimSpec(lr=1e-4),
        steps=steps, seed=seed, examples=rows, order=DataOrder([length] * len(rows), batch, seed),
    )  # fmt: skip
