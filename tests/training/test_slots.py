"""What happens in one slot stays there: divergence, an early end, removal, a new run."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from sweeper.spec import OptimSpec
from sweeper.training.batches import Batch
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState


def of_steps(state: RunState, steps: int) -> RunState:
    return state.with_spec(trainer=dataclasses.replace(state.spec.trainer, max_steps=steps))


@pytest.fixture
def jobs(load: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> list[Any]:
    base = load("llama")
    examples = make_examples(0)
    return [
        make_job("attn", make_adapter(base, "attn", 4), examples),
        make_job("ff", make_adapter(base, "ff", 8, seed=1, dropout=0.2), examples),
        make_job("full", make_adapter(base, "full", 3, seed=2), examples),
    ]


def test_a_slot_with_nan_in_its_adapter_changes_no_bit_of_the_others(
    load: Any, jobs: Any, train: Any, assert_identical: Any
) -> None:
    def poison(pack: Pack, step: int) -> None:
        if step == 2:
            a, _ = next(iter(pack.store.views(1).values()))
            a[0, 0] = math.nan

    undisturbed = train(load("llama"), jobs)
    poisoned = train(load("llama"), jobs, before_step=poison)
    assert poisoned["ff"].losses[:2] == undisturbed["ff"].losses[:2]
    assert all(math.isnan(loss) for loss in poisoned["ff"].losses[2:])
    for run_id in ("attn", "full"):
        assert_identical(poisoned[run_id], undisturbed[run_id])


def test_a_slot_that_diverges_changes_no_bit_of_the_others(
    load: Any, jobs: Any, train: Any, assert_identical: Any
) -> None:
    undisturbed = train(load("llama"), jobs)
    wild = [jobs[0], jobs[1].with_spec(optim=OptimSpec(lr=1e30, warmup_fraction=0.0)), jobs[2]]
    diverged = train(load("llama"), wild)
    assert not math.isfinite(diverged["ff"].losses[-1])
    for run_id in ("attn", "full"):
        assert_identical(diverged[run_id], undisturbed[run_id])


def test_a_step_without_a_finite_gradient_moves_nothing_in_its_slot(load: Any, jobs: Any) -> None:
    with Pack(load("llama"), [job.adapter.ranks for job in jobs], PackConfig(batch_size=4)) as pack:
        for job in jobs:
            pack.add(dataclasses.replace(job))
        for _ in range(2):
            pack.step()
        before = [pack.snapshot(slot) for slot in range(3)]
        pack.store.grads[pack.store.layout.by_slot[1][0].a] = math.inf
        pack.step()
        after = [pack.snapshot(slot) for slot in range(3)]
    moved = [
        any(not torch.equal(u, v) for name in old for u, v in zip(old[name], new[name], strict=True))
        for old, new in zip(before, after, strict=True)
    ]
    assert moved == [True, False, True]


def test_a_run_that_ends_early_changes_nothing_for_the_others(
    load: Any, jobs: Any, train: Any, assert_close: Any
) -> None:
    undisturbed = train(load("llama"), jobs)
    shorter = [jobs[0], of_steps(jobs[1], 2), jobs[2]]
    traces = train(load("llama"), shorter)
    assert len(traces["ff"].losses) == 2
    for run_id in ("attn", "full"):
        assert_close(traces[run_id], undisturbed[run_id])


def test_a_run_that_is_taken_out_changes_nothing_for_the_others(
    load: Any, jobs: Any, train: Any, assert_close: Any
) -> None:
    def take_out(pack: Pack, step: int) -> None:
        if step == 3:
            pack.remove(1)

    undisturbed, traces = train(load("llama"), jobs), train(load("llama"), jobs, before_step=take_out)
    assert len(traces["ff"].losses) == 3
    for run_id in ("attn", "full"):
        assert_close(traces[run_id], undisturbed[run_id])


def test_a_slot_refilled_midway_disturbs_nobody_and_its_new_run_is_as_alone(
    load: Any, jobs: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any, assert_close: Any
) -> None:
    """Two slots, four runs: the second slot holds another placement and rank each time."""
    base = load("llama")
    later = [
        make_job(
            "second", make_adapter(base, "attn", 6, layers="last:2", seed=5, scale=0.5), make_examples(3), steps=3
        ),
        make_job("third", make_adapter(base, "ff_out", 2, seed=6, dropout=0.3), make_examples(4), steps=4),
    ]
    first = of_steps(jobs[1], 2)
    long = of_steps(jobs[2], 9)
    union = {target.name: 8 for target in base.targets if target.layer is not None}
    together = train(base, [long, first, *later], capacities=[union, union])
    for job in (long, first, *later):
        assert_close(together[job.run_id], train(base, [job])[job.run_id])


def test_a_slot_holds_nothing_of_the_run_before(load: Any, jobs: Any, train: Any, assert_identical: Any) -> None:
    base = load("llama")
    union = {target.name: 8 for target in base.targets if target.layer is not None}
    fresh = train(base, [jobs[0]], capacities=[union])["attn"]
    used = train(base, [jobs[1], jobs[0]], capacities=[union])["attn"]
    assert_identical(used, fresh)


def test_a_run_goes_only_where_its_ranks_fit(load: Any, jobs: Any) -> None:
    attn, ff, full = jobs
    with Pack(load("llama"), [attn.adapter.ranks, full.adapter.ranks], PackConfig(batch_size=4)) as pack:
        assert pack.free_slot(attn.adapter) == 0  # rank 4 is above slot 1's rank 3
        assert pack.free_slot(full.adapter) == 1
        assert pack.free_slot(ff.adapter) is None
        with pytest.raises(ValueError, match="no free slot can hold run ff"):
            pack.add(dataclasses.replace(ff))
        pack.add(dataclasses.replace(attn))
        assert pack.free_slot(attn.adapter) is None
        pack.remove(0)
        assert pack.free_slot(attn.adapter) == 0


def test_a_fresh_draw_depends_on_seed_and_module_only(load: Any, jobs: Any, make_adapter: Any) -> None:
    base = load("llama")
    attn = make_adapter(base, "attn", 4, seed=2)
    full = make_adapter(base, "full", 4, seed=2)
    other = make_adapter(base, "full", 4, seed=3)
    with Pack(base, [attn.ranks, full.ranks, full.ranks], PackConfig(batch_size=4)) as pack:
        for slot, adapter in enumerate((attn, full, other)):
            pack.store.assign(slot, adapter)
        drawn = [pack.store.views(slot) for slot, adapter in enumerate((attn, full, other))]
    for name, (a, b) in drawn[0].items():
        assert torch.equal(a, drawn[1][name][0])
        assert not torch.equal(a, drawn[2][name][0])
        bound = 1 / math.sqrt(a.shape[1])  # PEFT: kaiming_uniform_ with a = sqrt(5)
        assert 0.8 * bound < float(a.abs().max()) <= bound
        assert not b.any()


class Uncaptured:
    """Stands where a captured step would, and calls it; remembers how many lanes each batch had.

    `shapes`: of batches, each of which another number of lanes would have to record.
    """

    def __init__(self, pack: Pack, shapes: int) -> None:
        self.pack, self.shapes, self.lanes, self.replayed = pack, shapes, list[int](), True

    def __call__(self, batch: Batch, *, key: Any) -> torch.Tensor:
        self.lanes.append(batch.shape[1])
        return self.pack.forward_backward(batch)


@pytest.mark.parametrize(("shapes", "lanes"), [(0, [8, 8, 8, 6, 6, 4]), (1, [8] * 6)])
def test_empty_lanes_change_no_run_and_spare_recordings(
    shapes: int, lanes: list[int], load: Any, jobs: Any, make_job: Any, make_adapter: Any, make_examples: Any,
    monkeypatch: pytest.MonkeyPatch, train: Any, assert_close: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
    base = load("llama")
    more = [
        make_job(f"more{i}", make_adapter(base, "attn", 2, seed=i), make_examples(i), steps=steps)
        for i, steps in enumerate((2, 3, 4, 5, 6))
    ]
    every, seen = [*jobs, *more], []

    def pad(pack: Pack, step: int) -> None:
        if step == 0:
            pack.captured = Uncaptured(pack, shapes)  # type: ignore[assignment]
            seen.append(pack.captured)

    padded = train(base, every, before_step=pad)
    assert seen[0].lanes == lanes  # for 8, 8, 7, 6, 5 and 4 runs
    for job in every:
        assert_close(padded[job.run_id], train(base, [job])[job.run_id])
