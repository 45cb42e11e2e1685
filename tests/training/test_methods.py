"""Every method that packs: what trains, where it starts, what it leaves, and that the pack makes no difference."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model

from sweeper import methods
from sweeper.errors import SpecError
from sweeper.models import BaseModel
from sweeper.record import ADAPTER
from sweeper.spec import RunSpec
from sweeper.tasks import Encoded
from sweeper.training.export import write_adapter
from sweeper.training.generate import generate
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState
from sweeper.training.score import score

from .test_trainer import OPTIM, STEPS
from .trainer import trainer_run

pytestmark = [
    # PEFT still asks transformers by a name that is about to go
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rank_stabilised": True},
    "lora_plus": {"options": {"ratio": 4.0}},
    "lora_fa": {},
    "dora": {},
    "pissa": {},
    "olora": {},
    "vera": {"options": {"d_initial": 0.5, "projection_key": 7}},
    "relora": {"options": {"restarts": 2, "warmup_steps": 1, "prune": 0.9}},
    "sparse": {"options": {"sparsity": 0.75}},
}
# how many trainable values a module has at rank 4, as the papers count them
COUNTS: dict[str, Callable[[int, int], int]] = {
    "lora": lambda i, o: 4 * (i + o),
    "rslora": lambda i, o: 4 * (i + o),
    "lora_plus": lambda i, o: 4 * (i + o),
    "lora_fa": lambda i, o: 4 * o,
    "dora": lambda i, o: 4 * (i + o) + o,
    "pissa": lambda i, o: 4 * (i + o),
    "olora": lambda i, o: 4 * (i + o),
    "vera": lambda i, o: 4 + o,
    "relora": lambda i, o: 4 * (i + o),
    "sparse": lambda i, o: 4 * (round(0.25 * i) + round(0.25 * o)),
}
BLOCKS = {"relora": 3}  # adapters one after another, of which one trains at a time
EVERY = list(SECTIONS)


@dataclasses.dataclass
class Made:
    """A run of a method: its spec, what it adapts and its job."""

    spec: RunSpec
    ranks: dict[Any, int]
    job: RunState


@pytest.fixture
def make(make_spec: Any, make_job: Any, make_examples: Any, place: Any) -> Callable[..., Made]:
    def one(base: BaseModel, name: str, placement: str = "full", *, rank: int = 4, seed: int = 0, **job: Any) -> Made:
        trainer = {"max_steps": job.get("steps", 6)}
        spec = make_spec(rank=rank, alpha=2 * rank, method={"name": name, **SECTIONS[name]}, seed=seed, trainer=trainer)
        ranks = dict.fromkeys(place(base, placement), rank)
        examples = job.pop("examples", None) or make_examples(seed)
        lr = {"vera": 5e-2, "lora_plus": 3e-3, "sparse": 3e-2}.get(name, 1e-2)
        return Made(spec, ranks, make_job(name, methods.adapter(spec, ranks), examples, **({"lr": lr} | job)))

    return one


def test_the_table_and_these_tests_name_the_same_methods() -> None:
    assert {name for name, method in methods.METHODS.items() if method.adapter is not None} == set(EVERY)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EVERY)
def test_a_fresh_adapter_is_the_base_model(kind: str, name: str, load: Any, make: Any, make_examples: Any) -> None:
    base, examples = load(kind), make_examples(0, count=6)
    made = make(base, name)
    with Pack(base, [made.job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(made.job)
        plain, fresh = score(pack, [-1, 0], examples, budget=4096)
    assert [s.nll for s in fresh] == pytest.approx([s.nll for s in plain], rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EVERY)
def test_training_lowers_the_nll_and_the_saved_adapter_is_what_was_trained(
    kind: str, name: str, load: Any, make: Any, make_examples: Any, tmp_path: Path
) -> None:
    base, examples, ids = load(kind), make_examples(0), torch.arange(3, 51).view(3, 16)
    made = make(base, name, examples=examples, steps=12)
    with Pack(base, [made.job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(made.job)
        start = pack.snapshot(0)
        before = sum(s.nll for s in score(pack, [0], examples, budget=4096)[0])
        for _ in range(12):
            pack.step()
            moving = int((pack.store.exp_avg != 0).sum())
        assert sum(s.nll for s in score(pack, [0], examples, budget=4096)[0]) < before - 5
        changed = sum(int((a != b).sum()) for n, parts in pack.snapshot(0).items()
                      for a, b in zip(parts[: len(parts) // 3], start[n][: len(parts) // 3], strict=True))  # fmt: skip
        write_adapter(tmp_path, made.spec, list(made.ranks), pack.store.views(0))
        ours = logits(pack, ids)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / ADAPTER)
    with torch.no_grad():
        torch.testing.assert_close(ours, loaded(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    counted = methods.trainable(made.spec.method, made.ranks)
    assert counted == sum(COUNTS[name](t.in_features, t.out_features) for t in made.ranks)
    assert moving == counted
    if name != "sparse":  # what is pruned was drawn before
        assert changed == counted * BLOCKS.get(name, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mixed_pack_is_each_run_alone(kind: str, load: Any, make: Any, train: Any, assert_close: Any) -> None:
    base = load(kind)
    places = ("full", "attn", "ff", "full", "full", "attn", "ff", "full", "attn", "ff")
    jobs = [make(base, name, where, seed=i).job for i, (name, where) in enumerate(zip(EVERY, places, strict=True))]
    packed = train(base, jobs, capacities=[job.adapter.capacity for job in jobs])
    for job in jobs:
        alone = train(base, [job], capacities=[job.adapter.capacity])
        assert_close(packed[job.run_id], alone[job.run_id])


def test_a_mixed_pack_over_accumulated_batches_and_with_recomputed_activations(
    load: Any, make: Any, train: Any, assert_close: Any
) -> None:
    base = load("llama")
    jobs = [make(base, name, seed=i).job for i, name in enumerate(EVERY)]
    jobs = [dataclasses.replace(job, adapter=dataclasses.replace(job.adapter, noise=2.0)) for job in jobs]
    capacities = [job.adapter.capacity for job in jobs]
    plain = train(base, jobs, capacities=capacities, batch_size=2, accumulation=2)
    recomputed = train(base, jobs, capacities=capacities, batch_size=2, accumulation=2, checkpointing=True)
    for job in jobs:
        alone = train(base, [job], capacities=[job.adapter.capacity], batch_size=2, accumulation=2)
        assert_close(plain[job.run_id], alone[job.run_id])
        assert_close(recomputed[job.run_id], plain[job.run_id])


@pytest.mark.parametrize("name", EVERY)
def test_every_method_trains_on_a_base_in_bfloat16(name: str, load: Any, make: Any) -> None:
    base = load("llama")
    base = dataclasses.replace(base, model=copy.deepcopy(base.model).bfloat16())
    made = make(base, name, steps=12)
    with Pack(base, [made.job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(made.job)
        plain, fresh = score(pack, [-1, 0], made.job.examples, budget=4096)
        for _ in range(12):
            pack.step()
        (after,) = score(pack, [0], made.job.examples, budget=4096)
    before = sum(s.nll for s in plain)
    assert sum(s.nll for s in fresh) == pytest.approx(before, rel=2e-3)
    assert sum(s.nll for s in after) < before - 5


def test_what_one_method_does_changes_no_bit_of_the_others(
    load: Any, make: Any, train: Any, assert_identical: Any
) -> None:
    base = load("gpt2")
    jobs = [make(base, name, seed=i).job for i, name in enumerate(("lora", "dora", "vera", "pissa"))]
    capacities = [job.adapter.capacity for job in jobs]
    wild = [jobs[0]] + [job.with_spec(optim=dataclasses.replace(job.optim, lr=1e30)) for job in jobs[1:]]
    usual, disturbed = train(base, jobs, capacities=capacities), train(base, wild, capacities=capacities)
    assert_identical(disturbed["lora"], usual["lora"])
    alone = train(base, jobs[:1], capacities=capacities[:1])["lora"]
    assert usual["lora"].losses == pytest.approx(alone.losses, rel=1e-6)


def test_a_slot_passes_from_method_to_method(load: Any, make: Any, train: Any, assert_close: Any) -> None:
    from sweeper.lora.forms import Capacity

    base = load("gpt2")
    turns = (("vera", "attn"), ("lora", "full"), ("dora", "ff"), ("vera", "ff"), ("pissa", "attn"), ("dora", "full"))
    jobs = [make(base, name, where, seed=i, steps=3).job for i, (name, where) in enumerate(turns)]
    jobs = [dataclasses.replace(job, run=dataclasses.replace(job.run, run_id=f"{i}")) for i, job in enumerate(jobs)]
    union = Capacity.union(job.adapter.capacity for job in jobs)
    together = train(base, jobs, capacities=[union, union])
    for job in jobs:
        assert_close(together[job.run_id], train(base, [job], capacities=[job.adapter.capacity])[job.run_id])


def logits(pack: Pack, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), pack.evaluating():
        pack.use_lanes([0])
        return pack.head.logits(pack.hidden(ids, torch.full((len(ids),), ids.shape[1])))


def test_relora_restarts_with_the_function_it_had_and_the_largest_moments(load: Any, make: Any) -> None:
    base, ids = load("llama"), torch.arange(3, 51).view(3, 16)
    made = make(base, "relora", steps=12)
    seen: list[Any] = []
    with Pack(base, [made.job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(made.job)
        restart = pack.store._restart  # type: ignore[attr-defined]

        def watch(slot: int, step: int) -> None:
            if step % 4 or step == 12:
                return
            before, trained = pack.snapshot(0), logits(pack, ids)
            restart(slot, step)
            torch.testing.assert_close(logits(pack, ids), trained)
            seen.append((step, before, pack.snapshot(0)))

        pack.store._restart = watch  # type: ignore[attr-defined]
        for _ in range(12):
            pack.step()
        end = pack.snapshot(0)
    assert [step for step, _, _ in seen] == [4, 8]
    _, before, after = seen[0]
    for name, (a, b, *moments) in after.items():
        assert a[4:8].any()
        assert not b[4:8].any()
        assert not a[:4].equal(a[4:8])
        assert end[name][0][:4].equal(a[:4])  # what was merged stays
        assert not end[name][0][8:12].equal(a[8:12])
        for moment, old in zip(moments, before[name][2:], strict=True):
            assert not moment[:4].any()
            assert int((moment[4:8] != 0).sum()) == round(0.1 * old[:4].numel())
        kept = moments[0][4:8] != 0
        largest = before[name][2][:4].abs()
        assert float(largest[kept].min()) >= float(largest[~kept].max())


@pytest.mark.parametrize("learnt", [True, False])
def test_a_sparse_adapter_has_as_many_values_in_every_row(learnt: bool, load: Any, make: Any, train: Any) -> None:
    from sweeper.lora.forms import Sparsity

    base = load("llama")
    made = make(base, "sparse", steps=10)
    pattern = Sparsity(density=0.25, learnt=learnt, first=1, last=6)
    job = dataclasses.replace(made.job, adapter=dataclasses.replace(made.job.adapter, sparsity=pattern))
    seen: list[dict[str, torch.Tensor]] = []

    def look(pack: Pack, step: int) -> None:
        seen.append({name: parts[0] != 0 for name, parts in pack.snapshot(0).items()})

    found = train(base, [job], capacities=[job.adapter.capacity], before_step=look)["sparse"]
    counts = [int(masks[name].sum()) for masks in seen for name in list(masks)[:1]]
    assert counts == sorted(counts, reverse=True)
    for name, (a, b, *_) in found.adapter.items():
        assert set((a != 0).sum(1).tolist()) == {round(0.25 * a.shape[1])}
        assert set((b != 0).sum(1).tolist()) == {round(0.25 * b.shape[1])}
        assert (a != 0).equal(seen[6][name])  # final from its last step on
        assert (a != 0).equal(seen[0][name]) is not learnt


def test_what_is_pruned_is_what_the_loss_does_not_feel(load: Any, make: Any) -> None:
    base = load("llama")
    made = make(base, "sparse", steps=12)
    with Pack(base, [made.job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(made.job)
        for _ in range(3):
            pack.step()
        sensed = pack.store.views(0, pack.store.copies["sensitivity"])
        for name, parts in pack.store.views(0).items():
            for part, weight in zip(parts, sensed[name], strict=True):
                if bool((part != 0).any()):
                    for row, feels in zip(part != 0, weight, strict=True):
                        assert not bool(row.all())
                        assert float(feels[row].min()) >= float(feels[~row].max())


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (
            {"name": "relora", "options": {"restarts": 4}},
            "restarts=4 needs more than 4 steps, and trainer.max_steps is 4",
        ),
        ({"name": "relora", "options": {"restarts": 1}}, "a restart every 2 steps leaves room for at most 1"),
        ({"name": "relora", "options": {"restarts": 1, "warmup_steps": 1, "prune": 2.0}}, r"prune must be in \[0, 1\]"),
        ({"name": "sparse", "options": {"pattern": "learned"}}, "Choose from learnt, random. Did you mean learnt"),
        ({"name": "sparse", "options": {"sparsity": 1.0}}, r"sparsity must be in \(0, 1\)"),
        ({"name": "sparse", "options": {"prune_from": 0.8}}, "prune_from=0.8 must be below prune_to=0.7"),
        ({"name": "pissa", "options": {"niter": -1}}, "niter must be at least 0"),
        ({"name": "lora_plus", "options": {"ratio": 0.0}}, "ratio must be above 0"),
        ({"name": "vera", "rank_stabilised": True}, "method=vera has no alpha / rank to stabilise"),
    ],
)
def test_what_cannot_be_is_named(method: dict[str, Any], line: str, make_spec: Any) -> None:
    with pytest.raises(SpecError, match=line):
        methods.check(make_spec(method=method))


def test_dora_with_dropout_does_not_pack(make_spec: Any) -> None:
    assert methods.packs(make_spec(method={"name": "dora"}))
    assert not methods.packs(make_spec(method={"name": "dora", "dropout": 0.1}))


def test_the_fast_svd_of_pissa_is_nearly_the_exact_one(load: Any, make: Any) -> None:
    base = load("llama")
    made = make(base, "pissa", "ff")
    found = []
    for niter in (0, 8):
        adapter = dataclasses.replace(made.job.adapter, niter=niter)
        with Pack(base, [adapter.capacity], PackConfig(batch_size=4)) as pack:
            pack.store.assign(0, adapter)
            found.append({n: (b[:4].t() @ a[:4]).clone() for n, (a, b) in pack.store.views(0).items()})
    for name, exact in found[0].items():
        assert 0.97 < float(found[1][name].norm() / exact.norm()) < 1  # a flat spectrum: nearly as much, not the same
        weight = base.model.get_submodule(name).weight
        best = torch.linalg.svdvals(weight)[:4].square().sum().sqrt()
        assert float(2 * exact.norm()) == pytest.approx(float(best), rel=1e-4)  # alpha over rank is 2


def test_a_slot_without_the_room_is_refused(load: Any, make: Any) -> None:
    base = load("llama")
    plain, dora, vera, fa = (make(base, name).job.adapter for name in ("lora", "dora", "vera", "lora_fa"))
    with Pack(base, [plain.capacity, dora.capacity, fa.capacity], PackConfig(batch_size=4)) as pack:
        assert pack.free_slot(dora) == 1
        assert pack.free_slot(vera) is None
        assert pack.free_slot(fa) == 2


@pytest.mark.parametrize("name", ["dora", "vera", "pissa", "lora_plus", "relora", "sparse"])
def test_a_run_goes_on_from_its_snapshot(name: str, load: Any, make: Any, train: Any, assert_close: Any) -> None:
    base = load("llama")
    made = make(base, name)
    whole = train(base, [made.job], capacities=[made.job.adapter.capacity])[name]
    with Pack(base, [made.job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        first = dataclasses.replace(made.job)
        pack.add(first)
        for _ in range(3):
            pack.step()
        state = pack.snapshot(0)
    second = dataclasses.replace(made.job, weights=state, done=3)
    rest = train(base, [second], capacities=[made.job.adapter.capacity])[name]
    rest.losses = whole.losses[:3] + rest.losses
    assert_close(rest, whole)


def peft_model(base: BaseModel, made: Made, start: dict[str, tuple[torch.Tensor, ...]]) -> Any:
    """PEFT's own method on a copy of the base, with the engine's start."""
    common = {
        "target_modules": [t.name for t in made.ranks], "task_type": "CAUSAL_LM",
        "fan_in_fan_out": any(t.kind == "conv1d" for t in made.ranks),
    }  # fmt: skip
    name, rank = made.spec.method.name, made.spec.rank
    config: Any
    if name == "vera":
        config = VeraConfig(r=rank, projection_prng_key=7, d_initial=0.5, **common)
    else:
        first = {"pissa": "pissa", "olora": "olora"}.get(name, True)
        config = LoraConfig(
            r=rank, lora_alpha=int(made.spec.alpha), use_dora=name == "dora", init_lora_weights=first, **common
        )
    model = get_peft_model(copy.deepcopy(base.model), config)
    with torch.no_grad():
        for module_name, parts in start.items():
            module = model.base_model.model.get_submodule(module_name)
            if name == "vera":
                assert module.vera_lambda_d.default.equal(parts[0])
                assert module.vera_lambda_b.default.equal(parts[1])
            elif name in ("pissa", "olora"):
                torch.testing.assert_close(parts[0][:rank], module.lora_A.default.weight)
                torch.testing.assert_close(parts[1][:rank].t(), module.lora_B.default.weight)
            else:
                module.lora_A.default.weight.copy_(parts[0])
                torch.testing.assert_close(module.lora_magnitude_vector.default.weight, parts[2])
    return model


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "dora"), ("gpt2", "dora"), ("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora"),
     ("llama", "vera"), ("gpt2", "vera")],
)  # fmt: skip
def test_a_packed_run_equals_trainer_with_peft(
    kind: str, name: str, load: Any, make: Any, train: Any, tmp_path: Path
) -> None:
    base = load(kind)
    made = make(base, name, steps=STEPS, bucketed=False, **OPTIM)
    others = [make(base, other, seed=9, steps=STEPS).job for other in EVERY if other != name]
    start: dict[str, tuple[torch.Tensor, ...]] = {}

    def keep_start(pack: Pack, step: int) -> None:
        if step == 0:
            start.update(pack.snapshot(0))

    jobs = [made.job, *others]
    ours = train(base, jobs, capacities=[job.adapter.capacity for job in jobs], before_step=keep_start)[name]
    model = peft_model(base, made, start)
    losses = trainer_run(model, made.job, tmp_path)
    assert ours.losses == pytest.approx(losses, rel=1e-4)
    assert max(ours.norms) > OPTIM["max_grad_norm"]
    for module_name, parts in ours.adapter.items():
        module = model.base_model.model.get_submodule(module_name)
        if name == "vera":
            theirs = [module.vera_lambda_d.default, module.vera_lambda_b.default]
        else:
            theirs = [module.lora_A.default.weight, module.lora_B.default.weight.t()]
            if name == "dora":
                theirs.append(module.lora_magnitude_vector.default.weight)
        for mine, other in zip(parts, theirs, strict=False):
            torch.testing.assert_close(mine[: len(other)], other.data, rtol=0, atol=1e-4)


@pytest.fixture
def study(make_run: Any) -> list[RunSpec]:
    """A run of every method, on one placement."""
    return [
        make_run("attn", method={"name": name, **SECTIONS[name]}, trainer={"max_steps": 6}, rank=4, alpha=8)
        for name in EVERY
    ]


def test_a_study_of_every_method_is_recorded_and_scored_again(
    study: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    from sweeper.record import read_record
    from sweeper.rescoring import rescore
    from sweeper.spec import EvaluationSpec, Settings

    events = run_all(study)
    assert {type(event).__name__ for event in events} >= {"RunFinished", "Step"}
    wanted = EvaluationSpec(name="e", splits=("test",))
    runs = rescore.find([tmp_path / "study"])
    found = list(rescore.rescore(runs, [], wanted, Settings(study="study", output_root=str(tmp_path), device="cpu")))
    assert {one.run.spec.method.name for one in found} == set(EVERY)
    for one in found:
        record, name = read_record(one.run.folder), one.run.spec.method.name
        assert record.status == "completed"
        assert record.scores["test"]["after"].nll == pytest.approx(one.score.nll, rel=1e-5)
        assert record.efficiency.pack_runs == len(EVERY)
        widths = {"attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_o": (32, 32)}
        assert record.trainable_parameters == sum(COUNTS[name](*widths[m.role]) for m in record.modules)
        assert all(module.rank == 4 for module in record.modules)


def test_a_study_of_every_method_goes_on_after_a_stop(study: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    from sweeper.record import read_record

    run_all(study, "whole")
    run_all(study, "stopped", stop_after=3 * len(EVERY) + 1)
    run_all(study, "stopped")
    for spec in study:
        whole, again = (read_record(tmp_path / name / spec.run_id) for name in ("whole", "stopped"))
        assert whole.scores == again.scores
        files = [tmp_path / name / spec.run_id / ADAPTER / "adapter_model.safetensors" for name in ("whole", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_pack_of_every_method_writes_what_generate_writes_through_peft(
    load: Any, make: Any, make_examples: Any, tmp_path: Path
) -> None:
    base, new = load("llama"), 8
    prompts = [example.input_ids for example in make_examples(3, count=3)]
    made = []
    for i, name in enumerate(EVERY):  # each run learns a token of its own
        ids = [(*prompt[:5], *[20 + i] * 6) for prompt in (e.input_ids for e in make_examples(0))]
        examples = [Encoded(f"{place}", row, 5) for place, row in enumerate(ids)]
        made.append(make(base, name, seed=i, steps=20, examples=examples))
    with Pack(base, [one.job.adapter.capacity for one in made], PackConfig(batch_size=4)) as pack:
        for one in made:
            pack.add(one.job)
        for _ in range(20):
            pack.step()
        ours = generate(pack, list(range(len(made))), prompts, max_new_tokens=new, stop_ids=[-7], rows=3)
        for slot, one in enumerate(made):
            weights = pack.store.views(slot)
            write_adapter(tmp_path / one.job.run_id, one.spec, list(one.ranks), weights)
    for one, texts in zip(made, ours, strict=True):
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / one.job.run_id / ADAPTER)
        for prompt, text in zip(prompts, texts, strict=True):
            written = model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            assert text.ids == tuple(written[0, len(prompt) :].tolist())
    assert len({texts[0].ids for texts in ours}) > 3
