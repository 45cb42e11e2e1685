"""What each form says of itself is what its adapters do, and where they lie is nobody else's."""

import gc
import weakref
from typing import Any

import pytest
import torch

from sweeper.lora.forms import FORMS, Capacity, Restarts, Sparsity, peft
from sweeper.lora.layout import BLOCK
from sweeper.lora.store import AdapterStore

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", list(FORMS))
def test_the_update_of_a_form_is_what_its_modules_do(form: str, kind: str, load: Any, make_adapter: Any) -> None:
    base = load(kind)
    adapter = make_adapter(base, "full", 4, form=form)
    scale = FORMS[form].scale({"lora_alpha": 8.0}, "", 4)
    adapter = make_adapter(base, "full", 4, form=form, scales=dict.fromkeys(adapter.ranks, scale))
    targets = [target for target in base.targets if target.name in adapter.ranks]
    store = AdapterStore(base.model, base.targets, [adapter.capacity], CPU)
    generator = torch.Generator().manual_seed(0)
    store.install()
    try:
        store.assign(0, adapter)
        for part in (part for parts in store.views(0).values() for part in parts):
            part.add_(0.1 * torch.randn(part.shape, generator=generator))
        plain = {n.removesuffix(".weight"): t for n, t in peft.state_dict(adapter, targets, store.views(0)).items()}
        saved = peft.Loaded(FORMS[form], {"lora_alpha": 8.0}, plain)
        store.lanes.slots, store.lanes.host_slots = torch.zeros(1, dtype=torch.int32), (0,)
        with torch.no_grad(), store.one_pass(1.0):
            for target in targets:
                module: Any = base.model.get_submodule(target.name)
                units = torch.cat([torch.zeros(1, target.in_features), torch.eye(target.in_features)])
                store.lanes.tokens = len(units)
                out = [base.model.get_submodule(s.name)(units[None])[0] for s in targets if s.inputs == target.inputs]
                found = out[[s.name for s in targets if s.inputs == target.inputs].index(target.name)]
                weight = module.weight.t() if target.kind == "conv1d" else module.weight
                changed = (found[1:] - found[0]).t()
                torch.testing.assert_close(changed, weight + saved.update(target, weight), rtol=1e-4, atol=1e-5)
                factors = saved.factors(target)
                assert factors is None or torch.equal(factors[0] @ factors[1], saved.update(target, weight))
    finally:
        store.close()


def test_a_store_that_is_dropped_gives_its_memory_back_at_once(load: Any, make_adapter: Any) -> None:
    base = load("llama")
    adapters = [make_adapter(base, "full", 3, form=form) for form in FORMS]
    store = AdapterStore(base.model, base.targets, [adapter.capacity for adapter in adapters], CPU)
    store.install()
    for slot, adapter in enumerate(adapters):
        store.assign(slot, adapter)
    store.close()
    values = weakref.ref(store.params)
    gc.disable()
    try:
        del store
        assert values() is None
    finally:
        gc.enable()


def test_every_value_belongs_to_one_slot_and_one_part(load: Any, make_adapter: Any) -> None:
    base = load("gpt2")
    adapters = [make_adapter(base, "full", 3, form=form) for form in FORMS]
    wide = Capacity.union([adapter.capacity for adapter in (*adapters, make_adapter(base, "attn", 20))])
    store = AdapterStore(base.model, base.targets, [wide, adapters[0].capacity, wide], CPU)
    for adapter in adapters:
        taken = torch.zeros_like(store.params)
        for slot in (0, 2):
            store.assign(slot, adapter)
            for part in (part for parts in store.views(slot, taken).values() for part in parts):
                part += 1
            owner = store.block_slot.repeat_interleave(BLOCK)
            assert not taken[(owner != slot) & (owner != 2 - slot)].any()
        sizes = [part.numel() for parts in store.views(0).values() for part in parts]
        assert int(taken.sum()) == 2 * sum(sizes)
        assert float(taken.max()) == 1


def test_the_schedule_of_relora_is_jagged() -> None:
    restarts = Restarts(every=10, count=2, warmup=4, prune=0.9)
    assert [restarts.block(step) for step in (0, 9, 10, 19, 20, 35)] == [0, 0, 1, 1, 2, 2]
    assert [step for step in range(36) if restarts.due(step)] == [10, 20]
    assert [restarts.pace(step) for step in (0, 9, 10, 12, 14, 21, 35)] == [
        (0, 1.0), (9, 1.0), (14, 0.0), (14, 0.5), (14, 1.0), (24, 0.25), (35, 1.0),
    ]  # fmt: skip


def test_pruning_takes_some_twenty_rounds_however_long_the_run() -> None:
    long = Sparsity(density=0.1, learnt=True, first=100, last=731)
    rounds = [step for step in range(1000) if long.due(step)]
    assert 20 <= len(rounds) <= 22
    assert (rounds[-1], rounds[0] > 100) == (731, True)
    assert [long.kept(1000, step) for step in (0, 100, 731, 999)] == [1000, 1000, 100, 100]
    assert not any(Sparsity(density=0.1, learnt=False).due(step) for step in range(10))
