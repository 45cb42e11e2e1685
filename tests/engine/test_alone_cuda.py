"""On a GPU: what trains alone captured and compiled is what it is eagerly, there and on the CPU."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from sweeper import budget, methods, models
from sweeper.engine.pack import Pack
from sweeper.models import BaseModel

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),  # the compiler remarks on precision and on its own deprecations
]
STEPS = 12


def moved(base: BaseModel, dtype: torch.dtype) -> BaseModel:
    return dataclasses.replace(base, model=copy.deepcopy(base.model).to(torch.device("cuda"), dtype))


def losses(
    base: BaseModel, spec: Any, place: Any, make_job: Any, examples: Any, lr: float = 1e-3, **options: Any
) -> list[float]:
    targets = place(base, "full")
    found = methods.placed(spec.method, targets, base.targets, tied=models.is_tied(base.model))
    job = make_job("x", methods.adapter(spec, budget.uniform(found, 4)), examples, steps=STEPS, lr=lr, weight_decay=0.1)
    with Pack(base, job.adapter, batch_size=4, **options) as pack:
        assert pack.compiled == bool(options.get("compiled"))
        pack.add(job)
        for _ in range(STEPS):
            pack.step()
        return [result.loss for result in pack.drain()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["full_ft", "bitfit"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_captured_and_compiled_are_eager(
    kind: str, name: str, dtype: torch.dtype, tolerance: float, load: Any, place: Any, make_spec: Any, make_job: Any,
    make_examples: Any,
) -> None:  # fmt: skip
    base, spec = moved(load(kind), dtype), make_spec(method={"name": name})
    examples = make_examples(0, shortest=20, longest=30)
    eager = losses(base, spec, place, make_job, examples)
    for options in ({"captured": True}, {"compiled": True}):
        assert losses(base, spec, place, make_job, examples, **options) == pytest.approx(eager, rel=tolerance)
    if dtype == torch.float32:
        assert losses(load(kind), spec, place, make_job, examples) == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize(("name", "lr"), [("adalora", 0.2), ("qlora", 0.01), ("dora", 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_s_tuners_learn_on_a_gpu(
    name: str, lr: float, dtype: torch.dtype, load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any,
) -> None:  # fmt: skip
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    dropout = {"dropout": 0.1} if name == "dora" else {}
    spec = make_spec(method={"name": name, **dropout}, trainer={"max_steps": STEPS})
    base = moved(load("llama"), dtype)
    if name == "qlora":
        from sweeper.methods import qlora

        base = qlora.quantised(base, torch.device("cuda"))
    found = losses(base, spec, place, make_job, make_examples(0, count=4), lr=lr, captured=True)
    assert all(math.isfinite(loss) for loss in found)
    assert len(set(found)) > 4
    assert name == "adalora" or sum(found[-4:]) < sum(found[:4])  # which begins slowly
