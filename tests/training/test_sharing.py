"""Rank blocks shared by several tasks: packed runs equal a plain PyTorch model of them, and tasks trained alone."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper import methods
from sweeper.lora.blocks import rows_of
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.optimizer import learning_rate
from sweeper.models import BaseModel
from sweeper.placement.placement import PLACEMENTS
from sweeper.run import Run
from sweeper.spec import DatasetSpec, OptimSpec, PlacementSpec, SharingSpec, TrainerSpec
from sweeper.tasks.mixture import Mixing
from sweeper.training.batches import DataOrder
from sweeper.training.mixing import MixedOrder, Mixture, counts, shares, stages
from sweeper.training.run_state import RunState

NAMES = ("one", "two", "three")
TREE = (("one", "two"), "three")
STEPS = 20
MakeShared = Callable[..., RunState]


@pytest.fixture
def shared(make_job: Any, make_adapter: Any, make_examples: Any, place: Any) -> MakeShared:
    """A run of three tasks of different sizes and lengths: `shared(base, "hierarchical", tree=TREE)`."""

    def make(
        base: BaseModel, name: str, placement: str = "full", *, rank: int = 8, seed: int = 0, steps: int = STEPS,
        batch_size: int = 6, family: str = "mixture", options: dict[str, Any] | None = None,
        optim: dict[str, Any] | None = None, method: str = "lora", **sharing: Any,
    ) -> RunState:  # fmt: skip
        parts = [make_examples(10), make_examples(11, count=9, longest=40), make_examples(12, count=30, longest=12)]
        job = make_job(f"{name}-{placement}-{seed}", make_adapter(base, placement, rank, seed=seed), parts[0])
        mixed = {"sampling": "equal"} if family == "mixture" else {}
        dataset = DatasetSpec(
            name=family, family=family, options=options or mixed,
            parts=tuple(DatasetSpec(name=one, family="jsonl") for one in NAMES),
        )  # fmt: skip
        plan = OptimSpec(**({"lr": 2e-3, "max_grad_norm": 0.3} | (optim or {})))
        spec = dataclasses.replace(
            job.spec, dataset=dataset, sharing=SharingSpec(name=name, **sharing), rank=rank, alpha=2.0 * rank,
            trainer=TrainerSpec(max_steps=steps, batch_size=batch_size), seed=seed, optim=plan,
            method=dataclasses.replace(job.spec.method, name=method),
        )  # fmt: skip
        examples = [example for part in parts for example in part]
        sizes = {one: len(part) for one, part in zip(NAMES, parts, strict=True)}
        mixture = Mixture.of(Mixing.of(dataset), sizes, steps=steps, per_step=batch_size)
        order = MixedOrder([len(e.input_ids) for e in examples], mixture, seed, batch_size=batch_size, accumulation=1)
        adapter = methods.adapter(spec, dict.fromkeys(place(base, placement), rank))
        return RunState(
            run=Run(run_id=job.run_id, spec=spec, folder=Path(job.run_id)), adapter=adapter, examples=examples,
            order=order, mixture=mixture,
        )  # fmt: skip

    return make


class Reference:
    """A run as plain PyTorch: hooks add every block's product where a row's task has it; each block has its AdamW."""

    def __init__(self, base: BaseModel, job: RunState, begin: dict[str, tuple[Tensor, ...]]) -> None:
        assert isinstance(job.adapter, AdapterSpec)
        assert job.mixture is not None
        self.job, self.blocks, self.mixture = job, job.adapter.blocks, job.mixture
        self.scales = job.adapter.scales
        self.model = copy.deepcopy(base.model).requires_grad_(False)
        self.parts: list[dict[str, tuple[nn.Parameter, nn.Parameter]]] = [{} for _ in self.blocks]
        self.optimizers = []
        for name, (a, b, *_) in begin.items():
            for own, rows in zip(self.parts, rows_of(self.blocks, name), strict=True):
                own[name] = nn.Parameter(a[rows].clone()), nn.Parameter(b[rows].clone())
        for name in begin:
            self.model.get_submodule(name).register_forward_hook(self._hook(name))
        optim = job.spec.optim
        for own in self.parts:
            values = [value for pair in own.values() for value in pair]
            self.optimizers.append(
                torch.optim.AdamW(values, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0)
            )
        self.tasks = torch.zeros(0, dtype=torch.int64)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for block, own in zip(self.blocks, self.parts, strict=True):
                a, b = own[name]
                if len(a):
                    acts = torch.tensor([int(task) in block.acts for task in self.tasks], dtype=output.dtype)
                    output = output + acts[:, None, None] * self.scales[name] * (inputs[0] @ a.t()) @ b
            return output

        return add

    def step(self, step: int, examples: Sequence[Any], tasks: Sequence[int]) -> float:
        self.tasks = torch.tensor(tasks)
        length = max(len(one.input_ids) for one in examples)
        ids = torch.tensor([[*one.input_ids, *[0] * (length - len(one.input_ids))] for one in examples])
        mask = torch.tensor([[1] * len(o.input_ids) + [0] * (length - len(o.input_ids)) for o in examples])
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        sums, sizes = [torch.zeros(()) for _ in NAMES], [0] * len(NAMES)
        for row, (one, task) in enumerate(zip(examples, tasks, strict=True)):
            targets = torch.tensor(one.input_ids[one.prompt_length :])
            predicted = logits[row, one.prompt_length - 1 : len(one.input_ids) - 1]
            sums[task] = sums[task] + functional.cross_entropy(predicted, targets, reduction="sum")
            sizes[task] += len(targets)
        if self.mixture.weighting == "tokens":
            loss = torch.stack(sums).sum() / sum(sizes)
        else:
            loss = torch.stack([total / size for total, size in zip(sums, sizes, strict=True) if size]).sum()
        apart = [
            (own[name][0] @ before[name][0].detach().t()).square().sum()
            for name in self.parts[0] for number, own in enumerate(self.parts) for before in self.parts[:number]
        ]  # fmt: skip
        (loss + self.job.spec.sharing.orthogonality * sum(apart)).backward()
        optim, present = self.job.spec.optim, set(tasks)
        for block, optimizer in zip(self.blocks, self.optimizers, strict=True):
            values = [value for group in optimizer.param_groups for value in group["params"]]
            goes = [bool(self.mixture.counts[at][sorted(block.trains)].sum()) for at in range(self.job.steps)]
            if block.trains & present:
                torch.nn.utils.clip_grad_norm_(values, optim.max_grad_norm or math.inf)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(optim, sum(goes[:step]), sum(goes))
                optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def run(self) -> list[float]:
        losses = []
        for step in range(self.job.steps):
            chosen = self.job.order.step(step)
            tasks = [int(self.mixture.task_of[i]) for i in chosen]
            losses.append(self.step(step, [self.job.examples[i] for i in chosen], tasks))
        return losses


def begun(base: BaseModel, job: RunState, train: Any) -> dict[str, tuple[Tensor, ...]]:
    """The adapter as it begins."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def keep(pack: Any, step: int) -> None:
        if not step:
            found.update(pack.snapshot(0))

    once = job.with_spec(trainer=dataclasses.replace(job.spec.trainer, max_steps=1))
    train(base, [once], capacities=[job.capacity], before_step=keep)
    return found


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_a_pack_of_shared_adapters_equals_plain_pytorch(
    kind: str, load: Any, shared: MakeShared, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load(kind)
    jobs = [
        shared(base, "shared", optim={"schedule": "linear"}),
        shared(base, "per_task", "attn", rank=4, seed=1, options={"sampling": "proportional"}),
        shared(base, "hierarchical", "ff", rank=16, seed=2, tree=TREE, levels=(4, 4, 8)),
        shared(base, "shared", "full", seed=3, budget="total", rank=24, options={"weights": "tokens"}),
        shared(base, "orthogonal", "attn", seed=4, family="sequence", orthogonality=0.5),
        shared(base, "shared", "full", seed=5, options={"sampling": "temperature", "temperature": 3.0}),
    ][: 6 if kind == "llama" else 2]
    plain = make_job("plain", make_adapter(base, "full", 4), make_examples(0), steps=STEPS, batch_size=6)
    packed = train(base, [*jobs, plain], capacities=[*(job.capacity for job in jobs), plain.capacity])
    for job in jobs:
        reference = Reference(base, job, begun(base, job, train))
        assert packed[job.run_id].losses == pytest.approx(reference.run(), rel=1e-4)
        for name, (a, b, *_) in packed[job.run_id].adapter.items():
            for own, rows in zip(reference.parts, rows_of(job.adapter.blocks, name), strict=True):
                torch.testing.assert_close(a[rows], own[name][0].data, rtol=0, atol=1e-4)
                torch.testing.assert_close(b[rows], own[name][1].data, rtol=0, atol=1e-4)
    alone = train(base, [plain])["plain"]
    assert packed["plain"].losses == pytest.approx(alone.losses, rel=1e-5)


def test_a_block_of_a_task_is_the_task_trained_alone(
    load: Any, shared: MakeShared, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load("llama")
    job = shared(base, "per_task", rank=4)
    packed = train(base, [job], capacities=[job.capacity])[job.run_id]
    settings = {"steps": STEPS, "batch_size": 2, "lr": 2e-3, "max_grad_norm": 0.3}
    parts = [make_examples(10), make_examples(11, count=9, longest=40), make_examples(12, count=30, longest=12)]
    solo = [
        make_job(name, make_adapter(base, "full", 4), part, **settings) for name, part in zip(NAMES, parts, strict=True)
    ]
    alone = train(base, solo)
    assert packed.losses == pytest.approx(
        [sum(losses) for losses in zip(*(alone[name].losses for name in NAMES), strict=True)], rel=1e-5
    )
    for name, (a, b, *_) in packed.adapter.items():
        for task, rows in zip(NAMES, rows_of(job.adapter.blocks, name), strict=True):
            torch.testing.assert_close(a[rows], alone[task].adapter[name][0], rtol=0, atol=1e-5)
            torch.testing.assert_close(b[rows], alone[task].adapter[name][1], rtol=0, atol=1e-5)
    assert max(max(alone[name].norms) for name in NAMES) > 0.3  # clipping was at work


def test_a_constant_gate_is_plain_lora_bit_for_bit(
    load: Any, shared: MakeShared, train: Any, assert_identical: Any
) -> None:
    base = load("llama")
    gated = shared(base, "per_task", rank=4)
    block = dataclasses.replace(gated.adapter.blocks[0], acts=frozenset(range(3)), trains=frozenset(range(3)))
    scales = {name: gated.adapter.scales[name] for name in block.ranks}
    plain = dataclasses.replace(gated.adapter, blocks=(), tasks=1, ranks=dict(block.ranks), scales=scales)
    one = dataclasses.replace(plain, blocks=(block,), tasks=3)
    jobs = [dataclasses.replace(gated, adapter=adapter) for adapter in (one, plain)]
    traces = [train(base, [job], capacities=[job.capacity])[job.run_id] for job in jobs]
    assert_identical(*traces)
    assert traces[0].norms == traces[1].norms


def test_what_shares_a_pack_with_gated_runs_does_not_notice(
    load: Any, shared: MakeShared, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    """A slot may hold a gated run and then a plain one, or the other way round."""
    base = load("llama")
    first, last = shared(base, "shared", steps=3), shared(base, "per_task", rank=4, seed=1, steps=4)
    plain = make_job("plain", make_adapter(base, "full", 8), make_examples(0), steps=5, batch_size=6)
    most = type(plain.capacity).union([first.capacity, last.capacity, plain.capacity])
    packed = train(base, [first, plain, last], capacities=[most])
    for job in (first, plain, last):
        alone = train(base, [job], capacities=[job.capacity])[job.run_id]
        assert packed[job.run_id].losses == pytest.approx(alone.losses, rel=1e-5)


def test_a_step_without_a_tasks_rows_leaves_its_block_as_it_is(load: Any, shared: MakeShared, train: Any) -> None:
    base = load("llama")
    job = shared(base, "stack", "attn", rank=4, family="sequence", steps=6, optim={"weight_decay": 0.5})
    seen: list[dict[str, tuple[Tensor, ...]]] = []
    train(base, [job], capacities=[job.capacity], before_step=lambda pack, step: seen.append(pack.snapshot(0)))
    assert [list(stage) for stage in stages(3, 6)] == [[0, 1], [2, 3], [4, 5]]
    name = next(iter(seen[0]))
    for task, rows in enumerate(rows_of(job.adapter.blocks, name)):
        moved = [
            any(not before[part][rows].equal(after[part][rows]) for part in range(6))
            for before, after in zip((s[name] for s in seen), (s[name] for s in seen[1:]), strict=False)
        ]
        assert [step for step, did in enumerate(moved) if did] == [
            step for step in (2 * task, 2 * task + 1) if step < 5
        ]


def test_blocks_of_one_level_begin_alike_and_others_do_not(load: Any, shared: MakeShared, train: Any) -> None:
    base = load("llama")
    job = shared(base, "shared", rank=8)
    name, (a, b, *_) = next(iter(begun(base, job, train).items()))
    common, *own = [a[rows] for rows in rows_of(job.adapter.blocks, name)]
    assert own[0].equal(own[1])
    assert own[1].equal(own[2])
    assert not common.equal(own[0])
    assert not b.any()


@pytest.mark.parametrize("sampling", ["proportional", "equal", "temperature"])
def test_examples_keep_to_the_shares(sampling: str) -> None:
    mixing = Mixing(sampling=sampling, temperature=2.0 if sampling == "temperature" else 1.0)
    wanted = {"proportional": [1, 4, 15], "equal": [1, 1, 1], "temperature": [1, 2, 15**0.5]}[sampling]
    found = counts(shares(mixing, [100, 400, 1500], 300), 8)
    assert (found.sum(1) == 8).all()
    assert found.min() >= 0
    drift = found.cumsum(0) - [[8 * step * w / sum(wanted) for w in wanted] for step in range(1, 301)]
    assert abs(drift).max() <= 1


def test_a_sequence_has_one_task_after_another_and_replays_those_before() -> None:
    found = counts(shares(Mixing(sequence=True, replay=0.25), [10, 10, 10], 30), 8)
    assert found[:10].tolist() == [[8, 0, 0]] * 10
    assert found[10:20].tolist() == [[2, 6, 0]] * 10
    assert (found[20:, 2] == 6).all()
    assert found[20:, 0].sum() == found[20:, 1].sum() == 10


def test_steps_of_a_task_are_those_it_would_have_alone(load: Any, shared: MakeShared, make_job: Any) -> None:
    job = shared(load("llama"), "per_task", rank=4)
    assert isinstance(job.order, MixedOrder)
    assert job.mixture is not None
    first = int((job.mixture.task_of == 0).sum())
    alone = DataOrder(job.order.lengths[first : first + 9], 2, job.seed)
    for step in range(100):
        assert [i - first for i in job.order.step(step)[2:4]] == alone.batch(step)
    assert [job.order.batch(step) for step in range(5)] == [job.order.step(step) for step in range(5)]


def test_the_ranks_of_a_tree_go_round(load: Any, shared: MakeShared) -> None:
    base = load("llama")

    def ranks(name: str, **fields: Any) -> list[int]:
        adapter = shared(base, name, **fields).adapter
        assert isinstance(adapter, AdapterSpec)
        module = next(iter(adapter.ranks))
        return [block.ranks.get(module, 0) for block in adapter.blocks]

    assert ranks("per_task") == [8, 8, 8]
    assert ranks("per_task", budget="total", rank=12) == [4, 4, 4]
    assert ranks("shared") == [4, 4, 4, 4]
    assert ranks("shared", rank=24, budget="total") == [12, 4, 4, 4]
    assert ranks("shared", levels=(8, 4)) == [8, 4, 4, 4]
    # root, group, one, two, three: a row of three has no group, and so has more of its own
    assert ranks("hierarchical", rank=12, tree=TREE) == [4, 4, 4, 4, 8]
    assert ranks("stack", family="sequence") == [8, 8, 8]


def test_blocks_may_lie_in_some_of_the_modules(load: Any, shared: MakeShared, place: Any) -> None:
    base = load("llama")
    attn = PlacementSpec(name="attn", roles=PLACEMENTS["attn"])
    job = shared(base, "shared", private=attn)
    assert isinstance(job.adapter, AdapterSpec)
    common, *own = job.adapter.blocks
    there = {target.name for target in place(base, "attn")}
    assert set(own[0].ranks) == there
    for name in job.adapter.ranks:
        assert common.ranks[name] == (4 if name in there else 8)
        assert job.adapter.ranks[name] == (16 if name in there else 8)
