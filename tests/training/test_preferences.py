"""Preference objectives: equal to their papers' formulas and to TRL's, packed as alone, and with NLL runs in one pack.

What is compared with is a copy of the base with a LoRA in plain PyTorch and torch's own AdamW; `papers` are formulas
written down from the papers, `trl` the losses of TRL's trainers, where it is installed.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sweeper import objectives
from sweeper.errors import SpecError
from sweeper.objectives.objective import Row
from sweeper.spec import ObjectiveSpec
from sweeper.tasks import Encoded
from sweeper.training import reference
from sweeper.training.batches import collate
from sweeper.training.passes import passes, weights
from sweeper.training.run_state import RunState
from tests.training import plain, trl_losses
from tests.training.plain import Plain

STEPS = 20
SOLO = ("dpo", "ipo whole", "kto weighed", "simpo with nll", "orpo from the start", "nll full")
needs_trl = (
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl==1.16.0"),
)


def spec(name: str, **options: Any) -> ObjectiveSpec:
    return ObjectiveSpec(name=name, options=options)


def pairs(seed: int, count: int = 12) -> tuple[Encoded, ...]:
    rng = np.random.default_rng(seed)

    def drawn(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 280, int(rng.integers(low, high))).tolist())

    made = []
    for i in range(count):
        prompt = drawn(2, 9)
        made.append(Encoded(f"{seed}/{i}", (*prompt, *drawn(2, 12)), len(prompt), rejected=drawn(2, 12)))
    return tuple(made)


def labelled(seed: int) -> tuple[Encoded, ...]:
    return tuple(dataclasses.replace(one, rejected=(), label=i % 3 > 0) for i, one in enumerate(pairs(seed)))


def with_references(base: Any, job: RunState) -> RunState:
    """The job with what `training.loaded` fills in."""
    of_job: Any = job.rows
    every = [row for rows in of_job for row in rows]
    found = iter(reference.measure(base, every))
    filled = [tuple(dataclasses.replace(row, reference=next(found)) for row in rows) for rows in of_job]
    return dataclasses.replace(job, rows=filled)


def sums(model: Any, rows: Sequence[Row], start: Callable[[Row], int] = lambda row: row.prompt_length) -> list[Tensor]:
    return [-plain.nll(model, [Row(row.input_ids, start(row))])[0] for row in rows]


def parted(model: Any, examples: Sequence[Sequence[Row]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-likelihoods, and lengths of responses, of chosen and rejected rows; of ORPO's by their prompt's length."""
    better, worse = zip(*examples, strict=True)

    def start(row: Row) -> int:
        return int(row.value) or row.prompt_length

    lengths = [torch.tensor([float(len(row.input_ids) - start(row)) for row in rows]) for rows in (better, worse)]
    return *(torch.stack(sums(model, rows, start)) for rows in (better, worse)), *lengths  # type: ignore[return-value]


def ratios(model: Any, examples: Sequence[Sequence[Row]], *, mean: bool = False) -> tuple[Tensor, Tensor]:
    better, worse, own, other = parted(model, examples)
    reference_better, reference_worse = (
        torch.tensor([row.reference for row in rows]) for rows in zip(*examples, strict=True)
    )
    a, b = better - reference_better, worse - reference_worse
    return (a / own, b / other) if mean else (a, b)


