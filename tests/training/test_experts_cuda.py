"""Learnt gates on a GPU: captured and compiled steps give what eager ones and the CPU give."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sweeper.lora.forms import Capacity
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState
from tests.training.test_experts import KINDS, MakeRouted, routed

__all__ = ["routed"]

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),  # the compiler remarks on its own deprecations
]


def losses(base: Any, jobs: list[RunState], config: PackConfig, capacities: list[Capacity]) -> dict[str, list[float]]:
    """Losses by run, of runs that take the slots one after another."""
    found: dict[str, list[float]] = {job.run_id: [] for job in jobs}
    waiting = [dataclasses.replace(job) for job in jobs]
    with Pack(base, capacities, config) as pack:
        while waiting or pack.active:
            while waiting and (slot := pack.free_slot(waiting[0].adapter)) is not None:
                pack.add(waiting.pop(0), slot)
            pack.step()
            for one in pack.drain():
                found[one.state.run_id].append(one.loss)
            for slot, state in pack.active:
                if state.finished:
                    pack.remove(slot)
    return found


@pytest.mark.parametrize("how", [{}, {"captured": True}, pytest.param({"compiled": True}, marks=pytest.mark.slow)])
def test_a_gpu_gives_what_the_cpu_gives(
    how: dict[str, Any], load: Any, routed: MakeRouted, make_job: Any, make_adapter: Any, make_examples: Any
) -> None:
    """All kinds of gates and a plain run, in two slots that change hands."""
    base = load("llama")
    plain = make_job("plain", make_adapter(base, "full", 8), make_examples(9), steps=12, batch_size=4)
    jobs = [*(routed(base, placement, **fields) for placement, fields in KINDS), plain]
    most = [Capacity.union(job.capacity for job in jobs)] * 2
    wanted = losses(base, jobs, PackConfig(batch_size=4), most)
    there = dataclasses.replace(base, model=copy.deepcopy(base.model).to("cuda"))
    found = losses(there, jobs, PackConfig(batch_size=4, **how), most)
    for job in jobs:
        assert found[job.run_id] == pytest.approx(wanted[job.run_id], rel=1e-3)
