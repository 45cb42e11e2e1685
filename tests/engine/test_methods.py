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
from sweeper.engine.evaluate import score
from sweeper.engine.export import write_adapter
from sweeper.engine.pack import Job, Pack
from sweeper.models import BaseModel
from sweeper.record import ADAPTER
from sweeper.spec import RunSpec

from .test_trainer import OPTIM, STEPS, trainer_run

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
}
EVERY = list(SECTIONS)


@dataclasses.dataclass
class Made:
    """A run of a method: its spec, what it adapts and its job."""

    spec: RunSpec
    ranks: dict[Any, int]
    job: Job


@pytest.fixture
def make(make_spec: Any, make_job: Any, make_examples: Any, place: Any) -> Callable[..., Made]:
    def one(base: BaseModel, name: str, placement: str = "full", *, rank: int = 4, seed: int = 0, **job: Any) -> Made:
        spec = make_spec(rank=rank, alpha=2 * rank, method={"name": name, **SECTIONS[name]}, seed=seed)
        ranks = dict.fromkeys(place(base, placement), rank)
        examples = job.pop("examples", None) or make_examples(seed)
        lr = {"vera": 5e-2, "lora_plus": 3e-3}.get(name, 1e-2)
        return Made(spec, ranks, make_job(name, methods.adapter(spec, ranks), examples, **({"lr": lr} | job)))

    return one


def test_the_table_and_these_tests_name_the_same_methods() -> None:
    assert {name for name, method in methods.METHODS.items() if method.adapter is not None} == set(EVERY)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EVERY)
def test_a_fresh_adapter_is_the_base_model(kind: str, name: str, load: Any, make: Any, make_examples: Any) -> None:
    base, examples = load(kind), make_examples(0, count=6)
    made = make(base, name)
    with Pack(base, [made.job.adapter.capacity], batch_size=4) as pack:
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
    with Pack(base, [made.job.adapter.capacity], batch_size=4) as pack:
        pack.add(made.job)
        start = pack.snapshot(0)
        before = sum(s.nll for s in score(pack, [0], examples, budget=4096)[0])
        moments = torch.zeros_like(pack.bank.params, dtype=torch.bool)
        for _ in range(12):
            pack.step()
            moments |= pack.bank.exp_avg != 0
        assert sum(s.nll for s in score(pack, [0], examples, budget=4096)[0]) < before - 5
        changed = sum(int((a != b).sum()) for n, parts in pack.snapshot(0).items()
                      for a, b in zip(parts[: len(parts) // 3], start[n][: len(parts) // 3], strict=True))  # fmt: skip
        write_adapter(tmp_path, made.spec, list(made.ranks), pack.bank.adapter(0, made.job.adapter))
        pack.model.eval()
        pack.bank.derive()
        pack.use_lanes([0])
        with torch.no_grad():
            ours = pack.head.logits(pack.hidden(ids))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / ADAPTER)
    with torch.no_grad():
        torch.testing.assert_close(ours, loaded(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    counted = methods.trainable(made.spec.method, made.ranks)
    assert counted == sum(COUNTS[name](t.in_features, t.out_features) for t in made.ranks)
    assert int(moments.sum()) == counted
    assert changed == counted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mixed_pack_is_each_run_alone(kind: str, load: Any, make: Any, train: Any, assert_close: Any) -> None:
    base = load(kind)
    places = ("full", "attn", "ff", "full", "full", "attn", "ff", "full")
    jobs = [make(base, name, where, seed=i).job for i, (name, where) in enumerate(zip(EVERY, places, strict=True))]
    packed = train(base, jobs, capacities=[job.adapter.capacity for job in jobs])
    for job in jobs:
        alone = train(base, [job], capacities=[job.adapter.capacity])
        assert_close(packed[job.run_id], alone[job.run_id])


def test_what_one_method_does_changes_no_bit_of_the_others(
    load: Any, make: Any, train: Any, assert_identical: Any
) -> None:
    base = load("gpt2")
    jobs = [make(base, name, seed=i).job for i, name in enumerate(("lora", "dora", "vera", "pissa"))]
    capacities = [job.adapter.capacity for job in jobs]
    wild = [jobs[0]] + [dataclasses.replace(job, optim=dataclasses.replace(job.optim, lr=1e30)) for job in jobs[1:]]
    usual, disturbed = train(base, jobs, capacities=capacities), train(base, wild, capacities=capacities)
    assert_identical(disturbed["lora"], usual["lora"])
    alone = train(base, jobs[:1], capacities=capacities[:1])["lora"]
    assert usual["lora"].losses == pytest.approx(alone.losses, rel=1e-6)


def test_a_slot_passes_from_method_to_method(load: Any, make: Any, train: Any, assert_close: Any) -> None:
    from sweeper.engine.forms import Capacity

    base = load("gpt2")
    turns = (("vera", "attn"), ("lora", "full"), ("dora", "ff"), ("vera", "ff"), ("pissa", "attn"), ("dora", "full"))
    jobs = [make(base, name, where, seed=i, steps=3).job for i, (name, where) in enumerate(turns)]
    jobs = [dataclasses.replace(job, run_id=f"{i}") for i, job in enumerate(jobs)]
    union = Capacity.union(job.adapter.capacity for job in jobs)
    together = train(base, jobs, capacities=[union, union])
    for job in jobs:
        assert_close(together[job.run_id], train(base, [job], capacities=[job.adapter.capacity])[job.run_id])


def test_a_slot_without_the_room_is_refused(load: Any, make: Any) -> None:
    base = load("llama")
    plain, dora, vera, fa = (make(base, name).job.adapter for name in ("lora", "dora", "vera", "lora_fa"))
    with Pack(base, [plain.capacity, dora.capacity, fa.capacity], batch_size=4) as pack:
        assert pack.free_slot(dora) == 1
        assert pack.free_slot(vera) is None
        assert pack.free_slot(fa) == 2


@pytest.mark.parametrize("name", ["dora", "vera", "pissa", "lora_plus"])
def test_a_run_goes_on_from_its_snapshot(name: str, load: Any, make: Any, train: Any, assert_close: Any) -> None:
    base = load("llama")
    made = make(base, name)
    whole = train(base, [made.job], capacities=[made.job.adapter.capacity])[name]
    with Pack(base, [made.job.adapter.capacity], batch_size=4) as pack:
        first = dataclasses.replace(made.job)
        pack.add(first)
        for _ in range(3):
            pack.step()
        state = pack.snapshot(0)
    second = dataclasses.replace(made.job, state=state, done=3)
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
    losses = trainer_run(model, made.job, 1, tmp_path)
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
