"""Methods that train alone: the same loop, the same records, the same evaluation, and what each of them promises."""

import copy
import dataclasses
import gc
import json
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sweeper import methods, models, record, tasks
from sweeper.errors import SpecError
from sweeper.lora.trainee import UnpackedSpec, twin
from sweeper.lora.unpacked import UnpackedStore
from sweeper.models import BaseModel
from sweeper.placement.placement import Target
from sweeper.record import ADAPTER, WEIGHTS, Record
from sweeper.rescoring import rescore
from sweeper.spec import EvaluationSpec, ModelSpec, RunSpec, Settings
from sweeper.training import calibrate, checkpoint
from sweeper.training.events import Event, RunFinished, RunStarted, Step
from sweeper.training.generate import generate
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.score import score

pytestmark = [
    # PEFT still asks transformers by a name that is about to go
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    # ranks by singular value are no ranks by module, which is what PEFT takes them for when it looks for mistakes
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported.*:UserWarning"),
]
CPU = torch.device("cpu")


def has(package: str) -> bool:
    from sweeper.tasks.package import is_installed

    return is_installed(package)


NEEDS_BITSANDBYTES = pytest.mark.skipif(not has("bitsandbytes"), reason="bitsandbytes is not installed")
PROMPT = {"tuner": "prompt_tuning", "arguments": {"num_virtual_tokens": 5}}
PREFIX = {"tuner": "prefix_tuning", "arguments": {"num_virtual_tokens": 5}}


def matrices(targets: list[Target], rank: int, base: BaseModel) -> int:
    return sum(t.in_features * t.out_features for t in targets)


def everything(targets: list[Target], rank: int, base: BaseModel) -> int:
    return models.total_parameters(base.model)


def biases(targets: list[Target], rank: int, base: BaseModel) -> int:
    return sum(t.out_features for t in targets)


def low_rank(targets: list[Target], rank: int, base: BaseModel) -> int:
    return sum(rank * (t.in_features + t.out_features) for t in targets)


def singular_triplets(targets: list[Target], rank: int, base: BaseModel) -> int:
    first = math.ceil(1.5 * rank)
    return sum(first * (t.in_features + t.out_features + 1) for t in targets)


def with_magnitudes(targets: list[Target], rank: int, base: BaseModel) -> int:
    return low_rank(targets, rank, base) + sum(t.out_features for t in targets)


def scaled(targets: list[Target], rank: int, base: BaseModel) -> int:
    """(IA)3 scales what a feed-forward output takes in, and what other modules give out."""
    return sum(t.in_features if t.role == "ff_down" else t.out_features for t in targets)


def prompt(targets: list[Target], rank: int, base: BaseModel) -> int:
    return 5 * base.model.config.hidden_size


def prefix(targets: list[Target], rank: int, base: BaseModel) -> int:
    config = base.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 5 * 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)


# method, its learning rate, its trainable parameters, whether it begins as the base model
CASES: dict[str, tuple[dict[str, Any], float, Callable[..., int], bool]] = {
    "full_ft": ({"name": "full_ft"}, 3e-3, everything, True),
    "full_ft placed": ({"name": "full_ft", "options": {"modules": "placed"}}, 3e-3, matrices, True),
    "bitfit": ({"name": "bitfit"}, 5e-2, biases, True),
    "adalora": ({"name": "adalora"}, 2e-2, singular_triplets, True),
    "dora": ({"name": "dora", "dropout": 0.1}, 1e-2, with_magnitudes, True),
    "qlora": ({"name": "qlora"}, 1e-2, low_rank, True),
    "peft ia3": ({"name": "peft", "options": {"tuner": "ia3"}}, 5e-2, scaled, True),
    "peft prompt": ({"name": "peft", "options": PROMPT}, 0.3, prompt, False),
    "peft prefix": ({"name": "peft", "options": PREFIX}, 0.3, prefix, False),
}
PARAMETERS = [pytest.param(*case, id=name, marks=NEEDS_BITSANDBYTES if name == "qlora" else ())
              for name, case in CASES.items()]  # fmt: skip
KINDS = ["llama", "gpt2"]


def widened(spec: ModelSpec) -> ModelSpec:
    """A model of twice the width: on some processors bitsandbytes fails on rows of fewer than 64."""
    widths = ("hidden_size", "intermediate_size", "n_embd", "ffn_dim", "word_embed_proj_dim")
    return dataclasses.replace(
        spec, config={key: 2 * value if key in widths else value for key, value in spec.config.items()}
    )


