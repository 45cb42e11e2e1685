"""Runs of three tasks, and the same in plain PyTorch: hooks add every rank block's product to the stock model."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper import methods
from sweeper.lora.blocks import Block, rows_of
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.optimizer import learning_rate
from sweeper.models import BaseModel
from sweeper.run import Run
from sweeper.spec import DatasetSpec, OptimSpec, SharingSpec, TrainerSpec
from sweeper.tasks.example import Tokens
from sweeper.tasks.mixture import Mixing
from sweeper.training.mixing import MixedOrder, Mixture
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState
from tests.training.conftest import _examples, _job, _place

NAMES = ("one", "two", "three")
STEPS = 20


def parts() -> list[Sequence[Tokens]]:
    """Tasks of different sizes and lengths."""
    return [_examples(10), _examples(11, count=9, longest=40), _examples(12, count=30, longest=12)]


def run_of(
    base: BaseModel, options: dict[str, Any], sharing: str = "single", *, rank: int = 8, seed: int = 0,
    steps: int = STEPS, batch_size: int = 6, accumulation: int = 1, family: str = "mixture", name: str = "",
    method: str = "lora", dropout: float = 0.0, optim: dict[str, Any] | None = None, conflict: int = 0,
    data: Sequence[Sequence[Tokens]] | None = None, **fields: Any,
) -> RunState:  # fmt: skip
    """A run of three tasks whose dataset has these options."""
    data = data or parts()
    targets = _place(base, "full")
    job = _job(name or f"run-{seed}", AdapterSpec(ranks={}, scales={}, dropout=0.0, seed=seed), data[0])
    dataset = DatasetSpec(
        name=family, family=family, options=options, parts=tuple(DatasetSpec(name=n, family="jsonl") for n in NAMES)
    )
    spec = dataclasses.replace(
        job.spec, dataset=dataset, sharing=SharingSpec(name=sharing, **fields), rank=rank, alpha=2.0 * rank, seed=seed,
        trainer=TrainerSpec(max_steps=steps, batch_size=batch_size, accumulation=accumulation),
        optim=OptimSpec(**({"lr": 2e-3, "max_grad_norm": 0.3} | (optim or {}))),
        method=dataclasses.replace(job.spec.method, name=method, dropout=dropout),
        evaluation=dataclasses.replace(job.spec.evaluation, conflict=conflict),
    )  # fmt: skip
    examples = [example for part in data for example in part]
    sizes = {one: len(part) for one, part in zip(NAMES, data, strict=True)}
    mixture = Mixture.of(Mixing.of(dataset), sizes, steps=steps, per_step=batch_size * accumulation)
    order = MixedOrder(
        [len(e.input_ids) for e in examples], mixture, seed, batch_size=batch_size, accumulation=accumulation
    )
    return RunState(
        run=Run(run_id=job.run_id, spec=spec, folder=Path(job.run_id)), examples=examples, order=order,
        adapter=methods.adapter(spec, dict.fromkeys(targets, rank)), mixture=mixture,
    )  # fmt: skip


class Plain:
    """A run's model, adapter and optimisers as plain PyTorch has them.

    Attributes:
        blocks: rank blocks; one of all tasks, where the adapter has none. values: parameters of each.
    """

    def __init__(self, base: BaseModel, job: RunState, begin: dict[str, tuple[Tensor, ...]]) -> None:
        assert isinstance(job.adapter, AdapterSpec)
        assert job.mixture is not None
        self.job, self.mixture, self.optim = job, job.mixture, job.spec.optim
        every, adapter = frozenset(range(len(NAMES))), job.adapter
        self.blocks = adapter.blocks or (
            Block(name="all", level=0, acts=every, trains=every, ranks=dict(adapter.ranks)),
        )
        self.scales = adapter.scales
        self.model = copy.deepcopy(base.model).requires_grad_(False)
        self.pairs: list[dict[str, tuple[nn.Parameter, nn.Parameter]]] = [{} for _ in self.blocks]
        self.tasks = torch.zeros(0, dtype=torch.int64)
        for name, (a, b, *_) in begin.items():
            for own, rows in zip(self.pairs, rows_of(self.blocks, name), strict=True):
                own[name] = nn.Parameter(a[rows].clone()), nn.Parameter(b[rows].clone())
            self.model.get_submodule(name).register_forward_hook(self._hook(name))
        self.values = [[value for pair in own.values() for value in pair] for own in self.pairs]
        self.optimizers = [self.adam(own) for own in self.values]

    def adam(self, values: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        optim = self.optim
        return torch.optim.AdamW(values, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for block, own in zip(self.blocks, self.pairs, strict=True):
                a, b = own[name]
                acts = torch.tensor([float(int(task) in block.acts) for task in self.tasks])
                output = output + acts[:, None, None] * self.scales[name] * (inputs[0] @ a.t()) @ b
            return output

        return add

    def losses(self, chosen: Sequence[int]) -> dict[int, Tensor]:
        """The mean NLL of each task that some examples are of, over its own tokens."""
        examples = [self.job.examples[i] for i in chosen]
        self.tasks = torch.tensor([int(self.mixture.task_of[i]) for i in chosen])
        length = max(len(one.input_ids) for one in examples)
        ids = torch.tensor([[*one.input_ids, *[0] * (length - len(one.input_ids))] for one in examples])
        mask = torch.tensor([[1] * len(o.input_ids) + [0] * (length - len(o.input_ids)) for o in examples])
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        found: dict[int, list[Tensor]] = {}
        for row, (one, task) in enumerate(zip(examples, self.tasks.tolist(), strict=True)):
            targets = torch.tensor(one.input_ids[one.prompt_length :])
            predicted = logits[row, one.prompt_length - 1 : len(one.input_ids) - 1]
            found.setdefault(task, []).append(functional.cross_entropy(predicted, targets, reduction="none"))
        return {task: torch.cat(nlls).mean() for task, nlls in sorted(found.items())}

    def gradients(self, loss: Tensor) -> list[list[Tensor]]:
        """Of the parameters of every block; zero where a loss does not depend on one."""
        flat = [value for own in self.values for value in own]
        found = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
        filled = iter(torch.zeros_like(v) if g is None else g for v, g in zip(flat, found, strict=True))
        return [[next(filled) for _ in own] for own in self.values]

    def step(self, step: int, present: set[int]) -> None:
        """Clips, steps and clears each block that the tasks of a step train; gradients are in place."""
        for block, values, optimizer in zip(self.blocks, self.values, self.optimizers, strict=True):
            goes = [bool(self.mixture.counts[at][sorted(block.trains)].sum()) for at in range(self.job.steps)]
            if block.trains & present:
                torch.nn.utils.clip_grad_norm_(values, self.optim.max_grad_norm or math.inf)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(self.optim, sum(goes[:step]), sum(goes))
                optimizer.step()
            optimizer.zero_grad()

    def assert_close(self, adapter: dict[str, tuple[Tensor, ...]], atol: float = 1e-4) -> None:
        """Whether a trained adapter is this one."""
        for name, rows in ((name, rows_of(self.blocks, name)) for name in self.scales):
            for own, part in zip(self.pairs, rows, strict=True):
                for value, wanted in zip(adapter[name][:2], own[name], strict=True):
                    torch.testing.assert_close(value[part], wanted.data, rtol=0, atol=atol)


def begun(base: BaseModel, job: RunState, train: Any, **options: Any) -> dict[str, tuple[Tensor, ...]]:
    """The adapter as a run begins with it."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def keep(pack: Any, step: int) -> None:
        if not step:
            found.update(pack.snapshot(0))

    once = job.with_spec(trainer=dataclasses.replace(job.spec.trainer, max_steps=1))
    train(base, [once], capacities=[job.capacity], before_step=keep, **options)
    assert isinstance(job.adapter, AdapterSpec)
    return {name: found[name] for name in job.adapter.ranks}


def trained(
    base: BaseModel, jobs: Sequence[RunState], *, steps: int | None = None, **options: Any
) -> tuple[dict[str, list[Any]], dict[str, dict[str, tuple[Tensor, ...]]]]:
    """Step results by run, and what each slot holds in the end; of `steps` of the jobs, or all."""
    results: dict[str, list[Any]] = {job.run_id: [] for job in jobs}
    own = [dataclasses.replace(job) for job in jobs]
    with Pack(base, [job.capacity for job in jobs], PackConfig(**({"batch_size": 6} | options))) as pack:
        for job in own:
            pack.add(job)
        for _ in range(steps or max(job.steps for job in jobs)):
            pack.step()
        for result in pack.drain():
            results[result.state.run_id].append(result)
        kept = {job.run_id: pack.snapshot(slot) for slot, job in enumerate(own)}
    return results, kept