def chosen_mean_nll(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
    total, count = plain.nll(model, [rows[0] for rows in examples])
    return total / count


def paper_dpo(beta: float, smoothing: float = 0.0, *, mean: bool = False) -> trl_losses.Loss:
    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        a, b = ratios(model, examples, mean=mean)
        right, wrong = torch.sigmoid(beta * (a - b)).log(), torch.sigmoid(beta * (b - a)).log()
        return -((1 - smoothing) * right + smoothing * wrong).mean()

    return loss


def paper_ipo(beta: float, smoothing: float = 0.0, *, mean: bool = True) -> trl_losses.Loss:
    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        a, b = ratios(model, examples, mean=mean)
        right, wrong = (a - b - 1 / (2 * beta)) ** 2, (b - a - 1 / (2 * beta)) ** 2
        return ((1 - smoothing) * right + smoothing * wrong).mean()

    return loss


def paper_kto(beta: float, good: float, bad: float) -> trl_losses.Loss:
    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        every = [row for rows in examples for row in rows]
        found = [value - row.reference for value, row in zip(sums(model, every), every, strict=True)]
        shifts = [float(r.detach()) for r, row in zip(found, every, strict=True) if row.value == 0]
        z = max(0.0, float(np.mean(shifts)))
        each = [
            weight * (1 - torch.sigmoid(beta * sign * (r - z)))
            for r, row in zip(found, every, strict=True)
            for weight, sign in [(good, 1) if row.value > 0 else (bad, -1)]
            if row.value
        ]
        return torch.stack(each).mean()

    return loss


def paper_cpo(beta: float, alpha: float, smoothing: float, *, mean: bool = False, gamma: float = 0) -> trl_losses.Loss:
    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        a, b, own, other = parted(model, examples)
        gap = beta * ((a / own - b / other) if mean else (a - b)) - gamma
        found = (1 - smoothing) * functional.softplus(-gap) + smoothing * functional.softplus(gap)
        return found.mean() + alpha * chosen_mean_nll(model, examples)

    return loss


def paper_orpo(beta: float) -> trl_losses.Loss:
    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        a, b, own, other = parted(model, examples)
        better, worse = (a / own).exp(), (b / other).exp()
        odds = (better / (1 - better)) / (worse / (1 - worse))
        return chosen_mean_nll(model, examples) - beta * torch.sigmoid(odds.log()).log().mean()

    return loss


CASES: dict[str, tuple[ObjectiveSpec, trl_losses.Loss]] = {
    "dpo": (spec("dpo", beta=0.3), paper_dpo(0.3)),
    "dpo smoothed": (spec("dpo", beta=0.3, label_smoothing=0.2), paper_dpo(0.3, 0.2)),
    "dpo normalised": (spec("dpo", beta=2.0, length_normalised=True), paper_dpo(2.0, mean=True)),
    "ipo": (spec("ipo", beta=0.2), paper_ipo(0.2)),
    "ipo whole": (spec("ipo", beta=0.2, label_smoothing=0.1, length_normalised=False), paper_ipo(0.2, 0.1, mean=False)),
    "kto": (spec("kto", beta=0.3), paper_kto(0.3, 1.0, 1.0)),
    "kto weighed": (spec("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5), paper_kto(0.3, 1.5, 0.5)),
    "cpo": (spec("cpo", beta=0.1, label_smoothing=0.1), paper_cpo(0.1, 1.0, 0.1)),
    "cpo normalised": (spec("cpo", nll_weight=0.5, length_normalised=True), paper_cpo(0.1, 0.5, 0.0, mean=True)),
    "simpo": (spec("simpo", beta=2.0, gamma=1.0), paper_cpo(2.0, 0.0, 0.0, mean=True, gamma=1.0)),
    "simpo with nll": (
        spec("simpo", beta=2.5, gamma=0.5, nll_weight=0.7, label_smoothing=0.1),
        paper_cpo(2.5, 0.7, 0.1, mean=True, gamma=0.5),
    ),
    "orpo": (spec("orpo", beta=0.4), paper_orpo(0.4)),
    "orpo from the start": (spec("orpo", beta=0.4, prompt_loss=True), paper_orpo(0.4)),
}
TRL: dict[str, Callable[[], trl_losses.Loss]] = {
    "dpo": lambda: trl_losses.dpo("sigmoid", 0.3),
    "dpo normalised": lambda: trl_losses.dpo("sigmoid_norm", 2.0),
    "ipo": lambda: trl_losses.dpo("ipo", 0.2),
    "kto": lambda: trl_losses.kto(0.3, 1.0, 1.0),
    "kto weighed": lambda: trl_losses.kto(0.3, 1.5, 0.5),
    "cpo": lambda: trl_losses.cpo("sigmoid", 0.1, 1.0, 0.1),
    "simpo": lambda: trl_losses.cpo("simpo", 2.0, 0.0, 0.0, gamma=1.0),
    "simpo with nll": lambda: trl_losses.cpo("simpo", 2.5, 0.7, 0.1, gamma=0.5),
    "orpo from the start": lambda: trl_losses.orpo(0.4),
}


@pytest.fixture(scope="module")
def jobs(load: Any, make_job: Any, make_adapter: Any) -> dict[str, RunState]:
    """A run of every case, of other placements, ranks and examples, and two of NLL."""
    base, made = load("llama"), {}
    for number, (name, (objective, _)) in enumerate(CASES.items()):
        place, examples = (
            ("attn", "ff", "full")[number % 3],
            labelled(number) if name == "kto weighed" else pairs(number),
        )
        job = make_job(name, make_adapter(base, place, 2 + number % 4, seed=number), examples, steps=STEPS, lr=3e-3)
        job = job.with_spec(objective=objective)
        made[name] = with_references(base, job) if job.objective.reference else job
    for number, place in enumerate(("attn", "full")):
        name = f"nll {place}"
        made[name] = make_job(name, make_adapter(base, place, 4, seed=number), pairs(number), steps=STEPS, lr=3e-3)
    return made


@pytest.fixture(scope="module")
def packed(jobs: dict[str, RunState], load: Any, train: Any) -> tuple[dict[str, Any], dict[str, plain.Pairs]]:
    """All of them trained in one pack, and what each began with."""
    begun: dict[str, plain.Pairs] = {}

    def note(pack: Any, step: int) -> None:
        for slot, state in pack.active if step == 0 else ():
            begun[state.run_id] = {name: parts[:2] for name, parts in pack.snapshot(slot).items()}

    return train(load("llama"), list(jobs.values()), before_step=note), begun


def follow(base: Any, job: RunState, begin: plain.Pairs, loss: trl_losses.Loss, steps: int = STEPS) -> list[float]:
    """The losses of the first steps of a run in plain PyTorch."""
    twin = Plain(base, job, begin)
    found = []
    for step in range(steps):
        examples: Any = [job.rows[i] for i in job.order.batch(step)]
        value = loss(twin.model, examples)
        found.append(float(value.detach()))
        twin.descend(value, step, job.steps)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_pack_of_all_objectives_follows_their_papers(name: str, jobs: Any, packed: Any, load: Any) -> None:
    traces, begun = packed
    wanted = follow(load("llama"), jobs[name], begun[name], CASES[name][1], steps=7)
    assert traces[name].losses[0] == pytest.approx(wanted[0], rel=1e-5)
    assert traces[name].losses[:7] == pytest.approx(wanted, rel=1e-4)
    assert abs(traces[name].losses[-1] - wanted[0]) > 0.01  # it went somewhere


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_trl) for name in TRL])
def test_a_pack_of_all_objectives_follows_trl(name: str, jobs: Any, packed: Any, load: Any) -> None:
    traces, begun = packed
    wanted = follow(load("llama"), jobs[name], begun[name], TRL[name]())
    assert traces[name].losses[0] == pytest.approx(wanted[0], rel=1e-5)
    assert traces[name].losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", SOLO)
