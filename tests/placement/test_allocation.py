"""Ranks within a budget, and explicit ones."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sweeper import methods
from sweeper.errors import SpecError
from sweeper.models.architecture import structure
from sweeper.models.budget import lora_parameters, uniform
from sweeper.placement.placement import PLACEMENTS, Target, number_of_layers, resolve
from sweeper.spec import AllocationSpec, PlacementSpec, RunSpec

# the real shapes of three families: grouped queries, fused Conv1D, fused qkv
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 64},
    "gpt2": {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 64},
    "gpt_neox": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
                 "vocab_size": 64},
}  # fmt: skip


@functools.lru_cache
def every(kind: str) -> tuple[Target, ...]:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.device("meta"):
        return structure(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ids, **SHAPES[kind])))


def placed(kind: str, name: str) -> tuple[Target, ...]:
    return resolve(every(kind), PlacementSpec(name=name, roles=PLACEMENTS[name]), layers=number_of_layers(every(kind)))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rank", [8, 16])
def test_placements_come_within_a_hundredth_of_one_budget(
    kind: str, rank: int, make_spec: Callable[..., RunSpec]
) -> None:
    whole = lora_parameters(uniform(placed(kind, "full"), rank))
    for name in ("attn", "ff", "full"):
        spec = make_spec(rank=rank, allocation={"name": "matched"})
        found = methods.allocated(spec, placed(kind, name), every(kind))
        assert lora_parameters(found) == pytest.approx(whole, rel=0.01)
        assert max(found.values()) - min(found.values()) <= 1
        if name == "full":
            assert set(found.values()) == {rank}


@pytest.mark.parametrize("budget", [300_000, "2.4M", 1_234_567])
def test_a_budget_is_met_to_half_a_module(budget: int | str, make_spec: Callable[..., RunSpec]) -> None:
    spec = make_spec(allocation={"name": "matched", "budget": budget})
    found = methods.allocated(spec, placed("llama", "ff"), every("llama"))
    assert abs(lora_parameters(found) - (spec.allocation.parameters or 0)) <= (576 + 1536) / 2


def test_one_more_rank_is_spread_over_the_layers(make_spec: Callable[..., RunSpec]) -> None:
    found = methods.allocated(
        make_spec(rank=8, allocation={"name": "matched"}), placed("llama", "attn"), every("llama")
    )
    more = [target.layer for target, rank in found.items() if rank == max(found.values())]
    halves = (
        sum(layer < 15 for layer in more if layer is not None),
        sum(layer >= 15 for layer in more if layer is not None),
    )
    assert abs(halves[0] - halves[1]) <= 4


def test_a_small_module_is_filled_and_the_others_get_the_rest(make_spec: Callable[..., RunSpec]) -> None:
    spec = make_spec(allocation={"name": "matched", "budget": "40M"})
    found = methods.allocated(spec, placed("llama", "attn"), every("llama"))
    small = {rank for target, rank in found.items() if target.out_features == 192}
    assert small == {192}
    assert lora_parameters(found) == pytest.approx(40_000_000, rel=0.01)


def test_text_and_number_are_one_budget(make_spec: Callable[..., RunSpec]) -> None:
    one, two = (make_spec(allocation={"name": "matched", "budget": budget}) for budget in ("2.4M", 2_400_000))
    assert one.run_id == two.run_id


def test_the_scale_is_that_of_a_uniform_allocation(make_spec: Callable[..., RunSpec]) -> None:
    from sweeper import methods

    spec = make_spec(rank=8, alpha=24, allocation={"name": "matched"})
    adapter = methods.adapter(spec, methods.allocated(spec, placed("llama", "attn"), every("llama")))
    assert set(adapter.scales.values()) == {3.0}


def test_a_pattern_gives_ranks_by_role_and_by_name(make_spec: Callable[..., RunSpec]) -> None:
    wanted = {"attn_q": 16, r"layers\.0\.": 2}
    spec = make_spec(rank=4, allocation={"name": "pattern", "pattern": wanted})
    found = {t.name: rank for t, rank in methods.allocated(spec, placed("llama", "attn"), every("llama")).items()}
    assert found["model.layers.3.self_attn.q_proj"] == 16
    assert found["model.layers.3.self_attn.k_proj"] == 4
    assert {rank for name, rank in found.items() if ".layers.0." in name} == {2}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": "matched", "budget": "lots"}, "give a number of parameters, such as 2.4M"),
        ({"name": "matched", "budget": 1000}, r"115,200 \(rank 1\) to .* not 1,000"),
        ({"name": "uniform", "budget": 1000}, "allocation.budget needs allocation=matched"),
        ({"name": "pattern", "pattern": {"ff_up": 4}}, "ff_up fits none of the placed modules. Roles here: attn_q"),
        ({"name": "pattern", "pattern": {"attn_k": 200}}, "rank 200 must be 1 to 192"),
        ({"name": "even"}, "allocation=even: no such allocation. Choose from importance, matched, pattern, uniform"),
    ],
)
def test_what_cannot_be_is_named(fields: dict[str, Any], line: str, make_spec: Callable[..., RunSpec]) -> None:
    with pytest.raises(SpecError, match=line):
        methods.allocated(make_spec(allocation=fields), placed("llama", "attn"), every("llama"))


def test_an_allocation_of_another_name_has_no_budget() -> None:
    with pytest.raises(SpecError, match="needs allocation=pattern"):
        AllocationSpec(name="matched", pattern={"attn_q": 1})
