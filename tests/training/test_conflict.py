"""Gradients of a run's tasks compared while it trains: as autograd has them, and without a trace in training."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sweeper.lora.forms import AdapterSpec
from sweeper.training import conflict
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from tests.training.several import NAMES, Plain, run_of, trained

EQUAL = {"sampling": "equal"}
TREE = {"tree": (("one", "two"), "three"), "rank": 12}


def cosine(one: Tensor, other: Tensor) -> float | None:
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size else None


def expected(plain: Plain, examples: list[list[int]]) -> tuple[dict[str, list[float | None]], list[float | None]]:
    """Cosines of every pair of tasks by module, and over the adapter, over the blocks that both of them train."""
    own = []
    for chosen in examples:
        ((_, loss),) = plain.losses(chosen).items()
        own.append(plain.gradients(loss))
    found: dict[str, list[float | None]] = {}
    whole: list[float | None] = []
    for i, j in itertools.combinations(range(len(NAMES)), 2):
        parts: list[list[Tensor]] = [[], []]
        for place, name in enumerate(plain.pairs[0]):
            here: list[list[Tensor]] = [[], []]
            for number, block in enumerate(plain.blocks):
                if {i, j} <= block.trains:
                    for side, task in enumerate((i, j)):
                        here[side] += [value.flatten() for value in own[task][number][2 * place : 2 * place + 2]]
            one, other = (torch.cat([*side, torch.zeros(0)]).double() for side in here)
            found.setdefault(name, []).append(cosine(one, other))
            parts[0].append(one)
            parts[1].append(other)
        whole.append(cosine(torch.cat(parts[0]), torch.cat(parts[1])))
    return found, whole


@pytest.mark.parametrize(("sharing", "fields"), [("single", {}), ("hierarchical", TREE), ("per_task", {})])
def test_cosines_are_those_of_plain_pytorch(sharing: str, fields: dict[str, Any], load: Any) -> None:
    base = load("gpt2")
    job = run_of(base, EQUAL, sharing, conflict=2, steps=6, optim={"lr": 1e-2}, **fields)
    with Pack(base, [job.capacity], PackConfig(batch_size=6)) as pack:
        pack.add(job)
        for _ in range(4):
            pack.step()
        kept = pack.snapshot(0)
        conflict.look(pack, 0, job)
    (row,) = job.conflict
    assert row["step"] == 4
    plain = Plain(base, job, kept)
    by_module, whole = expected(plain, conflict.chosen(job))
    assert isinstance(job.adapter, AdapterSpec)
    assert set(row["cosine"]) == set(row["norms"]) == set(job.adapter.ranks)
    for name, wanted in by_module.items():
        assert row["cosine"][name] == pytest.approx(wanted, abs=2e-4)
    assert row["adapter"] == pytest.approx(whole, abs=2e-4)
    if sharing == "per_task":
        assert whole == [None] * 3
    assert all(len(own) == 3 and min(own) > 0 for own in row["norms"].values())


def test_norms_are_of_the_mean_nll(load: Any) -> None:
    base = load("gpt2")
    job = run_of(base, EQUAL, conflict=1, steps=4)
    with Pack(base, [job.capacity], PackConfig(batch_size=3)) as pack:  # the examples take several passes
        pack.add(job)
        for _ in range(2):
            pack.step()
        kept = pack.snapshot(0)
        conflict.look(pack, 0, job)
    plain = Plain(base, job, kept)
    for task, chosen in enumerate(conflict.chosen(job)):
        ((_, loss),) = plain.losses(chosen).items()
        (own,) = plain.gradients(loss)
        for place, name in enumerate(plain.pairs[0]):
            wanted = torch.cat([value.flatten() for value in own[2 * place : 2 * place + 2]]).norm()
            assert job.conflict[0]["norms"][name][task] == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("lora_fa", {}), ("dora", {}), ("lora", {"weights": "uncertainty"})]
)
def test_comparing_leaves_no_trace(method: str, options: dict[str, Any], load: Any) -> None:
    """Neither in the run that is looked at nor in those beside it: every bit of losses and adapters."""
    base = load("gpt2")
    jobs = [
        run_of(base, EQUAL | options, method=method, dropout=0.1 * (method != "dora"), steps=6, name="one"),
        run_of(base, EQUAL, "shared", seed=1, steps=6, name="two"),
    ]
    found = []
    for looks in (False, True):
        own = [dataclasses.replace(job) for job in jobs]
        with Pack(base, [job.capacity for job in jobs], PackConfig(batch_size=6)) as pack:
            for job in own:
                pack.add(job)
            for step in range(6):
                if looks and step in (0, 3):
                    conflict.look(pack, 0, own[0])
                pack.step()
            losses = [(one.loss, one.grad_norm, one.variances) for one in pack.drain()]
            found.append((losses, [pack.snapshot(slot) for slot in (0, 1)]))
        assert len(own[0].conflict) == 2 * looks
    assert found[0][0] == found[1][0]
    for before, after in zip(found[0][1], found[1][1], strict=True):
        assert all(mine.equal(other) for name in before for mine, other in zip(before[name], after[name], strict=True))


def test_what_is_found_does_not_depend_on_the_pack(load: Any) -> None:
    base = load("gpt2")
    job = run_of(base, EQUAL, conflict=1, steps=4, name="one")
    rows = []
    for others in (0, 2):
        beside = [run_of(base, EQUAL, seed=seed + 1, name=f"other-{seed}") for seed in range(others)]
        own = dataclasses.replace(job)
        with Pack(base, [one.capacity for one in (own, *beside)], PackConfig(batch_size=6)) as pack:
            for one in (own, *beside):
                pack.add(one)
            conflict.look(pack, 0, own)
        rows.append({key: value for key, value in own.conflict[0].items() if key != "seconds"})
    assert rows[0] == rows[1]


def test_the_steps_are_even_from_warm_up_on(load: Any) -> None:
    base = load("gpt2")
    assert conflict.steps(run_of(base, EQUAL)) == set()
    job = run_of(base, EQUAL, conflict=4, steps=100, optim={"warmup_fraction": 0.09})
    assert conflict.steps(job) == {9, 39, 69, 99}
    assert conflict.steps(run_of(base, EQUAL, conflict=8, steps=3)) == {1, 2}
    assert conflict.steps(run_of(base, EQUAL, conflict=1, steps=50)) == {5}
    assert [len(own) for own in conflict.chosen(job)] == [8, 8, 8]


def test_conflict_with_surgery_is_of_the_untouched_gradients(load: Any) -> None:
    base = load("gpt2")
    plain, cut = (run_of(base, EQUAL | more, conflict=1) for more in ({}, {"surgery": "pcgrad"}))
    rows = []
    for job, by_task in ((plain, None), (cut, (3, 2))):
        with Pack(base, [job.capacity], PackConfig(batch_size=6, by_task=by_task)) as pack:
            pack.add(job)
            conflict.look(pack, 0, job)
        rows.append(job.conflict[0]["cosine"])
    assert rows[0] == rows[1]
    trained(base, [cut], steps=1, by_task=(3, 2))
