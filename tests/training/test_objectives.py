"""An objective is one file: here two that are none of ours train packed as they do alone, and as autograd has it."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sweeper import objectives
from sweeper.errors import SpecError
from sweeper.objectives.nll import NLL
from sweeper.objectives.objective import Objective, Outputs
from sweeper.record import read_record
from sweeper.spec import ObjectiveSpec

PAIRED = ObjectiveSpec(name="margin", options={"beta": 0.5})
FOCAL = ObjectiveSpec(name="focal", options={"gamma": 1.5})


class Focal(Objective):
    """Mean of (1 - p)^gamma * NLL: no weighted sum of the tokens' NLL."""

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = gamma

    def losses(self, seen: Outputs) -> Tensor:
        return (seen.weights * (1 - torch.exp(-seen.nll)).clamp(min=1e-6) ** self.gamma * seen.nll).sum(1)


class Margin(Objective):
    """Two rows of an example, its own and one that is cut short, of which the first is to be the likelier one."""

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def rows(self, example: Any) -> tuple[Any, Any]:
        end = max(example.prompt_length + 1, len(example.input_ids) - 2)
        return example, SimpleNamespace(input_ids=example.input_ids[:end][::-1], prompt_length=1)

    def losses(self, seen: Outputs) -> Tensor:
        margins = seen.log_likelihoods[:, ::2] - seen.log_likelihoods[:, 1::2]
        return (seen.shares[:, ::2] * functional.softplus(-self.beta * margins)).sum(1)


class Twice(Margin):
    """Each example as two rows of the same length."""

    def rows(self, example: Any) -> tuple[Any, Any]:
        return example, example


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(objectives.OBJECTIVES, "focal", Focal)
    monkeypatch.setitem(objectives.OBJECTIVES, "margin", Margin)
    monkeypatch.setitem(objectives.OBJECTIVES, "twice", Twice)
    yield
    objectives._made.cache_clear()


@pytest.mark.parametrize("spec", [FOCAL, PAIRED], ids=lambda spec: spec.name)
def test_packed_equals_solo(
    spec: ObjectiveSpec, load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any, assert_close: Any
) -> None:
    base = load("llama")
    jobs = [
        make_job(name, make_adapter(base, name, rank, seed=rank, dropout=0.1), make_examples(rank)).with_spec(
            objective=spec
        )
        for name, rank in (("attn", 2), ("ff", 4), ("full", 3))
    ]
    packed = train(base, jobs)
    for job in jobs:
        assert_close(packed[job.run_id], train(base, [job])[job.run_id])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_the_nll_that_objectives_see_is_that_of_the_stock_model_and_so_is_its_gradient(kind: str, load: Any) -> None:
    from sweeper.models.loss import Head

    base = load(kind)
    head = Head.of(base.model, base.verdict.head)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 32, generator=generator).requires_grad_()
    targets = torch.randint(0, 280, (2, 6), generator=generator)
    found = head.nll(hidden, targets)
    upstream = torch.randn(2, 6, generator=generator)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    wanted = functional.cross_entropy(head.logits(hidden), targets.flatten(), reduction="none").view(2, 6)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad((wanted * upstream).sum(), hidden)[0])


def test_the_two_ways_through_the_head_are_one(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any, assert_close: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = load("llama")
    job = make_job("x", make_adapter(base, "full", 4), make_examples(0))
    once = train(base, [job])["x"]
    monkeypatch.setattr(NLL, "linear", False)
    assert_close(train(base, [job])["x"], once)


@pytest.mark.parametrize(("accumulation", "place"), [(1, {}), (2, {}), (1, {"head": True})])
def test_runs_of_different_objectives_share_a_pack(
    accumulation: int, place: dict[str, Any], load: Any, make_job: Any, make_adapter: Any, make_examples: Any,
    train: Any, assert_close: Any,
) -> None:  # fmt: skip
    base = load("llama")
    jobs = [
        make_job(
            f"{spec.name}-{rank}", make_adapter(base, "full", rank, seed=rank, dropout=0.2, **place),
            make_examples(rank), steps=4 + rank, accumulation=accumulation,
        ).with_spec(objective=spec)
        for rank, spec in enumerate([PAIRED, ObjectiveSpec(), FOCAL, PAIRED, ObjectiveSpec()], start=1)
    ]  # fmt: skip
    packed = train(base, jobs, accumulation=accumulation)
    for job in jobs:
        assert_close(packed[job.run_id], train(base, [job], accumulation=accumulation)[job.run_id])


def test_the_loss_of_a_step_is_its_examples_whatever_its_passes(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load("llama")
    job = make_job("x", make_adapter(base, "full", 4), make_examples(0)).with_spec(objective=PAIRED)
    halves = make_job("x", make_adapter(base, "full", 4), make_examples(0), batch_size=2, accumulation=2)
    once = train(base, [job])["x"].losses
    assert train(base, [halves.with_spec(objective=PAIRED)], batch_size=2, accumulation=2)["x"].losses == pytest.approx(
        once, rel=1e-5
    )


def test_objectives_share_packs_but_for_those_of_tasks_that_are_weighed(make_spec: Any) -> None:
    from sweeper.training.sharing import pack_key

    specs = [make_spec(), make_spec(objective={"name": "focal"})]
    assert len({pack_key(spec, [30] * 9) for spec in specs}) == 1
    assert len({pack_key(spec, [30] * 9, learns=True) for spec in specs}) == 2
    assert len({pack_key(spec, [30] * 9, (2, 4)) for spec in specs}) == 2


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            ObjectiveSpec(name="nl"),
            "objective=nl: no such objective. Choose from cpo, dpo, focal, ipo, kto, margin, nll, orpo, simpo, twice. "
            "Did you mean nll?",
        ),
        (ObjectiveSpec(name="nll", options={"beta": 1}), "objective=nll has no such option. Options: none."),
        (ObjectiveSpec(name="focal", options={"beta": 1}), "objective=focal has no such option. Options: gamma."),
    ],
)
def test_what_cannot_be_is_named(spec: ObjectiveSpec, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        objectives.check(spec)
    assert line in str(caught.value)


def test_a_run_of_the_first_objective_keeps_its_id(make_spec: Any) -> None:
    from sweeper.spec import canonical_json, to_mapping

    assert "objective" not in canonical_json(make_spec())
    assert "objective" not in to_mapping(make_spec())
    assert make_spec(objective={"name": "focal"}).run_id != make_spec().run_id


def test_the_tokens_of_every_row_are_counted(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    plain, twice = make_run("attn"), make_run("attn", objective={"name": "twice"})
    run_all([plain, twice])
    one, two = (read_record(tmp_path / "study" / spec.run_id).efficiency for spec in (plain, twice))
    assert two.train_tokens == 2 * one.train_tokens
    assert two.train_flops == pytest.approx(2 * one.train_flops)
