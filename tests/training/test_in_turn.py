"""Strategies for tasks one after another: folding into the weights, and elastic weights, against plain PyTorch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sweeper import methods
from sweeper.lora.blocks import rows_of
from sweeper.run import Run
from sweeper.spec import DatasetSpec, OptimSpec, RunSpec, SharingSpec, TrainerSpec
from sweeper.tasks.mixture import Mixing
from sweeper.training.consolidate import consolidate, examples
from sweeper.training.mixing import MixedOrder, Mixture, stages
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState
from sweeper.training.score import score

from .plain import Plain

NAMES = ("one", "two", "three")
STEPS = 12
MakeJob = Callable[..., RunState]
MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def in_turn(make_job: Any, make_adapter: Any, make_examples: Any, place: Any) -> MakeJob:
    """A run of three tasks one after another: `in_turn(base, "ewc", elasticity=1.0)`."""

    def make(
        base: Any, name: str, placement: str = "attn", *, seed: int = 0, optim: dict[str, Any] | None = None,
        replay: float = 0.0, embeddings: bool = False, **sharing: Any,
    ) -> RunState:  # fmt: skip
        parts = [make_examples(10), make_examples(11, count=9, longest=40), make_examples(12, count=30, longest=12)]
        job = make_job(f"{name}-{placement}-{seed}", make_adapter(base, placement, 4, seed=seed), parts[0])
        dataset = DatasetSpec(
            name="sequence", family="sequence", options={"replay": replay, "weights": "tokens"} if replay else {},
            parts=tuple(DatasetSpec(name=one, family="jsonl") for one in NAMES),
        )  # fmt: skip
        spec = dataclasses.replace(
            job.spec, dataset=dataset, sharing=SharingSpec(name=name, **sharing), rank=4, alpha=8.0, seed=seed,
            trainer=TrainerSpec(max_steps=STEPS, batch_size=4),
            optim=OptimSpec(**({"lr": 5e-3, "max_grad_norm": 0.3} | (optim or {}))),
            placement=dataclasses.replace(job.spec.placement, embeddings=embeddings),
        )  # fmt: skip
        every = [example for part in parts for example in part]
        sizes = {one: len(part) for one, part in zip(NAMES, parts, strict=True)}
        mixture = Mixture.of(Mixing.of(dataset), sizes, steps=STEPS, per_step=4)
        order = MixedOrder([len(e.input_ids) for e in every], mixture, seed, batch_size=4, accumulation=1)
        targets = place(base, placement, embeddings=embeddings)
        return RunState(
            run=Run(run_id=job.run_id, spec=spec, folder=Path(job.run_id)), examples=every, order=order,
            adapter=methods.adapter(spec, dict.fromkeys(targets, 4)), mixture=mixture,
        )  # fmt: skip

    return make


def train(base: Any, jobs: Sequence[RunState], each: Callable[[Pack, int], None] = lambda pack, step: None) -> Any:
    """Trains jobs in one pack, consolidating as a `PackTrainer` does; run id -> losses, adapter at first and last."""
    queue = [dataclasses.replace(job) for job in jobs]
    found: dict[str, tuple[list[float], Any, Any]] = {}
    with Pack(base, [job.capacity for job in queue], PackConfig(batch_size=4)) as pack:
        begun = {state.run_id: pack.snapshot(pack.add(state)) for state in queue}
        losses: dict[str, list[float]] = {state.run_id: [] for state in queue}
        for step in range(STEPS):
            pack.step()
            for result in pack.drain():
                losses[result.state.run_id].append(result.loss)
            if ended := [(slot, state) for slot, state in pack.active if state.to_consolidate]:
                consolidate(pack, ended)
            each(pack, step)
        for slot, state in pack.active:
            found[state.run_id] = losses[state.run_id], begun[state.run_id], pack.snapshot(slot)
    return found


def chosen(job: RunState, step: int) -> list[Any]:
    return [job.examples[i] for i in job.order.batch(step)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_is_folding_each_adapter_into_the_weights(kind: str, load: Any, in_turn: MakeJob) -> None:
    base = load(kind)
    merged, stacked = in_turn(base, "merge", "full"), in_turn(base, "stack", "full")
    found = train(base, [merged, stacked])
    losses, begun, ended = found[merged.run_id]
    blocks = merged.adapter.blocks

    def block(values: Any, number: int) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (a[rows], b[rows]) for name, (a, b, *_) in values.items() for rows in [rows_of(blocks, name)[number]]
        }

    plain = Plain(base, merged, block(begun, 0))
    wanted = []
    for task, stage in enumerate(stages(3, STEPS)):
        plain.begin(block(begun, task))
        wanted += [plain.step(n, len(stage), chosen(merged, step)) for n, step in enumerate(stage)]
        for name, (a, b) in block(ended, task).items():
            torch.testing.assert_close(a, plain.pairs[name][0].data, rtol=0, atol=1e-4)
            torch.testing.assert_close(b, plain.pairs[name][1].data, rtol=0, atol=1e-4)
        plain.fold()
    assert losses == pytest.approx(wanted, rel=1e-4)
    for name, parts in found[stacked.run_id][2].items():
        for mine, other in zip(ended[name], parts, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_later_tasks_change_what_merge_makes_of_earlier_ones_and_not_what_stack_makes(
    load: Any, in_turn: MakeJob
) -> None:
    base = load("llama")
    jobs = [in_turn(base, "merge"), in_turn(base, "stack")]
    rows = [jobs[0].examples[0]]
    seen: dict[int, list[float]] = {0: [], 1: []}

    def look(pack: Pack, step: int) -> None:
        for slot, scores in seen.items():
            seen[slot] = [*scores, score(pack, [slot], rows, budget=4096)[0][0].nll]  # of the first task

    train(base, jobs, look)
    merged, stacked = seen[0], seen[1]
    assert merged[:4] == pytest.approx(stacked[:4], rel=1e-6)
    assert len(set(stacked[3:])) == 1
    assert len(set(merged[3:])) == STEPS - 3 - 2  # the first step of a warm-up moves nothing


def test_what_merge_folds_can_be_kept_orthogonal(load: Any, in_turn: MakeJob) -> None:
    """Trains as `orthogonal` does, and not as without."""
    base = load("llama")
    jobs = [in_turn(base, name, orthogonality=weight) for name, weight in (("merge", 0.5), ("orthogonal", 0.5))]
    losses, _, ended = train(base, jobs[:1])[jobs[0].run_id]
    wanted, _, kept = train(base, jobs[1:])[jobs[1].run_id]
    free, _, _ = train(base, [in_turn(base, "merge")])[jobs[0].run_id]
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses[5:] != pytest.approx(free[5:], rel=1e-5)
    for name, own in ended.items():
        for mine, other in zip(own, kept[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}), ("gpt2", {"placement": "full", "optim": {"weight_decay": 0.1}}),
        ("llama", {"replay": 0.25, "embeddings": True}),
    ],
)  # fmt: skip
def test_elastic_weights_equal_plain_pytorch(kind: str, fields: dict[str, Any], load: Any, in_turn: MakeJob) -> None:
    base = load(kind)
    job = in_turn(base, "ewc", elasticity=200.0, fisher_examples=12, **fields)
    other = in_turn(base, "ewc", "ff", seed=1, elasticity=3.0)
    losses, begun, ended = train(base, [job, other])[job.run_id]
    ((_, _, free),) = train(base, [in_turn(base, "single", **fields)]).values()
    assert max(float((ended[name][0] - parts[0]).abs().max()) for name, parts in free.items()) > 3e-3
    plain = Plain(base, job, {name: (a, b) for name, (a, b, *_) in begun.items()})
    known: list[tuple[list[Tensor], list[Tensor]]] = []

    def penalty() -> Any:
        return 100.0 * sum(
            (fisher * (value - star).square()).sum()
            for fishers, stars in known
            for fisher, star, value in zip(fishers, stars, plain.values, strict=True)
        )

    wanted = []
    for task, stage in enumerate(stages(3, STEPS)):
        wanted += [plain.step(step, STEPS, chosen(job, step), penalty) for step in stage]
        rows = [job.examples[i] for i in examples(job, task)]
        assert len(rows) == min(12, (24, 9, 30)[task])
        known.append((plain.fisher(rows), [value.detach().clone() for value in plain.values]))
    assert losses == pytest.approx(wanted, rel=1e-4)
    for name, (a, b, *_) in ended.items():
        torch.testing.assert_close(a, plain.pairs[name][0].data, rtol=0, atol=1e-4)
        torch.testing.assert_close(b, plain.pairs[name][1].data, rtol=0, atol=1e-4)


def test_consolidating_leaves_the_other_slots_every_bit(load: Any, in_turn: MakeJob) -> None:
    base = load("llama")
    single = in_turn(base, "single", "ff", seed=1)
    dropping = dataclasses.replace(single.adapter, dropout=0.3, noise=5.0, penalties=(0.1, 0.1, 0.1))
    others = [dataclasses.replace(single, adapter=dropping), in_turn(base, "per_task", seed=2)]
    held, free = (train(base, [in_turn(base, "ewc", elasticity=weight), *others]) for weight in (1.0, 0.0))
    for job in others:
        assert held[job.run_id][0] == free[job.run_id][0]
        for name, parts in free[job.run_id][2].items():
            assert all(torch.equal(mine, own) for mine, own in zip(held[job.run_id][2][name], parts, strict=True))
    assert held["ewc-attn-0"][0] != free["ewc-attn-0"][0]


def test_gradients_of_single_examples_come_without_penalties_and_of_no_other_slot(load: Any, in_turn: MakeJob) -> None:
    base = load("llama")
    job = in_turn(base, "ewc", elasticity=1.0)
    jobs = [dataclasses.replace(job, adapter=dataclasses.replace(job.adapter, penalties=(0.1, 0.1, 9.0))), job]
    with Pack(base, [one.capacity for one in jobs], PackConfig(batch_size=4)) as pack:
        for one in jobs:
            pack.add(dataclasses.replace(one))
        pack.step()
        pack.add_gradients([0], [job.examples[0]])
        plain = Plain(base, job, {name: (a, b) for name, (a, b) in pack.store.views(0).items()})
        wanted = [square.sqrt() for square in plain.fisher([job.examples[0]])]
        found = [part for parts in pack.store.views(0, pack.store.grads).values() for part in parts]
        for mine, own in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine.abs(), own, rtol=1e-4, atol=1e-5)
        assert not any(part.any() for parts in pack.store.views(1, pack.store.grads).values() for part in parts)


def test_no_elasticity_is_one_adapter_that_goes_on_bit_for_bit(load: Any, in_turn: MakeJob) -> None:
    base = load("llama")
    found = [train(base, [in_turn(base, name, seed=3, replay=0.25)])[f"{name}-attn-3"] for name in ("ewc", "single")]
    assert found[0][0] == found[1][0]
    for name, parts in found[1][2].items():
        assert len(found[0][2][name]) == len(parts)
        assert all(torch.equal(mine, own) for mine, own in zip(found[0][2][name], parts, strict=True))