def test_packed_equals_solo(name: str, jobs: Any, packed: Any, load: Any, train: Any, assert_close: Any) -> None:
    assert_close(packed[0][name], train(load("llama"), [jobs[name]])[name])


@pytest.mark.parametrize(
    ("name", "source"),
    [*((name, "paper") for name in CASES), *(pytest.param(name, "trl", marks=needs_trl) for name in TRL)],
)
def test_loss_and_gradients(name: str, source: str, jobs: Any, packed: Any, load: Any) -> None:
    """Of an adapter that has moved away from the base, whose own margins are all 0."""
    from sweeper.lora.forms import AdapterSpec
    from sweeper.training.pack import Pack
    from sweeper.training.pack_config import PackConfig

    base, job, trained = load("llama"), jobs[name], packed[0][name].adapter
    assert isinstance(job.adapter, AdapterSpec)
    loss = CASES[name][1] if source == "paper" else TRL[name]()
    twin = Plain(base, job, {key: parts[:2] for key, parts in trained.items()})
    examples = [job.rows[i] for i in job.order.batch(0)]
    wanted = loss(twin.model, examples)
    wanted.backward()
    begun = dataclasses.replace(job, weights={key: parts[:2] for key, parts in trained.items()})
    with Pack(base, [job.adapter.ranks], PackConfig(batch_size=4)) as pack:
        pack.add(begun)
        pack.use_lanes([0])
        every = passes([begun], pack.config)
        heavy, shares = weights(begun, 0, every)[0]
        found = pack.forward_backward(collate(every[0].rows, [heavy], fixed=False, shares=[shares]))
        gradients = pack.store.views(0, pack.store.grads)
        torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-5, atol=1e-6)
        for key, parts in twin.pairs.items():
            for mine, other in zip(gradients[key], parts, strict=True):
                assert other.grad is not None
                torch.testing.assert_close(mine, other.grad, rtol=1e-4, atol=1e-5)


