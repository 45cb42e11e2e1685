"""Compiled layers and captured steps give what the eager pack gives."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sweeper.lora.forms import Capacity, Restarts, Sparsity
from sweeper.models import BaseModel
from sweeper.placement.importance import Probing
from sweeper.training import probe

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


def test_a_deterministic_pack_repeats_every_bit(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    """Of rows long enough that attention's backward pass adds up over several tiles."""
    base = moved(load("llama"), torch.bfloat16)
    examples = make_examples(0, shortest=400, longest=500)
    jobs = [
        make_job("attn", make_adapter(base, "attn", 4), examples, steps=30, lr=3e-3),
        make_job("full", make_adapter(base, "full", 8, seed=1), examples, steps=30, lr=3e-3),
    ]
    first, *again = (train(base, jobs, captured=True, deterministic=True) for _ in range(4))
    for job in jobs:
        for other in again:
            assert other[job.run_id].losses == first[job.run_id].losses
            assert other[job.run_id].norms == first[job.run_id].norms


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


@pytest.fixture
def of_every_form(load: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> list[Any]:
    """An ordinary run among DoRA, VeRA, frozen halves, restarts, pruning, noise, penalties and averages."""
    base, examples = load("gpt2"), make_examples(0, shortest=20, longest=30)
    plain = make_adapter(base, "full", 4)
    ones, halves = dict.fromkeys(plain.ranks, 1.0), dict.fromkeys(plain.ranks, 2)
    changes: dict[str, dict[str, Any]] = {
        "lora": {}, "dora": {"form": "dora"}, "vera": {"form": "vera", "scales": ones}, "fast": {"rate_b": 4.0},
        "pissa": {"begin": "pissa", "trained": halves},
        "relora": {"trained": halves, "restarts": Restarts(every=4, count=1, warmup=2, prune=0.9)},
        "sparse": {"sparsity": Sparsity(density=0.5, learnt=True, first=1, last=5)},
        "options": {"noise": 5.0, "penalties": (0.1, 0.1, 0.01), "average": 0.9},
    }  # fmt: skip
    return [
        make_job(name, dataclasses.replace(plain, seed=i, **fields), examples, steps=12, lr=3e-3)
        for i, (name, fields) in enumerate(changes.items())
    ]


def test_every_form_on_cuda_is_the_cpu(load: Any, of_every_form: Any, train: Any) -> None:
    capacities = [job.adapter.capacity for job in of_every_form]
    here = train(load("gpt2"), of_every_form, capacities=capacities)
    there = train(moved(load("gpt2"), torch.float32), of_every_form, capacities=capacities)
    for job in of_every_form:
        # which of two values that are nearly as sensitive is pruned is decided by their last bits
        tolerance = 1e-2 if job.run_id == "sparse" else 1e-4
        assert there[job.run_id].losses == pytest.approx(here[job.run_id].losses, rel=tolerance), job.run_id


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_every_form_captured_is_eager(
    how: str, dtype: torch.dtype, tolerance: float, load: Any, of_every_form: Any, train: Any
) -> None:
    base = moved(load("gpt2"), dtype)
    capacities = [job.adapter.capacity for job in of_every_form]
    eager = train(base, of_every_form, capacities=capacities)
    captured = train(base, of_every_form, capacities=capacities, **{how: True})
    for job in of_every_form:
        assert captured[job.run_id].losses == pytest.approx(eager[job.run_id].losses, rel=tolerance), job.run_id


def test_a_captured_slot_passes_from_form_to_form(load: Any, of_every_form: Any, train: Any) -> None:
    base = moved(load("gpt2"), torch.float32)
    union = Capacity.union(job.adapter.capacity for job in of_every_form)
    together = train(base, of_every_form, capacities=[union, union], compiled=True)
    for job in of_every_form:
        alone = train(base, [job], capacities=[job.adapter.capacity])[job.run_id]
        assert together[job.run_id].losses == pytest.approx(alone.losses, rel=1e-4), job.run_id


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
