"""What trains alone follows transformers' Trainer, and PEFT's own AdaLoRA, step by step."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

from sweeper import methods, models
from sweeper.lora.trainee import UnpackedSpec
from sweeper.lora.unpacked import UnpackedStore
from sweeper.models import BaseModel, budget
from sweeper.models.loss import Head
from sweeper.models.verdict import HeadForm
from sweeper.spec import RunSpec
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig

from .trainer import collate, ordered, trainer_run

pytestmark = [
    # PEFT still asks transformers by a name that is about to go
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]
STEPS, BATCH = 10, 4
OPTIM = {"lr": 2e-3, "weight_decay": 0.1, "warmup_fraction": 0.2, "max_grad_norm": 0.2, "beta2": 0.99}


def what_trains(spec: RunSpec, base: BaseModel, place: Any) -> UnpackedSpec:
    targets = place(base, spec.placement.name)
    found = methods.placed(spec.method, targets, base.targets, tied=models.is_tied(base.model))
    adapter = methods.adapter(spec, budget.uniform(found, spec.rank))
    assert isinstance(adapter, UnpackedSpec)
    return adapter


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("modules", ["all", "placed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_full_fine_tuning_equals_the_trainer(
    kind: str, modules: str, accumulation: int, load: Any, place: Any, make_spec: Any, make_job: Any,
    make_examples: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """Ten steps in float32, clipped and decayed, on tied and untied ends: every loss and every weight."""
    base = load(kind)
    spec = make_spec(method={"name": "full_ft", "options": {"modules": modules}}, placement={"name": "attn"})
    job = make_job("x", what_trains(spec, base, place), make_examples(7), steps=STEPS, bucketed=False, **OPTIM)
    losses, norms = [], []
    with Pack(base, job.adapter, PackConfig(batch_size=BATCH, accumulation=accumulation)) as pack:
        pack.add(job)
        for _ in range(STEPS):
            pack.step()
        for result in pack.drain():
            losses.append(result.loss)
            norms.append(result.grad_norm)
        ours = {name: parts[0] for name, parts in pack.snapshot(0).items()}

    model = copy.deepcopy(base.model)
    for name in ours:
        model.get_parameter(name).requires_grad_()
    theirs = trainer_run(model, job, tmp_path, accumulation=accumulation)

    assert max(norms) > OPTIM["max_grad_norm"]  # clipping was at work
    assert losses == pytest.approx(theirs, rel=1e-5)
    moved = 0.0
    for name, value in ours.items():
        torch.testing.assert_close(value, model.get_parameter(name).data, rtol=0, atol=1e-4)
        moved = max(moved, float((value - base.model.get_parameter(name)).abs().max()))
    assert moved > 1e-3
    assert len(ours) == (len(list(base.model.parameters())) if modules == "all" else len(job.adapter.ranks))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adalora_equals_peft_s(
    kind: str, load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any
) -> None:
    """Twenty steps of PEFT's own loop: its loss with the penalty, clipping, AdamW, `update_and_allocate`."""
    base, steps = load(kind), 20
    spec = make_spec(method={"name": "adalora"}, rank=3, alpha=6, trainer={"max_steps": steps})
    adapter = what_trains(spec, base, place)
    job = make_job("x", adapter, make_examples(7), steps=steps, bucketed=False, **OPTIM)
    with Pack(base, adapter, PackConfig(batch_size=BATCH)) as pack:
        store = pack.store
        assert isinstance(store, UnpackedStore)
        start = {name: value.detach().clone() for name, value in store.trainee.peft.state_dict().items()}  # type: ignore[attr-defined]
        pack.add(job)
        for _ in range(steps):
            pack.step()
        losses = [result.loss for result in pack.drain()]
        ours = {name: value.detach().clone() for name, value in store.trained.items()}
        ranks = store.trainee.ranks()

    config = AdaLoraConfig(
        target_r=3, init_r=5, total_step=steps, tinit=2, tfinal=6, deltaT=1, lora_alpha=6, task_type="CAUSAL_LM",
        target_modules=list(adapter.ranks), fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base.model), config)
    model.load_state_dict(start)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM["lr"], weight_decay=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: n / 4 if n < 4 else 0.5 * (1 + math.cos(math.pi * (n - 4) / (steps - 4)))
    )
    theirs, rows = [], ordered(job)
    model.train()
    for step in range(steps):
        batch = collate(rows[step * BATCH : (step + 1) * BATCH])
        out = model(**batch)
        out.loss.backward()
        theirs.append(float(plain_loss(out.logits.detach(), batch["labels"])))
        torch.nn.utils.clip_grad_norm_(trained, 0.2)
        optimizer.step()
        schedule.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()

    assert losses == pytest.approx(theirs, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.data, rtol=0, atol=1e-4)
    assert sum(ranks.values()) == 3 * len(adapter.ranks)
    assert len(set(ranks.values())) > 1  # they went where they matter


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "divisor"), [(None, 1.0), (5.0, 4.0)])
def test_a_trained_head_has_autograds_gradients(bias: bool, softcap: float | None, divisor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(8, 31, bias=bias)
    hidden = torch.randn(12, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 31, (1, 12), generator=generator)
    weights = torch.rand(1, 12, generator=generator)
    weights[0, -3:] = 0
    inputs = [hidden, *linear.parameters()]
    head = Head(linear, HeadForm(softcap=softcap, divisor=divisor))
    (loss,), scores = head.scores(hidden, targets, weights)
    found = torch.autograd.grad(3 * loss, inputs)
    nll = torch.nn.functional.cross_entropy(head.logits(hidden), targets[0], reduction="none")
    wanted = (weights[0] * nll).sum()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(scores.nll[0], nll)
    for mine, theirs in zip(found, torch.autograd.grad(3 * wanted, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert float(head.scores(hidden, targets, weights)[0]) == pytest.approx(float(wanted.detach()), rel=1e-6)
