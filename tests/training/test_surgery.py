"""Gradient surgery: a packed run equals PCGrad as the paper has it, written out in plain PyTorch."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sweeper.lora import surgery
from sweeper.lora.forms import AdapterSpec
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.sharing import pack_key_of
from tests.training.several import NAMES, Plain, begun, parts, run_of, trained

PCGRAD = {"surgery": "pcgrad"}
EQUAL = {"sampling": "equal"} | PCGRAD
BY_TASK = (3, 2)


class Reference(Plain):
    """Algorithm 1 of Yu et al. 2020, on the parameters that two tasks share."""

    met = 0

    def shared(self, gradients: list[list[Tensor]], one: int, other: int) -> Tensor:
        both = [own for own, block in zip(gradients, self.blocks, strict=True) if {one, other} <= block.trains]
        return torch.cat([value.flatten() for own in both for value in own])

    def take_away(self, gradients: list[list[Tensor]], factor: Tensor, of: list[list[Tensor]], pair: set[int]) -> None:
        for own, other, block in zip(gradients, of, self.blocks, strict=True):
            if pair <= block.trains:
                for value, against in zip(own, other, strict=True):
                    value -= factor * against

    def run(self) -> list[float]:
        losses = []
        for step in range(self.job.steps):
            means = self.losses(self.job.order.step(step))
            own = {task: self.gradients(mean) for task, mean in means.items()}
            projected = {task: [[value.clone() for value in block] for block in g] for task, g in own.items()}
            for task, orders in enumerate(surgery.order(self.job.seed, step, len(NAMES))):
                for other in orders:
                    if task not in own or other not in own:
                        continue
                    mine, theirs = (self.shared(g, task, other) for g in (projected[task], own[other]))
                    dot = mine @ theirs
                    if dot < 0:
                        self.met += 1
                        self.take_away(projected[task], dot / (theirs @ theirs), own[other], {task, int(other)})
            for number, values in enumerate(self.values):
                for place, value in enumerate(values):
                    value.grad = torch.stack([g[number][place] for g in projected.values()]).sum(0)
            losses.append(float(torch.stack(list(means.values())).sum().detach()))
            self.step(step, set(means))
        return losses


TREE = {"tree": (("one", "two"), "three")}


@pytest.mark.parametrize(
    ("sharing", "options", "rows", "fields"),
    [
        ("single", EQUAL, 2, {}),
        ("single", {"sampling": "temperature", "temperature": 0.3} | PCGRAD, None, {}),  # some steps lack a task
        ("hierarchical", EQUAL, 2, {"rank": 12} | TREE),
    ],
)
def test_a_run_equals_the_papers_algorithm(
    sharing: str, options: dict[str, Any], rows: int | None, fields: dict[str, Any], load: Any, train: Any
) -> None:
    base = load("gpt2")
    job = run_of(base, options, sharing, optim={"lr": 5e-3}, **fields)
    assert job.mixture is not None
    by_task = job.mixture.by_task(1)
    assert rows is None or by_task == (3, rows)
    reference = Reference(base, job, begun(base, job, train, by_task=by_task))
    losses = reference.run()
    results, kept = trained(base, [job], by_task=by_task)
    assert [one.loss for one in results[job.run_id]] == pytest.approx(losses, rel=1e-4)
    reference.assert_close(kept[job.run_id])
    assert reference.met > 5  # gradients did conflict


def test_a_run_is_the_same_whoever_shares_the_pack(load: Any) -> None:
    """In batches of equal shapes bit for bit, also where the other run diverges."""
    base = load("gpt2")
    job = run_of(base, EQUAL, name="one", steps=8)
    others = [
        run_of(base, EQUAL, name="other", steps=8, optim={"lr": lr, "max_grad_norm": None}) for lr in (1e-2, 1e30)
    ]
    results, kept = zip(*(trained(base, [job, other], by_task=BY_TASK) for other in others), strict=True)
    assert [one.loss for one in results[0]["one"]] == [one.loss for one in results[1]["one"]]
    assert not np.isfinite([one.loss for one in results[1]["other"]]).all()
    for name, values in kept[0]["one"].items():
        assert all(mine.equal(other) for mine, other in zip(values, kept[1]["one"][name], strict=True))
    alone, _ = trained(base, [job], by_task=BY_TASK)
    assert [one.loss for one in alone["one"]] == pytest.approx([one.loss for one in results[0]["one"]], rel=1e-5)


def test_tasks_that_agree_train_as_they_do_without(load: Any) -> None:
    """The same examples under three names: gradients are alike, and nothing is taken away."""
    base = load("gpt2")
    (data, *_), steps = parts(), 20
    jobs = [
        run_of(base, options, name=name, steps=steps, data=[data[:2]] * 3)
        for name, options in (("with", EQUAL), ("without", {"sampling": "equal"}))
    ]
    with_it, kept = trained(base, jobs[:1], by_task=BY_TASK)
    without, wanted = trained(base, jobs[1:])
    assert [one.loss for one in with_it["with"]] == pytest.approx([one.loss for one in without["without"]], rel=1e-5)
    for name, (a, b, *_) in kept["with"].items():
        torch.testing.assert_close(a, wanted["without"][name][0], rtol=0, atol=1e-4)
        torch.testing.assert_close(b, wanted["without"][name][1], rtol=0, atol=1e-4)


def test_more_passes_of_a_task_give_what_one_gives(load: Any) -> None:
    base = load("gpt2")
    whole = run_of(base, EQUAL, name="whole", steps=8, batch_size=12)
    cut = run_of(base, EQUAL, name="cut", steps=8, batch_size=6, accumulation=2)
    assert whole.mixture is not None
    assert cut.mixture is not None
    assert (whole.mixture.by_task(1), cut.mixture.by_task(2)) == ((3, 4), (3, 2))
    one, kept = trained(base, [whole], batch_size=12, by_task=(3, 4))
    two, also = trained(base, [cut], accumulation=2, by_task=(3, 2))
    assert [r.loss for r in two["cut"]] == pytest.approx([r.loss for r in one["whole"]], rel=1e-5)
    for name, values in kept["whole"].items():
        torch.testing.assert_close(values[0], also["cut"][name][0], rtol=0, atol=1e-4)


def test_learnt_weights_and_surgery_go_together(load: Any) -> None:
    """The surgery is of the weighed gradients; where none conflict it leaves the weighed sum."""
    base = load("gpt2")
    (data, *_), learnt = parts(), {"weights": "uncertainty"}
    jobs = [run_of(base, one | learnt, data=[data[:2]] * 3) for one in (EQUAL, {"sampling": "equal"})]
    (with_it, _), (without, _) = trained(base, jobs[:1], by_task=BY_TASK), trained(base, jobs[1:])
    ours, others = with_it[jobs[0].run_id], without[jobs[1].run_id]
    assert [one.loss for one in ours] == pytest.approx([one.loss for one in others], rel=1e-5)
    assert ours[-1].variances == pytest.approx(others[-1].variances, abs=1e-5)


def test_two_gradients_that_conflict_are_projected_onto_each_others_normal_plane() -> None:
    g = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0]], dtype=torch.float64)
    products = (g @ g.t())[None, None]
    factors = surgery.combination(products, torch.ones_like(products), torch.tensor([[[1], [0]]]))[0, 0]
    dot = g[0] @ g[1]
    wanted = g[0] - dot / (g[1] @ g[1]) * g[1] + g[1] - dot / (g[0] @ g[0]) * g[0]
    torch.testing.assert_close(factors @ g, wanted)
    agreeing = torch.stack([g[0], -g[1]])
    products = (agreeing @ agreeing.t())[None, None]
    assert surgery.combination(products, torch.ones_like(products), torch.tensor([[[1], [0]]])).tolist() == [[[1, 1]]]


def test_what_is_frozen_is_no_part_of_the_products(load: Any) -> None:
    base = load("gpt2")
    job = run_of(base, EQUAL, method="lora_fa", steps=2)
    seen: list[Tensor] = []
    with Pack(base, [job.capacity], PackConfig(batch_size=6, by_task=BY_TASK)) as pack:
        pack.add(dataclasses.replace(job))
        pack.step()
        assert pack.surgery is not None
        assert isinstance(job.adapter, AdapterSpec)
        for task in range(3):
            views = pack.store.views(0, pack.surgery.kept[task])
            assert not any(a.any() for a, _ in views.values())
            seen.append(torch.cat([b.flatten() for _, b in views.values()]))
        own = torch.stack(seen).double()
        torch.testing.assert_close(pack.surgery.products()[0], own @ own.t())


def test_the_order_of_the_others_is_of_the_runs_own_seed_and_step() -> None:
    first = surgery.order(3, 7, 6)
    assert first.shape == (6, 5)
    assert all(sorted(own) == [t for t in range(6) if t != task] for task, own in enumerate(first))
    assert np.array_equal(first, surgery.order(3, 7, 6))
    assert not np.array_equal(first, surgery.order(3, 8, 6))
    assert not np.array_equal(first, surgery.order(4, 7, 6))


def test_runs_whose_passes_are_alike_pack_together_and_others_do_not(load: Any) -> None:
    base = load("gpt2")
    keys = [
        pack_key_of(run_of(base, options, seed=seed))
        for seed, options in ((0, EQUAL), (1, EQUAL), (2, {"sampling": "equal"}), (3, PCGRAD))
    ]
    assert keys[0] == keys[1]
    assert keys[0].by_task == (3, 2)
    assert keys[2].by_task == (0, 0)
    assert len(set(keys)) == 3  # in proportion to size a pass has more rows


def test_the_gradients_that_are_kept_count_as_memory(load: Any) -> None:
    base = load("gpt2")
    jobs = [run_of(base, options) for options in ({"sampling": "equal"}, EQUAL)]
    held = []
    for job, by_task in zip(jobs, (None, BY_TASK), strict=True):
        with Pack(base, [job.capacity], PackConfig(batch_size=6, by_task=by_task)) as pack:
            held.append((pack.state_bytes, pack.store.grads.numel()))
    (plain, values), (cut, _) = held
    assert cut - plain == 3 * 4 * values
