"""Schedules are transformers', AdamW is torch's, clipping is of one run's own norm."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from sweeper.lora.optimizer import PackedAdamW, hyperparameters, learning_rate
from sweeper.lora.store import AdapterStore
from sweeper.spec import OptimSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.33])
@pytest.mark.parametrize("steps", [1, 7, 60])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule: str, steps: int, warmup: float) -> None:
    optim = OptimSpec(lr=3e-3, schedule=schedule, warmup_fraction=warmup)
    torch_optim = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler = get_scheduler(name, torch_optim, math.ceil(steps * warmup), steps)
    for step in range(steps):
        assert learning_rate(optim, step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-12)
        torch_optim.step()
        scheduler.step()


def make_store(load: Any, make_adapter: Any) -> AdapterStore:
    base = load("llama")
    adapters = [
        make_adapter(base, "attn", 3),
        make_adapter(base, "full", 5, seed=1),
        make_adapter(base, "ff", 2, seed=2),
    ]
    store = AdapterStore(base.model, base.targets, [adapter.ranks for adapter in adapters], CPU)
    for slot, adapter in enumerate(adapters):
        store.assign(slot, adapter)
    return store


def parts(store: AdapterStore, slot: int, flat: torch.Tensor | None = None) -> list[torch.Tensor]:
    return list(itertools.chain.from_iterable(store.views(slot, flat).values()))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_adamw_is_torchs_and_an_idle_slot_stays_as_it_is(limit: float | None, load: Any, make_adapter: Any) -> None:
    """Slots 0 and 1 train with different settings; slot 2 holds an adapter but is idle."""
    store = make_store(load, make_adapter)
    optims = [
        OptimSpec(lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9, max_grad_norm=limit),
        OptimSpec(lr=3e-3, eps=1e-3, max_grad_norm=2.0, schedule="linear"),
    ]
    copies = [[p.clone().requires_grad_() for p in parts(store, slot)] for slot in (0, 1)]
    reference = [
        torch.optim.AdamW(own, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)
        for own, o in zip(copies, optims, strict=True)
    ]
    idle = [p.clone() for p in parts(store, 2)]
    packed = PackedAdamW(store)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        norms = []
        for slot, (own, optim, torch_optim) in enumerate(zip(copies, optims, reference, strict=True)):
            for grad, p in zip(parts(store, slot, store.grads), own, strict=True):
                grad.copy_(0.05 * torch.randn(grad.shape, generator=generator))
                p.grad = grad.clone()
            norms.append(float(torch.nn.utils.clip_grad_norm_(own, optim.max_grad_norm or math.inf)))
            torch_optim.param_groups[0]["lr"] = learning_rate(optim, step, 6)
            torch_optim.step()
        for grad in parts(store, 2, store.grads):
            grad.fill_(1.0)
        packed.set({slot: [hyperparameters(optim, step, 6)] for slot, optim in enumerate(optims)})
        found = packed.step()
        assert found[:2].tolist() == pytest.approx(norms, rel=1e-5)
        assert not store.grads.any()
    assert limit is None or norms[0] > limit
    for slot, own in enumerate(copies):
        for ours, theirs in zip(parts(store, slot), own, strict=True):
            torch.testing.assert_close(ours, theirs.data, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, old) for p, old in zip(parts(store, 2), idle, strict=True))
    assert not any(m.any() for m in parts(store, 2, store.exp_avg))


def test_the_norm_of_one_slot_clips_no_other(load: Any, make_adapter: Any) -> None:
    steps = []
    for loud in (1.0, 1e6):
        store = make_store(load, make_adapter)
        packed = PackedAdamW(store)
        for grad in parts(store, 0, store.grads):
            grad.fill_(0.01)
        for grad in parts(store, 1, store.grads):
            grad.fill_(loud)
        optim = OptimSpec(lr=1e-2, warmup_fraction=0.0, eps=1.0, max_grad_norm=1.0)
        packed.set({slot: [hyperparameters(optim, 0, 10)] for slot in (0, 1)})
        packed.step()
        steps.append([p.clone() for p in parts(store, 0)])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_rates_are_torchs_groups_and_what_is_frozen_is_no_part_of_the_norm(load: Any, make_adapter: Any) -> None:
    """Slot 0: B learns 4 times as fast. Slot 1: A is frozen. Slot 2 is an ordinary run among them."""
    base = load("llama")
    ordinary = [make_adapter(base, "attn", 3, seed=seed) for seed in range(3)]
    adapters = [replace(ordinary[0], rate_b=4.0), replace(ordinary[1], rate_a=0.0), ordinary[2]]
    store = AdapterStore(base.model, base.targets, [adapter.capacity for adapter in adapters], CPU)
    optim = OptimSpec(lr=1e-2, weight_decay=0.3, max_grad_norm=0.5, schedule="constant", warmup_fraction=0.0)
    for slot, adapter in enumerate(adapters):
        store.assign(slot, adapter)
    copies = [[p.clone().requires_grad_() for p in parts(store, slot)] for slot, a in enumerate(adapters)]
    faster = {0: (1.0, 4.0), 1: (0.0, 1.0), 2: (1.0, 1.0)}
    reference = []
    for slot, own in enumerate(copies):
        a, b = faster[slot]
        groups = [{"params": own[0::2], "lr": a * optim.lr}, {"params": own[1::2], "lr": b * optim.lr}]
        reference.append(torch.optim.AdamW([g for g in groups if g["lr"]], weight_decay=optim.weight_decay))
    packed = PackedAdamW(store)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        norms = []
        for slot, own in enumerate(copies):
            for grad, p in zip(parts(store, slot, store.grads), own, strict=True):
                grad.copy_(torch.randn(grad.shape, generator=generator))
                p.grad = grad.clone()
            moving = [p for group in reference[slot].param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.clip_grad_norm_(moving, 0.5)))
            reference[slot].step()
        packed.set({slot: [hyperparameters(optim, step, 10)] for slot in range(3)})
        assert packed.step().tolist() == pytest.approx(norms, rel=1e-5)
    for slot, own in enumerate(copies):
        for ours, theirs in zip(parts(store, slot), own, strict=True):
            torch.testing.assert_close(ours, theirs.data, rtol=1e-5, atol=1e-6)
    frozen = parts(store, 1, store.exp_avg)[0::2]
    assert not any(moment.any() for moment in frozen)
