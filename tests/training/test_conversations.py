"""Several answers in one row: the loss is the stock model's with -100 as label of everything else, packed as alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sweeper.tasks.example import Encoded, scored
from sweeper.training import score as scoring
from sweeper.training.batches import DataOrder
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from tests.training.plain import Plain


def conversations(seed: int, count: int = 24) -> tuple[Encoded, ...]:
    """Random rows with one answer, two or three."""
    rng, made = np.random.default_rng(seed), []
    for i in range(count):
        ids = tuple(rng.integers(3, 280, int(rng.integers(12, 25))).tolist())
        cuts = sorted(rng.choice(np.arange(1, len(ids)), 2 * int(rng.integers(1, 4)) - 1, replace=False).tolist())
        made.append(Encoded(f"{seed}/{i}", ids, cuts[0], asides=tuple(zip(cuts[1::2], cuts[2::2], strict=True))))
    return tuple(made)


@pytest.fixture
def stock(load: Any) -> Callable[[Encoded], float]:
    """The mean NLL of a row as transformers works it out."""

    def loss(example: Encoded) -> float:
        ids = torch.tensor([example.input_ids])
        labels = torch.full_like(ids, -100)
        for start, end in scored(example):
            labels[0, start:end] = ids[0, start:end]
        return float(load("llama").model(input_ids=ids, labels=labels).loss)

    return loss


@torch.no_grad()
def test_every_answer_is_scored_and_nothing_else(load: Any, stock: Callable[[Encoded], float]) -> None:
    base, examples = load("llama"), conversations(0)
    with Pack(base, [{base.targets[0].name: 1}], PackConfig(batch_size=4)) as pack:
        (found,) = scoring.score(pack, [-1], examples, budget=256)
    assert len({len(scored(example)) for example in examples}) == 3
    for example, one in zip(examples, found, strict=True):
        assert one.tokens == sum(end - start for start, end in scored(example))
        assert one.nll / one.tokens == pytest.approx(stock(example), rel=1e-5)


def test_packed_equals_solo_equals_plain_pytorch(
    load: Any, make_job: Any, make_adapter: Any, train: Any, assert_close: Any
) -> None:
    base = load("llama")
    jobs = [
        make_job(name, make_adapter(base, name, rank, seed=rank), conversations(rank))
        for name, rank in (("attn", 2), ("ff", 4), ("full", 3))
    ]
    packed = train(base, jobs)
    for job in jobs:
        assert_close(packed[job.run_id], train(base, [job])[job.run_id])
        with Pack(base, [job.adapter.ranks], PackConfig(batch_size=4)) as pack:
            begin = {name: tuple(parts[:2]) for name, parts in pack.snapshot(pack.add(job)).items()}
        order = DataOrder([len(e.input_ids) for e in job.examples], 4, job.spec.seed)
        plain, steps = Plain(base, job, begin), len(packed[job.run_id].losses)
        losses = [plain.step(step, steps, [job.examples[i] for i in order.batch(step)]) for step in range(steps)]
        assert packed[job.run_id].losses == pytest.approx(losses, rel=1e-4)
