"""On a GPU: what trains alone captured and compiled is what it is eagerly, there and on the CPU."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from sweeper import methods, models
from sweeper.methods.tuners import CAPTURED
from sweeper.models import BaseModel, budget
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from tests.training.test_tuners import NEEDS

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
    with Pack(base, job.adapter, PackConfig(batch_size=4, **options)) as pack:
        assert pack.compiled == (bool(options.get("compiled")) and pack.store.able.compiles)
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("adalora", "qlora") for dtype in (torch.float32, torch.bfloat16)]
    + [(name, torch.float32) for name in sorted(CAPTURED)],
)
def test_a_captured_tuner_of_peft_is_the_eager_one(
    name: str, dtype: torch.dtype, load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any,
) -> None:  # fmt: skip
    arguments, lr = NEEDS.get(name, ({}, 0.01))
    method: dict[str, Any] = {"name": name}
    if name.isupper():
        method = {"name": "peft", "options": {"tuner": name.lower(), "arguments": arguments}}
    spec, base = make_spec(method=method, trainer={"max_steps": STEPS}), moved(load("llama"), dtype)
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
        from sweeper.methods import qlora

        base = qlora.quantised(base, torch.device("cuda"))
    examples = make_examples(0, count=4)
    eager = losses(base, spec, place, make_job, examples, lr=lr)
    assert len(set(eager)) > 4
    captured = losses(base, spec, place, make_job, examples, lr=lr, captured=True)
    assert captured == pytest.approx(eager, rel=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_a_peft_tuner_draws_from_the_run_s_seed(
    dtype: torch.dtype, load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any
) -> None:
    spec, base = make_spec(method={"name": "dora", "dropout": 0.1}), moved(load("llama"), dtype)
    found = [
        losses(base, spec, place, make_job, make_examples(0, count=4), lr=0.01, captured=how) for how in (False, True)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4 if dtype == torch.float32 else 2e-2)
    assert sum(found[0][-4:]) < sum(found[0][:4])
