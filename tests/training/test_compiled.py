"""Compiled layers compute what the eager ones do, and are compiled once for all layers and all lengths."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sweeper.training import compilation
from sweeper.training import pack as packs

pytestmark = pytest.mark.filterwarnings("default")  # the compiler remarks on its own deprecations


@pytest.mark.slow
def test_compiled_layers_are_eager_ones_and_share_their_compilation(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for the first layer, whose input needs no gradient, and one for the others; one more may be met where
    a length happens to equal a width of the model. Without CUDA there is no capture, and the graphs are run as traced.
    """
    base = load("llama")
    base = dataclasses.replace(base, model=copy.deepcopy(base.model))
    examples = make_examples(0, count=40, shortest=8, longest=120)
    jobs = [
        make_job("attn", make_adapter(base, "attn", 4), examples, steps=10),
        make_job("full", make_adapter(base, "full", 3, seed=1), examples, steps=10, seed=1),
    ]
    lengths = set()
    stock = packs.collate

    def fixed(lanes: Any, weights: Any, *, fixed: bool, **more: Any) -> Any:
        batch = stock(lanes, weights, fixed=True, **more)
        lengths.add(batch.shape[3])
        return batch

    monkeypatch.setattr(packs, "collate", fixed)
    eager = train(base, jobs)
    torch._dynamo.reset()
    counters.clear()
    layers = compilation.decoder_layers(base.model)
    for layer in layers:
        layer.compile(backend="aot_eager", dynamic=True)
    compiled = train(base, jobs)
    assert len(lengths) >= 4
    assert len(layers) >= 3
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    for job in jobs:
        assert compiled[job.run_id].losses == pytest.approx(eager[job.run_id].losses, rel=1e-5)
        assert compiled[job.run_id].norms == pytest.approx(eager[job.run_id].norms, rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_with_gains_are_eager_ones_and_share_their_compilation(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load("gpt2")
    base = dataclasses.replace(base, model=copy.deepcopy(base.model))
    adapters = {
        "lora": make_adapter(base, "attn", 4),
        "dora": dataclasses.replace(make_adapter(base, "attn", 4, seed=1), form="dora"),
    }
    jobs = [make_job(name, adapter, make_examples(0), lr=3e-3, steps=3) for name, adapter in adapters.items()]
    capacities = [job.adapter.capacity for job in jobs]
    eager = train(base, jobs, capacities=capacities)
    torch._dynamo.reset()
    counters.clear()
    for layer in compilation.decoder_layers(base.model):
        layer.compile(backend="aot_eager", dynamic=True)
    compiled = train(base, jobs, capacities=capacities)
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    for job in jobs:
        assert compiled[job.run_id].losses == pytest.approx(eager[job.run_id].losses, rel=1e-5)
        assert compiled[job.run_id].norms == pytest.approx(eager[job.run_id].norms, rel=1e-4)
