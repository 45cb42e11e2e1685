"""Scores are what autograd says of the weights themselves; ranks follow them into training, record and PEFT."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sweeper import methods, tasks
from sweeper.errors import ModelError
from sweeper.models import BaseModel
from sweeper.models.budget import lora_parameters
from sweeper.placement.importance import Probing
from sweeper.record import ADAPTER, Record, read_record
from sweeper.rescoring import rescore
from sweeper.spec import RunSpec, Settings
from sweeper.tasks.example import Tokens
from sweeper.training import probe
from sweeper.training.events import RunFinished, Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

KINDS = ["llama", "gpt2", "gpt_neox", "opt"]
Make = Callable[..., Any]


def question(
    base: BaseModel, examples: Sequence[Tokens], score: str = "gradient", *, seed: int = 0, batches: int = 3,
    ends: bool = False,
) -> probe.Question:  # fmt: skip
    ended = [target for target in base.targets if ends]
    return probe.Question(
        asked=Probing(score=score, batches=batches), targets=probe.probed(base, ended), examples=examples, batch_size=4,
        seed=seed,
    )  # fmt: skip


def copied(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, model=copy.deepcopy(base.model))


def gradients(base: BaseModel, batches: Sequence[Sequence[Tokens]], *, mean: bool) -> list[dict[str, torch.Tensor]]:
    """Gradient of every module's weight as autograd has it, for each batch, of the mean or the summed NLL."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    found = []
    for examples in batches:
        model.zero_grad()
        count = sum(len(e.input_ids) - e.prompt_length for e in examples) if mean else 1
        for example in examples:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, example.prompt_length - 1 : -1]
            (functional.cross_entropy(logits, ids[0, example.prompt_length :], reduction="sum") / count).backward()
        found.append({t.name: model.get_submodule(t.name).weight.grad.clone() for t in base.targets})
    return found


def weights(base: BaseModel) -> dict[str, torch.Tensor]:
    return {target.name: base.model.get_submodule(target.name).weight for target in base.targets}


def means(per_batch: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in per_batch) / len(per_batch) for name in per_batch[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_sensitivity_are_autograds(kind: str, load: Make, make_examples: Make) -> None:
    base = load(kind)
    asked = question(base, make_examples(0))
    truth = gradients(base, asked.batches, mean=True)
    wanted = means([{name: float(g.square().mean().sqrt()) for name, g in one.items()} for one in truth])
    found = probe.measure(base, asked).scores
    assert len(found) == sum(target.layer is not None for target in base.targets)
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-4)
    w = weights(base)
    wanted = means([{name: float((g * w[name]).abs().mean()) for name, g in one.items()} for one in truth])
    found = probe.measure(base, question(base, make_examples(0), "sensitivity")).scores
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_of_single_examples(kind: str, load: Make, make_examples: Make) -> None:
    base = load(kind)
    asked = question(base, make_examples(1), "fisher")
    assert len(asked.batches) == 12
    assert {len(batch) for batch in asked.batches} == {1}
    truth = gradients(base, asked.batches, mean=False)
    wanted = means([{name: float(g.square().mean()) for name, g in one.items()} for one in truth])
    found = probe.measure(base, asked).scores
    assert found == pytest.approx({name: wanted[name] ** 0.5 for name in found}, rel=1e-4)


def test_the_ends_of_a_model_are_scored_where_they_are_placed(load: Make, make_examples: Make) -> None:
    base = load("gpt_neox")  # its embedding and head are two matrices
    asked = question(base, make_examples(0), ends=True)
    truth = gradients(base, asked.batches, mean=True)
    wanted = means([{name: float(g.square().mean().sqrt()) for name, g in one.items()} for one in truth])
    assert probe.measure(base, asked).scores == pytest.approx(wanted, rel=1e-4)
    assert len(wanted) == len(base.targets)


def test_tied_ends_are_scored_apart(load: Make, make_examples: Make) -> None:
    """An adapter on the head does nothing to the embedding, so neither does the head's gradient count there."""
    base, parted = load("llama"), copied(load("llama"))
    head = parted.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    assert weights(base)[base.targets[0].name] is weights(base)[base.targets[-1].name]
    assert weights(parted)[base.targets[0].name] is not weights(parted)[base.targets[-1].name]
    tied, apart = (probe.measure(one, question(one, make_examples(0), ends=True)).scores for one in (base, parted))
    assert tied == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_is_the_spectrum_of_the_inputs(kind: str, load: Make, make_examples: Make) -> None:
    base = load(kind)
    asked = question(base, make_examples(0), "activation", ends=True)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        base.model.get_submodule(target.name).register_forward_hook(
            lambda module, args, output, name=target.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for target in base.targets
        if target.layer is not None
    ]
    with torch.no_grad():
        for example in (example for batch in asked.batches for example in batch):
            base.model(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    scores = probe.measure(base, asked).scores
    for name, rows in seen.items():
        p = torch.linalg.eigvalsh(torch.cov(torch.cat(rows).double().t())).clamp_min(1e-30)
        p = p / p.sum()
        assert scores[name] == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-3), name