def test_base_log_likelihoods_are_kept_and_are_the_stock_models(load: Any, tmp_path: Any) -> None:
    base = load("llama")
    rows = [row for one in pairs(0) for row in objectives.of(spec("dpo")).rows(one)]
    found = reference.find(base, "tiny", rows, tmp_path)
    wanted = [float(-plain.nll(base.model, [row])[0]) for row in rows]
    assert found == pytest.approx(wanted, rel=1e-5)
    (kept,) = tmp_path.glob("*.json")
    before = kept.stat().st_mtime_ns
    assert reference.find(base, "tiny", rows, tmp_path) == found
    assert kept.stat().st_mtime_ns == before
    reference.find(base, "another precision", rows, tmp_path)
    reference.find(base, "tiny", rows[1:], tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_a_mismatched_response_is_another_prompts(load: Any) -> None:
    for examples in (pairs(0), labelled(0)):
        rows: Any = objectives.of(spec("kto")).rows_of(examples)
        for number, own in enumerate(rows):
            *labels, mismatched = own
            assert [row.value for row in labels] == (
                [1, -1] if examples[0].rejected else [1 if examples[number].label else -1]
            )
            prompt = examples[number].input_ids[: examples[number].prompt_length]
            assert mismatched.input_ids[: mismatched.prompt_length] == prompt
            other = examples[number - 1]
            responses = {other.input_ids[other.prompt_length :], other.rejected}
            assert mismatched.input_ids[mismatched.prompt_length :] in responses


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        (spec("dpo", beta=0.0), "objective.options.beta must be above 0 for dpo, got 0.0"),
        (spec("ipo", label_smoothing=0.5), "label_smoothing must be in [0, 0.5) for ipo: the share of labels that are"),
        (spec("simpo", gamma=-1.0), "objective.options.gamma must be at least 0, got -1.0"),
        (spec("cpo", nll_weight=-1.0), "objective.options.nll_weight must be at least 0, got -1.0"),
        (spec("kto", desirable_weight=0.0), "objective.options.desirable_weight must be above 0 for kto, got 0.0"),
        (spec("orpo", gamma=1.0), "objective=orpo has no such option. Options: beta, prompt_loss, label_smoothing"),
        (spec("dpo", beta="much"), "objective.options of objective=dpo: "),
    ],
)
def test_options_that_are_no_use_are_one_line(objective: ObjectiveSpec, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        objectives.check(objective)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
