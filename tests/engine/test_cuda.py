"""Compiled layers and captured steps give what the eager pack gives."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sweeper.engine import probe
from sweeper.importance import Probing
from sweeper.models import BaseModel

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),  # the compiler remarks on precision and on its own deprecations
]


def moved(base: BaseModel, dtype: torch.dtype) -> BaseModel:
    model = copy.deepcopy(base.model).to(torch.device("cuda"), dtype)
    return dataclasses.replace(base, model=model)


@pytest.fixture
def jobs(load: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> list[Any]:
    base, examples = load("llama"), make_examples(0, shortest=20, longest=30)
    return [
        make_job("attn", make_adapter(base, "attn", 4), examples, steps=12, lr=3e-3),
        make_job("ff", make_adapter(base, "ff", 8, seed=1, dropout=0.2), examples, steps=12, lr=3e-3),
        make_job("full", make_adapter(base, "full", 3, seed=2), examples, steps=7, lr=3e-3),
    ]


def test_eager_on_cuda_is_the_cpu(load: Any, jobs: Any, train: Any) -> None:
    here, there = train(load("llama"), jobs), train(moved(load("llama"), torch.float32), jobs)
    for job in jobs:
        assert there[job.run_id].losses == pytest.approx(here[job.run_id].losses, rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_captured_is_eager(dtype: torch.dtype, tolerance: float, load: Any, jobs: Any, train: Any) -> None:
    """The last steps run with a lane less: another shape, recorded anew, on the same slots."""
    base = moved(load("llama"), dtype)
    eager, captured = train(base, jobs), train(base, jobs, compiled=True)
    for job in jobs:
        assert captured[job.run_id].losses == pytest.approx(eager[job.run_id].losses, rel=tolerance)
        assert captured[job.run_id].norms == pytest.approx(eager[job.run_id].norms, rel=20 * tolerance)


def test_a_recording_serves_whichever_run_holds_the_slot(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = moved(load("llama"), torch.float32)
    examples = make_examples(0, shortest=20, longest=30)
    union = {target.name: 8 for target in base.targets if target.layer is not None}
    queue = [
        make_job("attn", make_adapter(base, "attn", 4), examples, steps=8, lr=3e-3),
        make_job("ff", make_adapter(base, "ff", 8, seed=1), examples, steps=8, lr=3e-3),
        make_job("full", make_adapter(base, "full", 3, layers="last:1", seed=2), examples, steps=8, lr=3e-3),
    ]
    one_after_another = train(base, queue, capacities=[union], compiled=True)
    for job in queue:
        alone = train(base, [job])[job.run_id]
        assert one_after_another[job.run_id].losses == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("score", ["gradient", "fisher", "sensitivity", "activation", "weight"])
def test_a_probe_scores_as_on_the_cpu(
    score: str, dtype: torch.dtype, tolerance: float, load: Any, make_examples: Any
) -> None:
    base = load("llama")
    asked = probe.Question(
        asked=Probing(score=score, batches=3), targets=probe.probed(base, []), examples=make_examples(0), batch_size=4,
        seed=0,
    )  # fmt: skip
    there = probe.measure(moved(base, dtype), asked).scores
    assert there == pytest.approx(probe.measure(base, asked).scores, rel=tolerance)