def test_activation_is_the_same_in_parts(load: Make, make_examples: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    base, asked = load("llama"), question(load("llama"), make_examples(0), "activation")
    whole = probe.measure(base, asked)
    monkeypatch.setattr(probe, "HELD", 1)
    parts = probe.measure(base, asked)
    assert parts.scores == whole.scores
    assert parts.flops == whole.flops * 12  # four inputs in each of three layers


def test_weight_is_the_spectrum_of_the_weight(load: Make, make_examples: Make) -> None:
    base = load("gpt2")
    found = probe.measure(base, question(base, make_examples(0), "weight"))
    assert found.flops == 0
    for name, score in found.scores.items():
        p = torch.linalg.svdvals(weights(base)[name].double())
        p = p / p.sum()
        assert score == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-5)


@pytest.mark.parametrize("score", ["gradient", "fisher", "activation"])
@pytest.mark.parametrize("ends", [False, True])
def test_flops_are_what_torch_counts(score: str, ends: bool, load: Make, make_examples: Make) -> None:
    base = copied(load("gpt_neox"))
    base.model.set_attn_implementation("eager")  # torch does not count the fused one on a CPU
    # the head is counted at every token: let all of them be targets
    examples = [dataclasses.replace(one, prompt_length=1) for one in make_examples(0, longest=24, shortest=24)]
    asked = question(base, examples, score, ends=ends)
    probe.measure(base, asked)  # the head is verified once, which is no part of it
    with FlopCounterMode(display=False) as counter:
        found = probe.measure(base, asked)
    if score == "activation":  # without its decompositions
        asked_without = [t for t in asked.targets if t.layer is not None]
        counter = FlopCounterMode(display=False)
        with counter, probe._hooked(base.model, {}, backward=False):
            for batch in asked.batches:
                probe._look(base, dataclasses.replace(asked, targets=asked_without), batch, {}, 1, last=True)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.05)  # the first token is no target


