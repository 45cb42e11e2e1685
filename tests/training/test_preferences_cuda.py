"""Preference objectives on a GPU: captured and compiled steps of a mixed pack give what eager ones and the CPU give."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sweeper.models import BaseModel
from sweeper.spec import ObjectiveSpec
from sweeper.training import preferred
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from tests.training.test_preferences import pairs, with_references

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),  # the compiler remarks on precision and on its own deprecations
]
NAMES = ("nll", "dpo", "kto", "orpo", "simpo", "dpo")


def moved(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, model=copy.deepcopy(base.model).to(torch.device("cuda")))


@pytest.fixture
def jobs(load: Any, make_job: Any, make_adapter: Any) -> list[Any]:
    base, made = load("llama"), []
    for number, name in enumerate(NAMES):
        adapter = make_adapter(base, ("attn", "ff", "full")[number % 3], 2 + number, seed=number, dropout=0.1)
        job = make_job(f"{name} {number}", adapter, pairs(number), steps=9 + number % 3, lr=3e-3)
        job = job.with_spec(objective=ObjectiveSpec(name=name))
        made.append(with_references(base, job) if job.objective.reference else job)
    return made


@pytest.mark.parametrize("how", [{}, {"captured": True}, {"compiled": True}], ids=["eager", "captured", "compiled"])
def test_a_mixed_pack_is_the_cpus(how: dict[str, bool], load: Any, jobs: Any, train: Any) -> None:
    here, there = train(load("llama"), jobs), train(moved(load("llama")), jobs, **how)
    for job in jobs:
        assert there[job.run_id].losses == pytest.approx(here[job.run_id].losses, rel=1e-3)


def test_scores_are_the_cpus_and_disturb_no_captured_step(load: Any, jobs: Any) -> None:
    found = []
    for base in (load("llama"), moved(load("llama"))):
        with Pack(base, [job.adapter.ranks for job in jobs], PackConfig(batch_size=4, captured=True)) as pack:
            for job in jobs:
                pack.add(dataclasses.replace(job))
            losses = []
            for _ in range(4):
                pack.step()
                losses += [result.loss for result in pack.drain()]
                scores = preferred.queue(pack, range(len(jobs)), pairs(9), budget=200)()
            found.append((losses, [one.whole for one in scores]))
    (here, scored), (there, again) = found
    assert there == pytest.approx(here, rel=1e-3)
    for one, two in zip(scored, again, strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-4)