@pytest.fixture
def make_alone(make_run: Any, tiny_spec: Any) -> Callable[..., RunSpec]:
    """A run of a few steps of a method that trains alone."""

    def make(
        method: Mapping[str, Any], lr: float = 1e-2, *, kind: str = "llama", wide: bool = False, **changes: Any
    ) -> RunSpec:
        model = dataclasses.asdict(widened(tiny_spec(kind)) if wide or method["name"] == "qlora" else tiny_spec(kind))
        trainer = {"max_steps": 12, "batch_size": 4} | changes.pop("trainer", {})
        placement = changes.pop("placement", "full")
        run: RunSpec = make_run(
            placement, model=model, method=dict(method), optim={"lr": lr}, trainer=trainer, **changes
        )
        return run

    return make


@pytest.fixture
def base_of() -> Callable[[RunSpec], BaseModel]:
    """A run's base model, loaded for the test alone."""
    return lambda spec: methods.load_base(
        spec, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.trainer.precision], device=CPU
    )


def prepared(spec: RunSpec, base: BaseModel, place: Any) -> UnpackedSpec:
    from sweeper.models import budget

    targets = place(base, spec.placement.name)
    found = methods.placed(spec.method, targets, base.targets, tied=models.is_tied(base.model))
    adapter = methods.adapter(spec, budget.uniform(found, spec.rank))
    assert isinstance(adapter, UnpackedSpec)
    return adapter


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 51).view(3, 16)).logits
    return found


def finished(folder: Path, spec: RunSpec) -> Record:
    done = record.read_record(folder / spec.run_id)
    assert done.status == "completed", done.error
    return done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "lr", "formula", "identity"), PARAMETERS)
