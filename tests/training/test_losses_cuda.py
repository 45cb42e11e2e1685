"""Learnt weights, surgery and compared gradients on a GPU: captured steps give what eager ones and the CPU give."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sweeper.models import BaseModel
from sweeper.training import conflict
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from tests.training.several import run_of, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

EQUAL = {"sampling": "equal"}
LEARNT = EQUAL | {"weights": "uncertainty"}
PCGRAD = EQUAL | {"surgery": "pcgrad"}


def moved(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, model=copy.deepcopy(base.model).to(torch.device("cuda")))


@pytest.mark.parametrize(
    ("options", "by_task"), [(LEARNT, None), (PCGRAD, (3, 2)), (PCGRAD | {"weights": "uncertainty"}, (3, 2))]
)
def test_captured_is_eager_and_the_cpu(options: dict[str, Any], by_task: Any, load: Any) -> None:
    base = load("llama")
    jobs = [
        run_of(base, options, name="single", optim={"lr": 5e-3}),
        run_of(base, options, "shared", name="shared", seed=1),
    ]
    here, _ = trained(base, jobs, by_task=by_task)
    there = moved(base)
    for captured in (False, True):
        found, _ = trained(there, jobs, by_task=by_task, captured=captured)
        for job in jobs:
            ours, wanted = found[job.run_id], here[job.run_id]
            assert [one.loss for one in ours] == pytest.approx([one.loss for one in wanted], rel=1e-3)
            assert ours[-1].variances == pytest.approx(wanted[-1].variances, abs=1e-3)


def test_a_recording_sees_the_weights_of_whoever_holds_the_slot(load: Any) -> None:
    """A plain run, one that learns weights and a plain one again in one slot, each as alone and uncaptured."""
    base = moved(load("llama"))
    queue = [run_of(base, options, name=str(n), steps=8) for n, options in enumerate((EQUAL, LEARNT, EQUAL))]
    alone = [[one.loss for one in trained(base, [job])[0][job.run_id]] for job in queue]
    with Pack(base, [queue[0].capacity], PackConfig(batch_size=6, captured=True)) as pack:
        for job, wanted in zip(queue, alone, strict=True):
            slot = pack.add(dataclasses.replace(job))
            for _ in range(8):
                pack.step()
            ours = [one.loss for one in pack.drain()]
            pack.remove(slot)
            assert ours == pytest.approx(wanted, rel=1e-4)


def test_comparing_leaves_no_trace_between_captured_steps(load: Any) -> None:
    base = moved(load("llama"))
    job = run_of(base, LEARNT, "shared", dropout=0.1)
    found = []
    for looks in (False, True):
        own = dataclasses.replace(job)
        with Pack(base, [job.capacity], PackConfig(batch_size=6, captured=True, deterministic=True)) as pack:
            pack.add(own)
            for step in range(12):
                if looks and step % 4 == 3:
                    conflict.look(pack, 0, own)
                pack.step()
            found.append([(one.loss, one.grad_norm, one.variances) for one in pack.drain()])
    assert found[0] == found[1]
    assert len(own.conflict) == 3
