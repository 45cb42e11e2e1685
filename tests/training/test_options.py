"""Penalties, noise, averages, early stopping: a run is the same in a pack as alone with all of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import methods
from sweeper.errors import SpecError
from sweeper.lora import noise, penalty
from sweeper.record import ADAPTER, METRICS, read_record
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.score import score


def test_gradients_of_the_penalties_are_those_of_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, generator=generator), torch.randn(4, 7, generator=generator)
    frozen = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    first, second = a.clone().requires_grad_(), b.clone().requires_grad_()
    live, other = first * frozen, second * frozen
    eye = torch.diag(frozen[:, 0])
    total = (
        0.3 * (0.5 * second.t() @ first).square().sum()
        + 0.2 * ((live @ live.t() - eye).square().sum() + (other @ other.t() - eye).square().sum())
        + 0.7 * (live.square().sum() + other.square().sum())
    )
    total.backward()
    weights = torch.tensor([0.3, 0.2, 0.7])
    found = penalty.gradients(a, b, a * frozen, b * frozen, torch.tensor(0.5), weights)
    for ours, wanted in zip(found, (first.grad, second.grad), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", ["update_penalty", "orthogonality_penalty", "norm_penalty"])
def test_a_penalty_lowers_what_it_penalises(
    name: str, load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load("llama")

    def measure(weight: float) -> float:
        penalties = tuple(weight * (name == one) for one in ("update_penalty", "orthogonality_penalty", "norm_penalty"))
        adapter = dataclasses.replace(make_adapter(base, "full", 4), penalties=penalties)
        found = train(base, [make_job("x", adapter, make_examples(0), steps=12, max_grad_norm=None)])["x"].adapter
        value = 0.0
        for a, b, *_ in found.values():
            eye = torch.eye(4)
            value += {
                "update_penalty": float((b.t() @ a).square().sum()),
                "orthogonality_penalty": float((a @ a.t() - eye).square().sum() + (b @ b.t() - eye).square().sum()),
                "norm_penalty": float(a.square().sum() + b.square().sum()),
            }[name]
        return value

    assert measure(1.0) < 0.95 * measure(0.0)


@pytest.fixture
def jobs(load: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> list[Any]:
    """An ordinary run, and one of each option; the second has longer rows, so that the padding differs."""
    base = load("llama")
    plain = make_adapter(base, "attn", 4)
    changes: dict[str, dict[str, Any]] = {
        "plain": {}, "noise": {"noise": 5.0, "seed": 1}, "average": {"average": 0.9},
        "penalised": {"penalties": (0.1, 0.1, 0.01)}, "ratio": {"rate_b": 8.0},
    }  # fmt: skip
    made = [
        make_job(name, dataclasses.replace(plain, **fields), make_examples(i))
        for i, (name, fields) in enumerate(changes.items())
    ]
    made.append(make_job("long", make_adapter(base, "full", 2, seed=5), make_examples(9, shortest=40, longest=70)))
    return made


def test_options_of_one_run_are_no_others_and_packed_equals_solo(
    load: Any, jobs: Any, train: Any, assert_close: Any
) -> None:
    base = load("llama")
    packed = train(base, jobs, capacities=[job.adapter.capacity for job in jobs])
    for job in jobs:
        assert_close(packed[job.run_id], train(base, [job], capacities=[job.adapter.capacity])[job.run_id])


def test_accumulation_counts_a_penalty_once(load: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> None:
    base = load("llama")
    adapter = dataclasses.replace(make_adapter(base, "attn", 4), penalties=(0.0, 0.0, 3.0))
    found = []
    for accumulation in (1, 2):
        job = make_job("x", adapter, make_examples(0))
        with Pack(
            base, [adapter.capacity], PackConfig(batch_size=4 // accumulation, accumulation=accumulation)
        ) as pack:
            pack.add(job)
            before = {name: parts[0] for name, parts in pack.snapshot(0).items()}
            for _ in range(accumulation):
                with pack.store.one_pass(1 / accumulation):
                    pass
            gradients = pack.store.views(0, pack.store.grads)
            found.append({name: parts[0].clone() for name, parts in gradients.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, 6.0 * before[name])
        torch.testing.assert_close(gradient, found[1][name])


def test_noise_is_uniform_of_the_size_neftune_says_and_only_in_training(
    load: Any, jobs: Any, make_examples: Any
) -> None:
    seeds = torch.tensor([11, 4_000_000_000])
    drawn = noise.uniform(seeds, 40, 20, 64)
    assert -1 <= float(drawn.min()) < -0.99
    assert 0.99 < float(drawn.max()) < 1
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.square().mean()) == pytest.approx(1 / 3, rel=0.05)
    assert not drawn[0].equal(drawn[1])
    padded = noise.uniform(seeds, 2 * 30, 30, 64).view(2, 2, 30, 64)[:, :, :20]
    assert drawn.view(2, 2, 20, 64).equal(padded)  # the padded length does not matter
    embedded, lengths = torch.zeros(4, 20, 64), torch.tensor([5, 20, 20, 20])
    slots = torch.tensor([1, -1], dtype=torch.int32)
    noisy = noise.add(embedded, lengths, torch.tensor([3.0, 5.0]), seeds, slots)
    assert float(noisy[0].abs().max()) == pytest.approx(5 / (5 * 64) ** 0.5, rel=0.01)
    assert float(noisy[1].abs().max()) == pytest.approx(5 / (20 * 64) ** 0.5, rel=0.01)
    assert not noisy[2:].any()
    base, examples = load("llama"), make_examples(0, count=5)
    with Pack(base, [jobs[1].adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(jobs[1])
        fresh, plain = score(pack, [0, -1], examples, budget=4096)
    assert fresh == plain


def test_the_average_is_what_is_evaluated_and_saved_and_the_weights_train_on(
    load: Any, jobs: Any, make_examples: Any, train: Any, assert_identical: Any
) -> None:
    base, job, examples = load("llama"), jobs[2], make_examples(0, count=6)
    with Pack(base, [job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(dataclasses.replace(job))
        average = {name: parts[0] for name, parts in pack.snapshot(0).items()}
        for step in range(1, 5):
            pack.step()
            decay = min(0.9, (1 + step) / (10 + step))
            now = {name: parts[0] for name, parts in pack.snapshot(0).items()}
            average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
        held = pack.store.views(0, pack.store.to_save(0))
        for name, wanted in average.items():
            torch.testing.assert_close(held[name][0], wanted)
        state = {name: tuple(part.clone() for part in parts) for name, parts in held.items()}
        before = pack.snapshot(0)
        (found,) = score(pack, [0], examples, budget=4096)
        after = pack.snapshot(0)
    assert all(u.equal(v) for name in before for u, v in zip(before[name], after[name], strict=True))
    plain = dataclasses.replace(job.adapter, average=None)
    zeros = {name: (*parts, *(torch.zeros_like(p) for p in (*parts, *parts))) for name, parts in state.items()}
    with Pack(base, [plain.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(dataclasses.replace(job, adapter=plain, weights=zeros))
        (wanted_scores,) = score(pack, [0], examples, budget=4096)
    assert [s.nll for s in found] == pytest.approx([s.nll for s in wanted_scores], rel=1e-6)


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_run_that_gets_worse_ends_and_keeps_its_best(
    average: float | None, make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    """At this rate the NLL falls first and then rises; a patient run of the same pack goes on to its end."""
    from sweeper.rescoring import rescore
    from sweeper.spec import EvaluationSpec, Settings

    trainer = {"max_steps": 24, "patience": 2, "ema_decay": average}
    optim = {"lr": 0.15, "schedule": "constant", "warmup_fraction": 0.0}
    specs = [
        make_run("full", trainer=trainer, optim=optim, evaluation={"every_steps": 1}),
        make_run("full", trainer={"max_steps": 24}, optim=optim, evaluation={"every_steps": 1}),
    ]
    run_all(specs)
    record, whole = (read_record(tmp_path / "study" / spec.run_id) for spec in specs)
    assert (record.status, whole.status) == ("completed", "completed")
    assert record.saved["stopped_early"]
    assert record.steps == record.saved["step"] + 2 < 24
    assert whole.saved == {"step": 24, "stopped_early": False, "average": False}
    assert record.saved["average"] == (average is not None)
    rows = [json.loads(line) for line in (tmp_path / "study" / specs[0].run_id / METRICS).read_text().splitlines()]
    during = {row["step"]: row["nll"] for row in rows if row.get("split") == "validation" and row["moment"].isdigit()}
    assert min(during, key=during.__getitem__) == record.saved["step"]
    assert record.scores["validation"]["after"].nll == pytest.approx(min(during.values()), rel=1e-5)
    settings = Settings(study="study", output_root=str(tmp_path), device="cpu")
    saved = rescore.find([tmp_path / "study" / specs[0].run_id])
    (again,) = rescore.rescore(saved, [], EvaluationSpec(name="e", splits=("validation",)), settings)
    assert again.score.nll == pytest.approx(min(during.values()), rel=1e-5)
    assert (tmp_path / "study" / specs[0].run_id / ADAPTER).is_dir()


def test_a_sparse_run_that_ends_early_or_is_averaged_is_saved_sparse(
    make_run: Any, run_all: Any, load: Any, place: Any, tmp_path: Path
) -> None:
    """Its lowest NLL is while the adapter is still dense, which is not what the method is to leave."""
    from sweeper.rescoring.rescore import read_adapter

    sparse = {"name": "sparse", "options": {"sparsity": 0.5}}
    trainer = {"max_steps": 10, "patience": 9, "ema_decay": 0.5}
    spec = make_run("attn", method=sparse, trainer=trainer, optim={"lr": 0.05}, evaluation={"every_steps": 1})
    run_all([spec])
    folder = tmp_path / "study" / spec.run_id
    record = read_record(folder)
    assert record.saved["step"] >= 7
    found = read_adapter(folder)
    parts = [part for target in place(load("llama"), "attn") for part in found.parts(target)]
    assert sum(int((part != 0).sum()) for part in parts) == record.trainable_parameters


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"trainer": {"patience": 2}}, "give evaluation.every_steps, from 1 to 3"),
        ({"trainer": {"patience": 2, "max_steps": 1}}, "before the last step, and trainer.max_steps=1 has none"),
        ({"trainer": {"patience": 0}, "evaluation": {"every_steps": 1}}, "trainer.patience must be at least 1"),
        ({"trainer": {"ema_decay": 1.0}}, r"trainer.ema_decay must be in \(0, 1\)"),
        ({"trainer": {"neftune_alpha": -1.0}}, "trainer.neftune_alpha must be at least 0"),
        ({"optim": {"lr_ratio": 0.0}}, "optim.lr_ratio must be above 0"),
        ({"optim": {"norm_penalty": -0.1}}, "optim.norm_penalty must be at least 0"),
        ({"optim": {"lr_ratio": 2.0}, "method": {"name": "lora_plus"}}, "says itself how fast A and B learn"),
        ({"optim": {"norm_penalty": 1.0}, "method": {"name": "vera"}}, "it takes optim.update_penalty alone"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], line: str, make_spec: Any) -> None:
    with pytest.raises(SpecError, match=line):
        methods.check(make_spec(**changes))


def test_options_left_alone_change_no_identity(make_spec: Any) -> None:
    off = {"lr_ratio": None, "update_penalty": 0.0, "orthogonality_penalty": 0.0, "norm_penalty": 0.0}
    assert make_spec().run_id == make_spec(optim=off, trainer={"ema_decay": None, "patience": None}).run_id
    assert make_spec().run_id != make_spec(trainer={"ema_decay": 0.9}).run_id


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "pissa", "relora", "sparse"])
def test_averages_of_every_form_are_scored_and_scoring_changes_nothing(
    name: str, load: Any, make_spec: Any, make_job: Any, make_examples: Any, place: Any, train: Any,
    assert_identical: Any,
) -> None:  # fmt: skip
    base, examples = load("gpt2"), make_examples(0, count=6)
    options = {"relora": {"restarts": 1, "warmup_steps": 1}}.get(name, {})
    trainer = {"max_steps": 6, "ema_decay": 0.5}
    spec = make_spec(rank=4, alpha=8, method={"name": name, "options": options}, trainer=trainer)
    adapter = methods.adapter(spec, dict.fromkeys(place(base, "full"), 4))
    job = make_job("x", adapter, make_examples(0), lr=3e-2)
    found: list[float] = []

    def look(pack: Pack, step: int) -> None:
        found[:] = [s.nll for s in score(pack, [0], examples, budget=4096)[0]]

    undisturbed = train(base, [job], capacities=[adapter.capacity])["x"]
    watched = train(base, [job], capacities=[adapter.capacity], before_step=look)["x"]
    assert_identical(watched, undisturbed)

    average: dict[str, tuple[torch.Tensor, ...]] = {}
    with Pack(base, [adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(dataclasses.replace(job))
        for _ in range(5):
            pack.step()
        held = pack.store.views(0, pack.store.to_save(0))
        average.update({n: tuple(part.clone() for part in parts) for n, parts in held.items()})
    plain = dataclasses.replace(adapter.settled(), sparsity=None)
    state = {n: (*parts, *(torch.zeros_like(p) for p in (*parts, *parts))) for n, parts in average.items()}
    with Pack(base, [plain.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(dataclasses.replace(job, adapter=plain, weights=state))
        wanted = [s.nll for s in score(pack, [0], examples, budget=4096)[0]]
        bare = [s.nll for s in score(pack, [-1], examples, budget=4096)[0]]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found != pytest.approx(bare, rel=1e-5)