@pytest.mark.parametrize("score", ["gradient", "fisher", "sensitivity", "activation", "weight"])
def test_a_step_is_scored_the_same_however_it_is_cut(
    score: str, load: Make, make_examples: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gradients are kept for a part of the modules at a time; and a probe on disk serves all."""
    base = load("llama")
    whole = question(base, make_examples(0), score)
    wanted = probe.measure(base, whole)
    for batch_size, accumulation, held in ((2, 2, probe.HELD), (1, 4, 40_000)):
        monkeypatch.setattr(probe, "HELD", held)
        cut = dataclasses.replace(whole, batch_size=batch_size, accumulation=accumulation)
        assert cut.batches == whole.batches
        assert cut.key(base) == whole.key(base)
        assert probe.measure(base, cut).scores == pytest.approx(wanted.scores, rel=1e-4)


def test_the_base_is_left_as_it_was(load: Make, make_examples: Make) -> None:
    base = load("llama")
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    hooks = [dict(module._forward_hooks) for module in base.model.modules()]
    for score in ("gradient", "fisher", "sensitivity", "activation", "weight"):
        probe.measure(base, question(base, make_examples(0), score))
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert [dict(module._forward_hooks) for module in base.model.modules()] == hooks


@pytest.mark.parametrize("score", ["gradient", "fisher", "sensitivity", "activation"])
def test_a_seed_decides_the_batches_and_so_the_scores(score: str, load: Make, make_examples: Make) -> None:
    base = load("llama")
    one, again, other = (probe.measure(base, question(base, make_examples(0), score, seed=s)) for s in (0, 0, 1))
    assert one.scores == again.scores
    assert one.scores != other.scores


def test_a_module_with_a_larger_gradient_gets_more_rank(
    load: Make, make_examples: Make, place: Make, make_spec: Make
) -> None:
    base = copied(load("llama"))
    up = {target.layer: target for target in base.targets if target.role == "ff_up"}
    with torch.no_grad():  # what comes back to the entrance of the block comes through its exit
        base.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(20)
    scores = probe.measure(base, question(base, make_examples(0))).scores
    spec = make_spec(rank=8, allocation={"name": "importance"})
    ranks = methods.allocated(spec, place(base, "ff"), base.targets, scores)
    assert ranks[up[1]] > 2 * max(ranks[up[0]], ranks[up[2]])
    assert lora_parameters(ranks) == pytest.approx(lora_parameters(dict.fromkeys(ranks, 8)), rel=0.01)


@pytest.mark.parametrize("score", ["gradient", "fisher", "sensitivity", "activation", "weight"])
def test_in_bfloat16_scores_are_the_same_but_for_rounding(score: str, load: Make, make_examples: Make) -> None:
    base, low = load("llama"), copied(load("llama"))
    low.model.to(torch.bfloat16)
    exact, rounded = (probe.measure(one, question(one, make_examples(0), score)).scores for one in (base, low))
    assert rounded == pytest.approx(exact, rel=0.1)
    assert rounded != exact


def test_a_probe_is_kept_on_disk(
    load: Make, make_examples: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama")
    first = probe.find(base, question(base, make_examples(0)), tmp_path)
    monkeypatch.setattr(probe, "measure", lambda *_: pytest.fail("probed again"))
    assert probe.find(base, question(base, make_examples(0)), tmp_path) == first
    bounded = dataclasses.replace(question(base, make_examples(0)), asked=Probing(batches=3, least=2, most=9))
    assert probe.find(base, bounded, tmp_path) == first


def test_a_cache_that_cannot_be_written_is_done_without(load: Make, make_examples: Make, tmp_path: Path) -> None:
    base = load("llama")
    (tmp_path / "file").touch()
    asked = question(base, make_examples(0))
    assert probe.find(base, asked, tmp_path / "file" / "probes").scores == probe.measure(base, asked).scores


def test_scores_that_are_no_numbers_are_refused(load: Make, make_examples: Make) -> None:
    base = copied(load("llama"))
    base.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.fill_(float("inf"))
    with pytest.raises(ModelError, match="score=gradient is nowhere a number above 0"):
        probe.measure(base, question(base, make_examples(0)))


def trained(events: Sequence[Any]) -> list[Record]:
    found = [event.record for event in events if isinstance(event, RunFinished)]
    assert [record.status for record in found] == ["completed"] * len(found)
    return found


def test_runs_of_a_pack_train_with_the_ranks_of_one_probe(
    make_run: Callable[..., RunSpec], run_all: Make, tmp_path: Path
) -> None:
    section = {"name": "importance", "options": {"batches": 2}}
    specs = [make_run("full", rank=4), *(make_run("full", rank=4, allocation=section, seed=s) for s in (0, 1))]
    events = run_all(specs)
    plain, one, two = sorted(trained(events), key=lambda record: [s.run_id for s in specs].index(record.run_id))
    assert sum(isinstance(e, Stage) and "probing which modules matter on parity" in e.message for e in events) == 1
    assert one.modules == two.modules
    assert len({module.rank for module in one.modules}) > 2
    assert one.trainable_parameters == pytest.approx(plain.trainable_parameters, rel=0.01)
    assert all(module.score is not None and module.score > 0 for module in one.modules)
    assert all(module.score is None for module in plain.modules)
    assert one.efficiency.probe_seconds == two.efficiency.probe_seconds
    assert one.efficiency.probe_seconds is not None
    assert one.efficiency.probe_seconds > 0
    assert one.efficiency.probe_flops is not None
    assert one.efficiency.probe_flops > 0
    assert plain.efficiency.probe_seconds is None
    assert one.efficiency.pack_runs == 3
    again = read_record(tmp_path / "study" / one.run_id)
    assert again == one


def test_the_exported_adapter_is_the_trained_one(
    make_run: Callable[..., RunSpec], run_all: Make, load: Make, tmp_path: Path
) -> None:
    spec = make_run("full", rank=4, allocation={"name": "importance", "options": {"batches": 2}})
    (record,) = trained(run_all([spec]))
    folder = tmp_path / "study" / spec.run_id
    base = load("llama")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), folder / ADAPTER)
    for module in record.modules:
        assert loaded.base_model.model.get_submodule(module.name).r["default"] == module.rank
    nll = tokens = 0.0
    for example in tasks.encode(spec.dataset, base.tokenizer, model_key="x", cache=tmp_path / "tokens")[
        "test"
    ].examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = loaded(input_ids=ids, use_cache=False).logits[0, example.prompt_length - 1 : -1]
        nll += float(functional.cross_entropy(logits, ids[0, example.prompt_length :], reduction="sum"))
        tokens += len(example.input_ids) - example.prompt_length
    after = record.scores["test"]["after"].nll
    assert nll / tokens == pytest.approx(after, rel=1e-5)
    assert abs(after - record.scores["test"]["before"].nll) > 1e-3
    settings = Settings(study="study", output_root=str(tmp_path), device="cpu")
    (found,) = rescore.rescore(
        rescore.find([folder]), [], dataclasses.replace(spec.evaluation, splits=("test",)), settings
    )
    assert found.score.nll == pytest.approx(after, rel=1e-5)


def test_replicates_that_probe_on_their_own_seed_all_train(make_run: Callable[..., RunSpec], run_all: Make) -> None:
    """The second one's probe needs the bare base model, on which the first one's pack is when it is handed out."""
    section = {"name": "importance", "options": {"batches": 1, "seed": None}}
    specs = [make_run("full", rank=4, allocation=section, seed=seed) for seed in range(3)]
    found = trained(run_all(specs, max_pack=1))
    assert len(found) == 3
    assert len({tuple(module.score for module in record.modules) for record in found}) == 3


def test_a_run_goes_on_with_the_ranks_it_began_with(
    make_run: Callable[..., RunSpec], run_all: Make, tmp_path: Path
) -> None:
    spec = make_run("full", rank=4, allocation={"name": "importance"}, trainer={"max_steps": 6})
    run_all([spec], stop_after=3)
    resumed = run_all([spec])
    (record,) = trained(resumed)
    assert record.steps == 6
    (whole,) = trained(run_all([spec], "other"))
    assert whole.modules == record.modules
    assert whole.scores["test"]["after"].nll == pytest.approx(record.scores["test"]["after"].nll, rel=1e-5)