def test_a_method_trains_and_is_what_it_says(
    method: Any, lr: float, formula: Any, identity: bool, kind: str, make_alone: Any, base_of: Any, run_all: Any,
    place: Any, tmp_path: Path,
) -> None:  # fmt: skip
    spec = make_alone(method, lr, kind=kind, trainer={"max_steps": 30})
    base = base_of(spec)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with Pack(base, prepared(spec, base, place), PackConfig(batch_size=4)) as pack:
        pack.store.assign(0, pack.store.spec)  # type: ignore[attr-defined]
        ids = torch.arange(3, 51).view(3, 16)
        found = []
        for slots in ([-1], [0]):
            pack.use_lanes(slots)
            pack.model.eval()
            with torch.no_grad():
                found.append(pack.head.logits(pack.hidden(ids, torch.full((len(ids),), ids.shape[1]))))
        fresh = (found[0] - found[1]).abs().max()
        assert (fresh < 1e-5) == identity
        torch.testing.assert_close(found[0], logits(base.model), rtol=1e-5, atol=1e-5)

    run_all([spec])
    done = finished(tmp_path / "study", spec)
    assert done.scores["validation"]["after"].nll < done.scores["validation"]["before"].nll
    assert done.steps == 30
    placed = [t for t in base.targets if t.name in {target.name for target in place(base, "full")}]
    assert done.trainable_parameters == formula(placed, spec.rank, base)
    assert done.total_parameters == models.total_parameters(base.model)
    if formula not in (everything, prompt, prefix):
        assert sum(module.parameters for module in done.modules) == done.trainable_parameters
        assert {module.name for module in done.modules} == {target.name for target in placed}
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "lr", "formula", "identity"), PARAMETERS)
def test_what_is_saved_gives_the_same_logits_elsewhere(
    method: Any, lr: float, formula: Any, identity: bool, kind: str, make_alone: Any, base_of: Any, run_all: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Stock PEFT or plain transformers around the saved files score the test split as the record says."""
    spec = make_alone(method, lr, kind=kind)
    run_all([spec])
    folder, done = tmp_path / "study" / spec.run_id, finished(tmp_path / "study", spec)
    base = base_of(spec)
    plain = logits(base.model)
    if (folder / WEIGHTS).exists():
        model = base.model
        methods.weights.load_weights(model, folder / WEIGHTS)
        assert not (folder / ADAPTER).exists()
    else:
        model = PeftModel.from_pretrained(base.model, folder / ADAPTER)
        assert json.loads((folder / ADAPTER / "adapter_config.json").read_text())["base_model_name_or_path"] == kind
    assert not torch.allclose(logits(model)[:, -16:], plain, atol=1e-3)
    splits = tasks.encode(spec.dataset, base.tokenizer, model_key="x", cache=None)
    total = tokens = 0.0
    for example in splits["test"].examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        first = example.prompt_length
        total += float(torch.nn.functional.cross_entropy(states[first - 1 : -1], ids[0, first:], reduction="sum"))
        tokens += ids.shape[1] - first
    assert done.scores["test"]["after"].nll == pytest.approx(total / tokens, abs=1e-4)


@pytest.mark.parametrize(("method", "lr", "formula", "identity"), PARAMETERS)
def test_a_saved_run_is_scored_again_as_it_was(
    method: Any, lr: float, formula: Any, identity: bool, make_alone: Any, run_all: Any, tmp_path: Path
) -> None:
    spec = make_alone(method, lr)
    run_all([spec])
    done = finished(tmp_path / "study", spec)
    settings = Settings(study="study", output_root=str(tmp_path), device="cpu")
    (found,) = rescore.rescore(
        rescore.find([settings.folder]), [], EvaluationSpec(name="e", splits=("test",)), settings
    )
    assert found.score.nll == pytest.approx(done.scores["test"]["after"].nll, rel=1e-5)
    assert found.base.nll == pytest.approx(done.scores["test"]["before"].nll, rel=1e-5)


def stepwise(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(("method", "lr", "formula", "identity"), PARAMETERS)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    method: Any, lr: float, formula: Any, identity: bool, make_alone: Any, run_all: Any, tmp_path: Path
) -> None:
    dropout = {"dropout": 0.2} if formula in (with_magnitudes, low_rank, singular_triplets) else {}
    spec = make_alone(method | dropout, lr)
    run_all([spec], "undisturbed")
    first = run_all([spec], "stopped", stop_after=7)
    folder = tmp_path / "stopped" / spec.run_id
    assert [path.name for path in folder.iterdir()] == [checkpoint.CHECKPOINT]
    second = run_all([spec], "stopped")
    assert [e.step for e in (*first, *second) if isinstance(e, Step)] == list(range(1, 13))
    one, two = tmp_path / "undisturbed" / spec.run_id, folder
    assert stepwise(one) == stepwise(two)
    assert (one / "predictions.jsonl").read_bytes() == (two / "predictions.jsonl").read_bytes()
    saved = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert len(saved) == 1
    assert (one / saved[0]).read_bytes() == (two / saved[0]).read_bytes()
    a, b = (record.read_record(path) for path in (one, two))
    assert (a.scores, a.modules) == (b.scores, b.modules)


@pytest.mark.parametrize(
    "method",
    [{"name": "full_ft"}, {"name": "bitfit"}, {"name": "peft", "options": {"tuner": "ia3"}},
     pytest.param({"name": "qlora"}, marks=NEEDS_BITSANDBYTES)],
    ids=lambda method: method["name"],
)  # fmt: skip
def test_a_base_in_bfloat16_trains_float32_values(
    method: Any, make_alone: Any, run_all: Any, base_of: Any, tmp_path: Path
) -> None:
    """Steps of 1e-4 of a weight vanish in bfloat16 unless a float32 value adds them up."""
    spec = make_alone(method, 1e-2, trainer={"precision": "bfloat16"})
    run_all([spec])
    done = finished(tmp_path / "study", spec)
    assert done.scores["validation"]["after"].nll < done.scores["validation"]["before"].nll
    settings = Settings(study="study", output_root=str(tmp_path), device="cpu")
    (found,) = rescore.rescore(
        rescore.find([settings.folder]), [], EvaluationSpec(name="e", splits=("test",)), settings
    )
    assert found.score.nll == pytest.approx(done.scores["test"]["after"].nll, rel=1e-6)


def test_small_steps_add_up_under_a_bfloat16_base(load: Any, make_alone: Any, base_of: Any, place: Any) -> None:
    spec = make_alone({"name": "full_ft"}, trainer={"precision": "bfloat16"})
    base = base_of(spec)
    with Pack(base, prepared(spec, base, place), PackConfig(batch_size=4)) as pack:
        store = pack.store
        assert isinstance(store, UnpackedStore)
        store.assign(0, store.spec)
        name, parameter = max(store.trained.items(), key=lambda item: item[1].numel())
        start = parameter.detach().float()
        for _ in range(100):
            store.params += 1e-5
            store.publish(0)
        moved = parameter.detach().float() - start
        assert parameter.dtype == torch.bfloat16
        assert float(moved.mean()) == pytest.approx(1e-3, rel=0.05), name


def test_what_trains_alone_follows_the_packs_one_by_one(make_alone: Any, make_run: Any, run_all: Any) -> None:
    """Ordinary runs share a pack, the others wait for one another; nobody's result depends on who else there is."""
    packed = [make_run("attn"), make_run("ff")]
    alone = [make_alone({"name": "full_ft"}, 1e-3, seed=seed) for seed in (0, 1)] + [make_alone({"name": "bitfit"})]
    events = run_all([packed[0], alone[0], packed[1], alone[1], alone[2]])
    ids = {spec.run_id for spec in alone}
    running: set[str] = set()
    together = []
    for event in events:
        if isinstance(event, RunStarted):
            running.add(event.run_id)
        elif isinstance(event, RunFinished):
            running.discard(event.record.run_id)
            assert event.record.status == "completed"
        together.append(frozenset(running))
    assert frozenset(spec.run_id for spec in packed) in together
    assert all(len(group) <= 1 for group in together if group & ids)
    after = {e.record.run_id: e.record.scores["test"]["after"].nll for e in events if isinstance(e, RunFinished)}
    by_itself = run_all([alone[1]], "alone")
    (single,) = (e.record.scores["test"]["after"].nll for e in by_itself if isinstance(e, RunFinished))
    assert single == after[alone[1].run_id]  # it was given a model that another run had trained


def outcomes(events: list[Event]) -> dict[str, str]:
    return {e.record.run_id: e.record.status for e in events if isinstance(e, RunFinished)}


def test_divergence_and_a_full_device_end_one_run_only(
    make_alone: Any, run_all: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = make_alone({"name": "full_ft"}, 1e30, kind="opt")
    large, good = make_alone({"name": "bitfit"}), make_alone({"name": "adalora"})
    step = Pack.step

    def full(pack: Pack) -> None:
        if pack.active[0][1].run_id == large.run_id and pack.active[0][1].done == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(pack)

    monkeypatch.setattr(Pack, "step", full)
    assert outcomes(run_all([wild, large, good])) == {
        wild.run_id: "diverged", large.run_id: "failed", good.run_id: "completed",
    }  # fmt: skip


def test_what_peft_refuses_fails_with_its_words(make_alone: Any, run_all: Any) -> None:
    bad = make_alone({"name": "peft", "options": {"tuner": "c3a", "arguments": {"block_size": 7}}})
    strange = make_alone({"name": "peft", "options": {"tuner": "c3a", "arguments": {"blocksize": 16}}})
    events = run_all([bad, strange, make_alone({"name": "bitfit"})])
    errors = {e.record.run_id: e.record.error for e in events if isinstance(e, RunFinished)}
    assert "The block size should be a factor" in errors[bad.run_id]["message"]
    assert errors[strange.run_id]["message"].startswith("method.options.arguments: ")
    assert list(errors.values()).count(None) == 1


@NEEDS_BITSANDBYTES
def test_the_solo_cost_says_which_method_needs_most(
    make_alone: Any, make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    specs = {name: make_alone({"name": name}, wide=True) for name in ("lora", "qlora", "full_ft", "bitfit")}
    run_all(list(specs.values()), calibrate=True)
    cost = {name: finished(tmp_path / "study", spec).efficiency for name, spec in specs.items()}
    memory = {name: one.peak_memory_solo_bytes for name, one in cost.items()}
    assert memory["full_ft"] > memory["lora"] > memory["qlora"]
    assert memory["full_ft"] > memory["bitfit"]
    assert all(one.train_seconds_solo and one.train_seconds_solo > 0 for one in cost.values())
    assert cost["full_ft"].train_flops > cost["lora"].train_flops > cost["bitfit"].train_flops
    total = finished(tmp_path / "study", specs["full_ft"]).total_parameters
    assert memory["full_ft"] > 16 * total  # value, gradient and two moments
    assert memory["qlora"] < 4 * total + memory["lora"]


def test_solo_memory_of_full_fine_tuning_counts_each_weight_once(
    make_alone: Any, base_of: Any, place: Any, make_job: Any, make_examples: Any
) -> None:
    for precision, each in (("float32", 16), ("bfloat16", 18)):  # in bfloat16 there is a working copy besides
        spec = make_alone({"name": "full_ft"}, trainer={"precision": precision})
        base = base_of(spec)
        job = make_job("x", prepared(spec, base, place), make_examples(0))
        found = calibrate._measure(base, job, PackConfig(batch_size=4))
        assert found.peak_memory_bytes - found.activation_bytes == each * models.total_parameters(base.model)


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=lambda options: options["tuner"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_virtual_tokens_is_peft_s_own(
    method: Any, kind: str, make_alone: Any, base_of: Any, place: Any
) -> None:
    spec = make_alone({"name": "peft", "options": method}, kind=kind)
    base = base_of(spec)
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 6)]
    with Pack(base, prepared(spec, base, place), PackConfig(batch_size=4)) as pack:
        store = pack.store
        assert isinstance(store, UnpackedStore)
        store.assign(0, store.spec)
        store.params.normal_(generator=torch.Generator().manual_seed(0))
        ours = generate(pack, [0], prompts, max_new_tokens=8, stop_ids=[1], rows=3)[0]
        plain = generate(pack, [-1], prompts, max_new_tokens=8, stop_ids=[1], rows=3)[0]
        for written, text in zip(ours, prompts, strict=True):
            ids = torch.tensor([text])
            theirs = store.trainee.peft.eval().generate(  # type: ignore[attr-defined]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True,
                eos_token_id=1, pad_token_id=0,
            )[0, -8:].tolist()  # fmt: skip
            assert list(written.ids) == (theirs[: theirs.index(1)] if 1 in theirs else theirs)[: len(written.ids)]
            assert len(written.ids) == 8 or 1 in theirs
    assert ours != plain or kind == "llama"  # whose tied ends repeat the last token whatever stands before


def test_a_twin_shares_weights_and_nothing_else(load: Any) -> None:
    base = load("llama").model
    other = twin(base)
    assert all(
        a.data_ptr() == b.data_ptr() and a is not b for a, b in zip(base.parameters(), other.parameters(), strict=True)
    )
    assert models.is_tied(other)
    names = [name for name, _ in base.named_modules()]
    other.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert [name for name, _ in base.named_modules()] == names
    assert isinstance(base.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    for parameter in other.parameters():
        parameter.requires_grad_()
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_a_step_without_a_finite_gradient_moves_nothing(
    make_alone: Any, base_of: Any, place: Any, make_job: Any, make_examples: Any
) -> None:
    spec = make_alone({"name": "full_ft"})
    base = base_of(spec)
    job = make_job("x", prepared(spec, base, place), make_examples(0), weight_decay=0.1)
    with Pack(base, job.adapter, PackConfig(batch_size=4)) as pack:
        pack.add(job)
        for _ in range(2):
            pack.step()
        before = pack.snapshot(0)
        pack.store.grads[0] = math.inf
        pack.step()
        after = pack.snapshot(0)
        pack.step()
        assert any(not torch.equal(pack.snapshot(0)[name][0], after[name][0]) for name in after)
    assert all(torch.equal(u, v) for name in before for u, v in zip(before[name], after[name], strict=True))


def test_weight_decay_spares_biases(
    make_alone: Any, base_of: Any, place: Any, make_job: Any, make_examples: Any
) -> None:
    spec = make_alone({"name": "bitfit"})
    base, ends = base_of(spec), []
    for decay in (0.0, 0.5):
        job = make_job("x", prepared(spec, base, place), make_examples(0), weight_decay=decay)
        with Pack(base, job.adapter, PackConfig(batch_size=4)) as pack:
            pack.add(job)
            for _ in range(3):
                pack.step()
            ends.append(pack.store.params.clone())
    assert torch.equal(*ends)
    assert ends[0].any()


def test_scores_of_several_lanes_are_those_of_each(
    make_alone: Any, base_of: Any, place: Any, make_examples: Any
) -> None:
    from sweeper.training.evaluate import evaluate_examples

    spec = make_alone({"name": "bitfit"})
    base = base_of(spec)
    with Pack(base, prepared(spec, base, place), PackConfig(batch_size=4)) as pack:
        pack.store.assign(0, pack.store.spec)  # type: ignore[attr-defined]
        pack.store.params.fill_(0.1)
        both = evaluate_examples(pack, [-1, 0], make_examples(1), None)
        assert [one.rows for one in both] == [
            evaluate_examples(pack, [slot], make_examples(1), None)[0].rows for slot in (-1, 0)
        ]
        assert both[0].score.nll != both[1].score.nll
        (few,), (many,) = (score(pack, [-1], make_examples(1), budget=budget) for budget in (512, 4096))
        assert [one.nll for one in few] == pytest.approx([one.nll for one in many], rel=1e-6)


def test_saving_nothing_leaves_no_weights(make_alone: Any, run_all: Any, tmp_path: Path) -> None:
    spec = make_alone({"name": "full_ft", "options": {"save": False}}, 1e-3)
    run_all([spec])
    assert finished(tmp_path / "study", spec).efficiency.adapter_bytes == 0
    assert not list((tmp_path / "study").rglob("*.safetensors"))


def test_reference_models_are_untouched(load: Any) -> None:
    """The shared tiny models of this suite are still what their seed makes them."""
    for kind in KINDS:
        again = models.load(load(kind).spec, dtype=torch.float32, device=CPU)
        for name, value in copy.copy(again.model.state_dict()).items():
            assert torch.equal(value, load(kind).model.state_dict()[name]), name


def trained_with(make_alone: Any, run_all: Any, tmp_path: Path, method: Any, **changes: Any) -> Record:
    spec = make_alone(method, 1e-2, **changes)
    run_all([spec])
    return finished(tmp_path / "study", spec)


@pytest.mark.parametrize("name", ["full_ft", "bitfit"])
def test_an_average_of_the_weights_is_scored_and_saved(
    name: str, make_alone: Any, run_all: Any, base_of: Any, place: Any, make_job: Any, make_examples: Any
) -> None:
    """The average is what following the weights step by step gives; it survives a stop."""
    spec = make_alone({"name": name}, trainer={"ema_decay": 0.9})
    base = base_of(spec)
    job = make_job("x", prepared(spec, base, place), make_examples(0))
    with Pack(base, job.adapter, PackConfig(batch_size=4)) as pack:
        pack.add(job)
        store = pack.store
        wanted = store.params.clone()
        for step in range(1, 5):
            pack.step()
            wanted.lerp_(store.params, 1 - min(0.9, (1 + step) / (10 + step)))
        own = store.params.clone()
        average = pack.snapshot(0)
        with store.averaged():
            torch.testing.assert_close(store.params, wanted)
        assert torch.equal(store.params, own)
        assert not torch.allclose(own, wanted)
    job.weights, job.done = average, 4
    with Pack(base, job.adapter, PackConfig(batch_size=4)) as pack:
        pack.add(job)
        with pack.store.averaged():
            torch.testing.assert_close(pack.store.params, wanted)  # type: ignore[attr-defined]


def test_a_pack_that_is_dropped_gives_its_memory_back_at_once(make_alone: Any, base_of: Any, place: Any) -> None:
    spec = make_alone({"name": "full_ft"})
    base = base_of(spec)
    with Pack(base, prepared(spec, base, place), PackConfig(batch_size=4)) as pack:
        values = weakref.ref(pack.store.grads)
    gc.disable()
    try:
        del pack
        assert values() is None
    finally:
        gc.enable()


def test_a_run_alone_can_end_early_with_its_best_weights(make_alone: Any, run_all: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trainer": {"max_steps": 40, "patience": 2}, "evaluation": {"every_steps": 4}}
    spec = make_alone({"name": "full_ft"}, 0.1, **options)
    run_all([spec])
    done = finished(tmp_path / "study", spec)
    rows = [json.loads(s) for s in (tmp_path / "study" / spec.run_id / "metrics.jsonl").read_text().splitlines()]
    midway = {row["step"]: row["nll"] for row in rows if str(row.get("moment", "")).isdigit()}
    best = min(midway, key=lambda step: midway[step])
    assert done.saved["step"] == best
    assert done.saved["stopped_early"] == (done.steps < 40)
    assert best < done.steps
    assert done.scores["validation"]["after"].nll == pytest.approx(midway[best], rel=1e-6)


def test_noise_on_the_embedding_changes_training_alone(make_alone: Any, run_all: Any, tmp_path: Path) -> None:
    for method in ({"name": "full_ft"}, {"name": "adalora"}):
        plain = trained_with(make_alone, run_all, tmp_path, method)
        noisy = trained_with(make_alone, run_all, tmp_path, method, trainer={"neftune_alpha": 5.0})
        assert noisy.scores["test"]["before"] == plain.scores["test"]["before"]
        assert noisy.scores["test"]["after"].nll != plain.scores["test"]["after"].nll


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "full_ft", "options": {"modules": "some"}}}, "method.options.modules=some: choose all"),
        ({"method": {"name": "full_ft", "rank_stabilised": True}}, "method=full_ft has no alpha / rank to stabilise"),
        ({"method": {"name": "full_ft", "dropout": 0.1}}, "method.dropout=0.1: method=full_ft has no adapter"),
        ({"method": {"name": "bitfit"}, "optim": {"norm_penalty": 1.0}}, "optim.norm_penalty is for the A and B"),
        ({"method": {"name": "qlora"}, "optim": {"lr_ratio": 4.0}}, "optim.lr_ratio is for the A and B"),
        ({"method": {"name": "bitfit"}, "allocation": {"name": "matched"}}, "allocation=matched spreads rank"),
        ({"method": {"name": "adalora", "options": {"tinit": 9, "tfinal": 3}}}, "tinit=9 and tfinal=3 leave none"),
        ({"method": {"name": "adalora", "options": {"delta_t": 0}}}, "method.options.delta_t must be a whole number"),
        (
            {"method": {"name": "peft", "options": PREFIX}, "trainer": {"activation_checkpointing": True}},
            "trainer.activation_checkpointing=true: method.options.tuner=PREFIX_TUNING",
        ),
        ({"method": {"name": "adalora", "options": {"tinit": 0, "tfinal": 11}}}, "tinit=0 and tfinal=11 leave none"),
        ({"method": {"name": "adalora"}, "trainer": {"max_steps": 1}}, "trainer.max_steps must be at least 2"),
        ({"method": {"name": "adalora"}, "trainer": {"ema_decay": 0.9}}, "trainer.ema_decay: "),
        ({"method": {"name": "adalora"}, "allocation": {"name": "matched"}}, "allocation=matched: method=adalora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_method_cannot_do_is_said_before(changes: dict[str, Any], message: str, make_run: Any) -> None:
    base = {"trainer": {"max_steps": 12}}
    spec = make_run("full", **{key: base.get(key, {}) | value for key, value in ({**base, **changes}).items()})
    with pytest.raises(SpecError) as caught:
        methods.check(spec)
    assert message in str(caught.value)


def test_the_shortest_adalora_spreads_its_ranks(make_alone: Any, run_all: Any, tmp_path: Path) -> None:
    done = trained_with(make_alone, run_all, tmp_path, {"name": "adalora"}, trainer={"max_steps": 2})
    assert done.status == "completed"
    ranks = [module.rank for module in done.modules]
    assert sum(ranks) == done.spec["rank"] * len(ranks)


def test_qlora_says_what_to_install(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeper.methods import qlora

    monkeypatch.setattr(qlora, "is_installed", lambda name: False)
    with pytest.raises(SpecError, match=r"method=qlora needs the Python package bitsandbytes: make qlora$"):
        methods.check(make_run("full", method={"name": "qlora"}))


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("kind", [*KINDS, "gpt_neox", "opt"])
def test_a_quantised_base_is_the_loaded_one_in_four_bits(kind: str, make_alone: Any, base_of: Any) -> None:
    """Only the blocks' linear modules change, by the rounding of 4 bits and no more; memory falls, the count stays."""
    spec = make_alone({"name": "qlora"}, kind=kind)
    base, full = base_of(spec), models.load(spec.model, dtype=torch.float32, device=CPU)
    inside = {target.name for target in full.targets if target.layer is not None}
    for name, value in full.model.named_parameters():
        if name.rpartition(".")[0] in inside and name.endswith("weight"):
            quantised = base.model.get_parameter(name)
            assert quantised.dtype == torch.uint8
            import bitsandbytes

            back = bitsandbytes.functional.dequantize_4bit(quantised, quantised.quant_state)
            kinds = {target.name: target.kind for target in full.targets}
            back = back.t() if kinds[name.rpartition(".")[0]] == "conv1d" else back
            error = (back - value).abs().max()
            assert 0 < error < 0.2 * value.abs().max()
            assert quantised.quant_state.nested  # double quantisation
        else:
            assert torch.equal(base.model.get_parameter(name), value), name
    assert models.total_parameters(base.model) == models.total_parameters(full.model)
    assert models.held_bytes(base.model) < models.held_bytes(full.model)
    assert not torch.allclose(logits(base.model), logits(full.model), atol=1e-6)
    torch.testing.assert_close(logits(base.model), logits(full.model), rtol=0, atol=0.5)


@NEEDS_BITSANDBYTES
def test_a_matrix_that_is_read_back_wrongly_is_no_base(make_alone: Any, base_of: Any, monkeypatch: Any) -> None:
    import bitsandbytes

    stock = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *given: stock(*given).roll(1))
    with pytest.raises(SpecError, match=r"reads model.layers.0.self_attn.q_proj \(64 -> 64\) back wrongly on cpu"):
        base_of(make_alone({"name": "qlora"}))


@NEEDS_BITSANDBYTES
def test_a_quantised_and_a_full_base_follow_one_another(make_alone: Any, run_all: Any, tmp_path: Path) -> None:
    specs = [make_alone({"name": name}, seed=seed, wide=True) for seed in (0, 1) for name in ("qlora", "lora")]
    run_all(specs)
    before = [finished(tmp_path / "study", spec).scores["test"]["before"].nll for spec in specs]
    assert before[0] == before[2] != before[1] == before[3]


def test_one_search_tunes_what_packs_and_what_does_not(
    make_alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each arm has its range and its trials; the packed arm's train together."""
    from sweeper.arms import Arm, Dimension
    from sweeper.study.scheduler import Scheduler
    from sweeper.study.search_settings import SearchSettings
    from sweeper.training import train_runs

    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))

    def arm(name: str, low: float, high: float) -> Arm:
        spec = make_alone({"name": name}, (low * high) ** 0.5, trainer={"max_steps": 4})

        def make(params: Mapping[str, Any], seed: int) -> RunSpec:
            lr = dataclasses.replace(spec.optim, lr=params["optim.lr"])
            return dataclasses.replace(spec, optim=lr, seed=seed)

        space = (Dimension(key="optim.lr", kind="float", low=low, high=high, log=True),)
        return Arm(defaults=(spec,), space=space, make=make)

    settings = Settings(study="s", output_root=str(tmp_path), device="cpu", calibrate=False)
    arms = [arm("lora", 1e-4, 1e-2), arm("full_ft", 1e-5, 1e-3), arm("bitfit", 1e-3, 1e-1)]
    work = Scheduler(arms, [], settings, SearchSettings(n_trials=4, parallel=2))
    running: set[str] = set()
    most: dict[str, int] = {}

    def watch(event: Event) -> None:
        if isinstance(event, RunStarted):
            running.add(event.run_id)
            name = work.running[event.run_id].spec.method.name
            most[name] = max(most.get(name, 0), len(running))
        elif isinstance(event, RunFinished):
            running.discard(event.record.run_id)

    work.observers = [watch]
    train_runs(work, settings)
    work.close()
    assert most == {"lora": 2, "full_ft": 1, "bitfit": 1}
    rates: dict[str, list[float]] = {}
    for done in work.records.values():
        assert done.status == "completed"
        rates.setdefault(done.spec["method"]["name"], []).append(done.spec["optim"]["lr"])
    for one in arms:
        own = rates[one.default.method.name]
        assert len(own) == 4
        assert all(one.space[0].low <= lr <= one.space[0].high for lr in own)


@pytest.mark.parametrize("name", ["full_ft", "bitfit", "adalora"])
def test_others_are_given_the_runs_own_model(
    name: str, make_alone: Any, run_all: Any, base_of: Any, tmp_path: Path
) -> None:
    """What lm-eval scores: a plain model with the run's weights or stock PEFT, around a base that stays as it is."""
    spec = make_alone({"name": name}, 1e-2)
    run_all([spec])
    (run,) = rescore.find([tmp_path / "study"])
    base = base_of(spec)
    plain = logits(base.model)
    model = rescore.adapted_model(base, run)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert torch.equal(logits(base.model), plain)
    assert 3 < model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape[1] <= 6


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("name", ["full_ft", "bitfit", "adalora", "qlora"])
def test_recomputed_activations_change_nothing(name: str, make_alone: Any, run_all: Any, tmp_path: Path) -> None:
    plain = trained_with(make_alone, run_all, tmp_path, {"name": name})
    again = trained_with(make_alone, run_all, tmp_path, {"name": name}, trainer={"activation_checkpointing": True})
    assert again.scores["test"]["after"].nll == pytest.approx(plain.scores["test"]["after"].nll, rel=1e-6)


@NEEDS_BITSANDBYTES
def test_the_planned_memory_is_that_of_the_method(make_alone: Any, base_of: Any, tmp_path: Path) -> None:
    """What a dry run says of the base and of what trains, against what is really held."""
    from sweeper.study import forecast

    settings = Settings(study="s", output_root=str(tmp_path), device="cpu")
    names = ("lora", "full_ft", "qlora")
    found = forecast.costs([make_alone({"name": name}, wide=True) for name in names], settings)
    costs = dict(zip(names, found, strict=True))
    total = costs["lora"].total_parameters
    assert costs["full_ft"].parameters == total
    assert costs["full_ft"].base_memory == 0  # every weight is one of the values that train
    assert costs["lora"].base_memory == 4 * total
    held = models.held_bytes(base_of(make_alone({"name": "qlora"})).model)
    # each matrix keeps two small tables besides, which only matter where matrices are tiny
    assert costs["qlora"].base_memory < held < costs["qlora"].base_memory + 21 * (16 + 256 + 4) * 4
    assert costs["full_ft"].flops > 1.2 * costs["lora"].flops
