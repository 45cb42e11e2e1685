"""Closed forms against what torch counts while it really trains."""

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from sweeper import methods
from sweeper.models import budget
from sweeper.models.architecture import structure
from sweeper.placement.placement import PLACEMENTS, Target, number_of_layers, resolve
from sweeper.spec import MethodSpec, PlacementSpec

# PEFT still asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BATCH, LENGTH, RANK = 2, 24, 4
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = IDS | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False}
GPT2 = IDS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}


def build(kind: str, attention: str = "eager", **changes: Any) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **(CONFIGS[kind] | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).requires_grad_(False)


@functools.lru_cache
def targets_of(kind: str) -> tuple[Target, ...]:
    return structure(build(kind))


def ranks_of(targets: tuple[Target, ...], name: str, layers: str = "all", **fields: Any) -> dict[Target, int]:
    placement = PlacementSpec(name=name, roles=PLACEMENTS.get(name, ()), layers=layers, **fields)
    return budget.uniform(resolve(targets, placement, layers=number_of_layers(targets)), RANK)


def adapted(model: torch.nn.Module, ranks: dict[Target, int]) -> torch.nn.Module:
    conv1d = any(target.kind == "conv1d" for target in ranks)
    names = [target.name for target in ranks]
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=names, fan_in_fan_out=conv1d))


def batch(vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_flops_are_what_torch_counts(kind: str) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(kind)(batch(), use_cache=False)
    count = counter.get_total_flops()
    # tolerance: rotary angles and masks are small products of transformers' own, under 1% here
    closed = budget.forward_flops_per_token(targets_of(kind), length=LENGTH) * BATCH * LENGTH
    assert closed == pytest.approx(count, rel=0.01)
    assert closed <= count


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layers", ["all", "last:1", "first:1"])
@pytest.mark.parametrize("name", ["attn", "attn_q", "attn_qv", "attn_qk", "attn_vo", "ff", "ff_in", "ff_out", "full"])
def test_training_flops_are_what_torch_counts(kind: str, layers: str, name: str) -> None:
    if kind == "gpt2" and name in ("attn_q", "attn_qv", "attn_qk", "attn_vo"):
        return  # fused there
    check_training_flops(kind, ranks_of(targets_of(kind), name, layers))


@pytest.mark.parametrize("fields", [{"head": True}, {"embeddings": True}, {"patterns": ("up_proj",), "head": True}])
def test_training_flops_of_head_and_embeddings_are_what_torch_counts(fields: dict[str, Any]) -> None:
    check_training_flops("llama", ranks_of(targets_of("llama"), "custom", **fields))


def check_training_flops(kind: str, ranks: dict[Target, int]) -> None:
    model = adapted(build(kind), ranks)
    with FlopCounterMode(display=False) as counter:
        model(batch(), use_cache=False).logits.sum().backward()
    with FlopCounterMode(display=False) as rest, torch.no_grad():
        build(kind)(batch(), use_cache=False)
    forward = budget.forward_flops_per_token(targets_of(kind), length=LENGTH) * BATCH * LENGTH
    uncounted = rest.get_total_flops() - forward
    closed = budget.train_flops(targets_of(kind), ranks, length=LENGTH, tokens=BATCH * LENGTH)
    assert closed == counter.get_total_flops() - uncounted


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_training_flops_of_every_weight_are_what_torch_counts(kind: str, tied: bool) -> None:
    model = build(kind, tie_word_embeddings=tied)
    every, full_ft = structure(model), MethodSpec(name="full_ft")
    ranks = budget.uniform(methods.placed(full_ft, (), every, tied=tied), RANK)
    with FlopCounterMode(display=False) as rest, torch.no_grad():
        model(batch(), use_cache=False)
    uncounted = rest.get_total_flops() - budget.forward_flops_per_token(every, length=LENGTH) * BATCH * LENGTH
    model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(batch(), use_cache=False).logits.sum().backward()
    closed = methods.train_flops(full_ft, every, ranks, length=LENGTH, tokens=BATCH * LENGTH)
    assert closed == counter.get_total_flops() - uncounted


def test_the_usual_approximation_holds_for_a_full_placement() -> None:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    with torch.device("meta"):
        targets = structure(build("llama", **shape, num_key_value_heads=3, vocab_size=49152))
    ranks = ranks_of(targets, "full")
    weights = sum(t.in_features * t.out_features for t in targets if t.kind == "linear")
    usual = 4 * weights + 6 * budget.lora_parameters(ranks) + 12 * 256 * 576 * 30
    assert budget.train_flops_per_token(targets, ranks, length=256) == pytest.approx(usual, rel=0.01)


def test_a_higher_placement_is_cheaper_to_train() -> None:
    targets = targets_of("llama")
    costs = [
        budget.train_flops_per_token(targets, ranks_of(targets, "attn", layers), length=LENGTH)
        for layers in ("first:1", "last:1")
    ]
    assert costs[0] > costs[1]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["attn", "ff", "full", "ff_out"])
def test_parameters_and_bytes_are_those_of_the_adapter(kind: str, name: str) -> None:
    ranks = ranks_of(targets_of(kind), name)
    model = adapted(build(kind), ranks)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert budget.lora_parameters(ranks) == sum(p.numel() for p in trainable)
    optimiser = torch.optim.AdamW(trainable)
    model(batch()).logits.sum().backward()
    optimiser.step()
    moments = [v for state in optimiser.state.values() for k, v in state.items() if k != "step"]
    estimate = budget.memory(
        targets_of(kind), ranks, base_parameters=1000, bytes_per_value=2, batch_size=BATCH, length=LENGTH
    )
    held = sum(p.nbytes for p in trainable)
    assert (estimate.base, estimate.adapter, estimate.gradients) == (2000, held, held)
    assert estimate.optimiser == sum(moment.nbytes for moment in moments)
    parts = estimate.base + estimate.adapter + estimate.gradients + estimate.optimiser + estimate.activations
    assert estimate.total == parts


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("name", "layers"), [("attn", "all"), ("ff", "all"), ("full", "all"), ("full", "last:1")])
def test_activation_estimate_is_within_a_factor_of_two(kind: str, name: str, layers: str) -> None:
    # wide enough that what does not grow with the width is small
    wide = {"llama": {"hidden_size": 64, "intermediate_size": 160}, "gpt2": {"n_embd": 64}}[kind]
    model = build(kind, "sdpa", **wide)
    targets = structure(model)
    ranks = ranks_of(targets, name, layers)
    model = adapted(model, ranks)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = batch()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    estimate = budget.activation_bytes(targets, ranks, batch_size=BATCH, length=LENGTH, bytes_per_value=4)
    assert 0.5 < estimate / sum(kept.values()) < 2
    assert loss.isfinite()


def test_checkpointing_and_a_higher_placement_keep_less() -> None:
    targets = targets_of("llama")

    def kept(layers: str, checkpointing: bool) -> int:
        ranks = ranks_of(targets, "full", layers)
        return budget.activation_bytes(
            targets, ranks, batch_size=8, length=LENGTH, bytes_per_value=2, checkpointing=checkpointing
        )

    assert kept("all", True) < kept("all", False)
    assert kept("upper_half", False) < kept("all", False)
