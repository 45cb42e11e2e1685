"""A run is the same in a pack as alone, whatever the other runs of the pack are."""

from collections.abc import Callable
from typing import Any

import pytest

from sweeper.models import BaseModel
from sweeper.training.run_state import RunState

KINDS = ["llama", "gpt2", "gpt_neox", "qwen2", "phi3"]


@pytest.fixture
def mixed_jobs(make_job: Any, make_adapter: Any, make_examples: Any) -> Callable[[BaseModel], list[RunState]]:
    """Five runs that have nothing in common but the base model and the batch size."""

    def make(base: BaseModel) -> list[RunState]:
        short, long = make_examples(0), make_examples(1, count=9, shortest=20, longest=60)
        return [
            make_job("attn", make_adapter(base, "attn", 4), short, max_grad_norm=0.05, warmup_fraction=0.4),
            make_job(
                "ff", make_adapter(base, "ff", 8, dropout=0.3, seed=1, scale=0.5), long, steps=8,
                schedule="linear", weight_decay=0.1, max_grad_norm=None,
            ),
            make_job(
                "every-other", make_adapter(base, "full", 5, layers="every_other", dropout=0.1, scale=16 / 5**0.5),
                short, seed=2, lr=3e-3, schedule="constant", max_grad_norm=0.2, weight_decay=0.5,
            ),
            make_job(
                "last", make_adapter(base, "full", 17, layers="last:1", seed=3), make_examples(4, longest=10), steps=3,
                lr=1e-3, beta1=0.8, beta2=0.95,
            ),
            make_job("first", make_adapter(base, "attn", 1, layers="first:2", seed=4, dropout=0.5), long, lr=3e-2),
        ]  # fmt: skip

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_solo(kind: str, load: Any, mixed_jobs: Any, train: Any, assert_close: Any) -> None:
    base = load(kind)
    jobs = mixed_jobs(base)
    packed = train(base, jobs)
    for job in jobs:
        assert len(packed[job.run_id].losses) == job.steps
        assert_close(packed[job.run_id], train(base, [job])[job.run_id])
    # clipping was at work where it was on: "attn" and "every-other" have norms above their limits
    assert max(packed["attn"].norms) > 0.05
    assert max(packed["every-other"].norms) > 0.2


def test_packed_equals_solo_over_accumulated_batches(load: Any, mixed_jobs: Any, train: Any, assert_close: Any) -> None:
    base = load("llama")
    jobs = mixed_jobs(base)
    packed = train(base, jobs, batch_size=2, accumulation=3)
    for job in jobs[:3]:
        assert_close(packed[job.run_id], train(base, [job], batch_size=2, accumulation=3)[job.run_id])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_packed_equals_solo_with_embeddings_and_head(
    kind: str, load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any, assert_close: Any
) -> None:
    base = load(kind)
    examples = make_examples(0)
    jobs = [
        make_job("plain", make_adapter(base, "attn", 4), examples, lr=2e-3),
        make_job("embeddings", make_adapter(base, "ends", 3, embeddings=True, seed=1), examples, lr=2e-3),
        make_job("head", make_adapter(base, "ff", 2, head=True, seed=2, dropout=0.2), examples, lr=2e-3),
        make_job("all", make_adapter(base, "full", 4, head=True, embeddings=True, seed=3), examples, lr=2e-3),
    ]
    packed = train(base, jobs)
    for job in jobs:
        assert_close(packed[job.run_id], train(base, [job])[job.run_id])


def test_activation_checkpointing_changes_no_result(load: Any, mixed_jobs: Any, train: Any, assert_close: Any) -> None:
    base = load("llama")
    jobs = mixed_jobs(base)[:3]
    plain, recomputed = train(base, jobs), train(base, jobs, checkpointing=True)
    for job in jobs:
        assert_close(recomputed[job.run_id], plain[job.run_id])


def test_training_gives_the_base_model_back_as_it_was(load: Any, mixed_jobs: Any, train: Any) -> None:
    base = load("gpt2")
    modules = {name: id(module) for name, module in base.model.named_modules()}
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    train(base, mixed_jobs(base)[:2])
    assert {name: id(module) for name, module in base.model.named_modules()} == modules
    assert all(value.equal(weights[name]) for name, value in base.model.state_dict().items())
    assert not any(module.training for module in base.model.modules())
