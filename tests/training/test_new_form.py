"""A form that the engine does not know is one file and its entry of `FORMS`: (IA)^3 (Liu et al. 2022), written here.

A method that uses it is one more of each, as is this test. Nothing else of the source is touched.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from torch import Tensor

from sweeper import methods
from sweeper.adapters import merge, spectra
from sweeper.lora.forms import FORMS, AdapterSpec, Attached, Form, peft
from sweeper.lora.layout import Part, Segment
from sweeper.methods.method import Method
from sweeper.models import BaseModel
from sweeper.record import ADAPTER, read_record
from sweeper.rescoring import rescore
from sweeper.spec import RunSpec
from sweeper.training import memory
from sweeper.training.export import write_adapter
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# ---- what the form's own file would hold


class Factors:
    """The factors of the outputs of one group, for every slot; exactly 1 for a slot of another form."""

    def __init__(self, factor: Tensor, columns: Sequence[int]) -> None:
        self.factor, self.columns, self.active = factor, tuple(columns), False
        self.on = torch.zeros_like(factor, dtype=torch.bool)

    def apply(self, ys: Sequence[Tensor], biases: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
        factor = torch.where(self.on, self.factor, 1.0)
        factor = torch.cat([factor, torch.ones_like(factor[:1])])[slots.long()][:, None]  # the last one is the base's
        scaled = []
        for y, first in zip(ys, self.columns, strict=True):
            rows = y.view(len(slots), -1, y.shape[-1])
            scaled.append((rows * factor[..., first : first + y.shape[-1]]).view(y.shape))
        return scaled


class Attachment(Attached):
    def __init__(self, flat: Any, layout: Any, groups: Sequence[Any], slots: Sequence[int]) -> None:
        self.factors = [
            Factors(layout.table(i, flat.params, flat.grads), layout.tables[i][2]) for i in range(len(groups))
        ]
        for group, factors in zip(groups, self.factors, strict=True):
            group.changes = (*group.changes, factors)

    def assign(self, slot: int, adapter: AdapterSpec, segments: Sequence[Segment]) -> None:
        self._turn(slot, segments, True)

    def release(self, slot: int, segments: Sequence[Segment]) -> None:
        self._turn(slot, segments, False)

    def _turn(self, slot: int, segments: Sequence[Segment], on: bool) -> None:
        for segment in segments:
            factors, width = self.factors[segment.group], segment.target.out_features
            first = factors.columns[segment.member]
            factors.on[slot, first : first + width] = on

    def switch(self, on: bool) -> None:
        for factors in self.factors:
            factors.active = on


def parts(target: Any, rank: int) -> tuple[Part, ...]:
    return (Part("l", (target.out_features, 1), "beside", "b", "ia3_l"),)


def begin(segment: Segment, adapter: AdapterSpec, group: Any, values: Sequence[Tensor]) -> None:
    values[0].fill_(1.0)


def update(weight: Tensor, scale: float, values: Sequence[Tensor]) -> Tensor:
    return (values[0] - 1) * weight


def config(spec: RunSpec, adapter: AdapterSpec, ranks: Mapping[Any, int], **more: Any) -> Any:
    return IA3Config(feedforward_modules=[], **peft.places(ranks), **more)


def owns(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == "IA3"


IA3 = Form(
    name="ia3", parts=parts, begin=begin, update=update, config=config, owns=owns, attach=Attachment, product=False
)

# ---- and that of a method that uses it


def adapter(spec: RunSpec, ranks: Mapping[Any, int]) -> AdapterSpec:
    names = [target.name for target in ranks]
    return AdapterSpec(
        ranks=dict.fromkeys(names, 1), scales=dict.fromkeys(names, 1.0), dropout=0.0, seed=spec.seed, form="ia3"
    )


METHOD = Method(
    adapter=adapter, parameters=lambda method, target, rank: target.out_features, ranked=False, scaled=False,
    leaves=lambda method: "ia3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "ia3", IA3)
    monkeypatch.setitem(methods.METHODS, "ia3", METHOD)


@pytest.fixture
def make(load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any) -> Any:
    def one(name: str, placement: str = "full", *, seed: int = 0) -> tuple[RunSpec, dict[Any, int], Any]:
        spec = make_spec(rank=1, alpha=2, method={"name": name}, seed=seed)
        ranks = dict.fromkeys(place(load("llama"), placement), 1)
        return spec, ranks, make_job(f"{name}{seed}", methods.adapter(spec, ranks), make_examples(seed), lr=3e-2)

    return one


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_it_begins_as_the_base_and_is_in_a_pack_what_it_is_by_itself(
    load: Any, make: Any, train: Any, assert_close: Any
) -> None:
    base, ids = load("llama"), torch.arange(3, 51).view(3, 16)
    jobs = [make("ia3")[2], make("dora", seed=1)[2], make("ia3", "attn", seed=2)[2], make("vera", seed=3)[2]]
    together = train(base, jobs, capacities=[job.adapter.capacity for job in jobs])
    for job in jobs:
        assert_close(together[job.run_id], train(base, [job], capacities=[job.adapter.capacity])[job.run_id])
    changed = [bool((parts[0] != 1).all()) for parts in together["ia30"].adapter.values()]
    assert all(changed)
    with Pack(base, [jobs[0].adapter.capacity], PackConfig(batch_size=4)) as pack, torch.no_grad():
        pack.store.assign(0, jobs[0].adapter)
        with pack.evaluating():
            pack.use_lanes([0])
            states = pack.hidden(ids, torch.full((3,), 16))
            torch.testing.assert_close(pack.head.logits(states), logits(base.model, ids))


def test_a_slot_that_held_it_holds_nothing_of_it(load: Any, make: Any, train: Any, assert_identical: Any) -> None:
    """A slot with room for both; one of plain LoRA has none for it."""
    from sweeper.lora.forms import Capacity

    base, first, other = load("llama"), make("ia3")[2], make("lora", seed=1)[2]
    union = Capacity.union([first.adapter.capacity, other.adapter.capacity])
    used = train(base, [first, other], capacities=[union])[other.run_id]
    assert_identical(used, train(base, [other], capacities=[union])[other.run_id])
    with Pack(base, [other.adapter.capacity], PackConfig(batch_size=4)) as pack:
        assert pack.free_slot(first.adapter) is None


def test_its_memory_is_counted(load: Any, make: Any) -> None:
    base: BaseModel = load("llama")
    spec, ranks, job = make("ia3")
    with Pack(base, [job.adapter.capacity], PackConfig(batch_size=4)) as pack:
        pack.add(job)
        store: Any = pack.store
        held = methods.held(spec, ranks, total=0)
        assert held == sum(t.in_features + 2 * t.out_features for t in ranks)
        assert held <= store.params.numel() < held + 3 * 64 * len(ranks)
        assert store.state_bytes == (memory.STATE_BYTES + 4) * store.params.numel()  # and the rates
        assert int((store.rates != 0).sum()) == methods.trainable(spec.method, ranks)


def test_stock_peft_loads_what_it_leaves_and_its_update_is_the_change_of_the_weights(
    load: Any, make: Any, train: Any, tmp_path: Path
) -> None:
    base, ids = load("llama"), torch.arange(3, 51).view(3, 16)
    spec, ranks, job = make("ia3")
    weights = {n: p[:1] for n, p in train(base, [job], capacities=[job.adapter.capacity])["ia30"].adapter.items()}
    write_adapter(tmp_path, spec, list(ranks), weights)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / ADAPTER)
    wanted, own = logits(loaded, ids), copy.deepcopy(base.model)
    saved = rescore.read_adapter(tmp_path)
    for target in ranks:
        weight = own.get_submodule(target.name).weight
        weight.data += saved.update(target, weight.data)
    torch.testing.assert_close(logits(own, ids), wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - logits(base.model, ids)).abs().max()) > 0.01


def test_a_run_of_it_goes_from_the_command_to_a_merged_model(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = make_run("attn", method={"name": "ia3"}, rank=1, alpha=1, optim={"lr": 0.05})
    run_all([spec, make_run("attn", rank=2)])
    (run,) = rescore.find([tmp_path / "study" / spec.run_id])
    done = read_record(run.folder)
    assert done.status == "completed", done.error
    assert "peft" not in done.saved  # stock PEFT gave the engine's logits when that was proved
    assert done.trainable_parameters == 3 * (32 + 16 + 16 + 32)
    merge.merge(run, tmp_path / "merged", device="cpu")
    ((_, modules),) = spectra.spectra([run], spectra.Look(), device="cpu")
    assert {one.name for one in modules} == {module.name for module in done.modules}


def test_no_file_but_those_of_forms_and_methods_names_a_form(root: Path) -> None:
    known = "|".join(name for name in FORMS if name != "lora")  # which is what a spec says where it says nothing
    for path in (root / "sweeper").rglob("*.py"):
        if not {"forms", "methods"} & set(path.relative_to(root).parts):
            assert not re.search(rf"""["']({known})["']""", path.read_text()), path
