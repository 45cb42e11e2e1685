"""Roles and placements over a cross-section of everything that transformers calls a causal language model."""

import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import tiny_models
from sweeper import methods
from sweeper.errors import ModelError, SpecError
from sweeper.models import budget
from sweeper.models.architecture import FUSED, ROLES, Target, structure
from sweeper.models.roles import bypassed, peft_refuses
from sweeper.placement.placement import PLACEMENTS, number_of_layers, report, resolve, unadapted
from sweeper.spec import MethodSpec, PlacementSpec

LLAMA = "self_attn.q_proj=attn_q self_attn.k_proj=attn_k self_attn.v_proj=attn_v self_attn.o_proj=attn_o"
GATED = "mlp.gate_proj=ff_gate mlp.up_proj=ff_up mlp.down_proj=ff_down"
# what the first release found in each block: these roles are part of records, and stay
FORMER: dict[str, str] = {
    **dict.fromkeys(
        ("cohere2", "gemma2", "gemma3", "got_ocr2", "llama", "mistral", "olmo2", "qwen3", "stablelm (parallel)"),
        f"{LLAMA} {GATED}",
    ),
    **dict.fromkeys(("gpt_oss", "mixtral", "olmoe", "phimoe"), f"{LLAMA} mlp.experts=ff_experts"),
    "mimo_v2_flash": f"{LLAMA} {GATED} mlp.experts=ff_experts",
    "granitemoe": f"{LLAMA} block_sparse_moe.experts=ff_experts",
    "glm4": f"{LLAMA} mlp.gate_up_proj=ff_gate_up mlp.down_proj=ff_down",
    "nemotron": f"{LLAMA} mlp.up_proj=ff_up mlp.down_proj=ff_down",
    "nanochat": f"{LLAMA} mlp.fc1=ff_up mlp.fc2=ff_down",
    "starcoder2": f"{LLAMA} mlp.c_fc=ff_up mlp.c_proj=ff_down",
    "phi": f"{LLAMA.replace('o_proj', 'dense')} mlp.fc1=ff_up mlp.fc2=ff_down",
    "opt": f"{LLAMA.replace('o_proj', 'out_proj')} fc1=ff_up fc2=ff_down",
    "gptj": f"{LLAMA.replace('o_proj', 'out_proj').replace('self_attn', 'attn')} mlp.fc_in=ff_up mlp.fc_out=ff_down",
    "gpt_neo": (
        f"{LLAMA.replace('o_proj', 'out_proj').replace('self_attn', 'attn.attention')} "
        "mlp.c_fc=ff_up mlp.c_proj=ff_down"
    ),
    "gpt2": "attn.c_attn=attn_qkv attn.c_proj=attn_o mlp.c_fc=ff_up mlp.c_proj=ff_down",
    "mpt": "attn.Wqkv=attn_qkv attn.out_proj=attn_o ffn.up_proj=ff_up ffn.down_proj=ff_down",
    "codegen": "attn.qkv_proj=attn_qkv attn.out_proj=attn_o mlp.fc_in=ff_up mlp.fc_out=ff_down",
    "phi3": "self_attn.qkv_proj=attn_qkv self_attn.o_proj=attn_o mlp.gate_up_proj=ff_gate_up mlp.down_proj=ff_down",
    **{
        name: f"{attention}.query_key_value=attn_qkv {attention}.dense=attn_o "
        "mlp.dense_h_to_4h=ff_up mlp.dense_4h_to_h=ff_down"
        for name, attention in (
            *(("bloom", "self_attention"), ("falcon (alibi)", "self_attention"), ("gpt_neox", "attention")),
            *(("persimmon", "self_attn"),),
        )
    },
}
# row -> modules that each placement adapts (0: it is refused), and roles that tell the row from others
MORE: dict[str, tuple[tuple[int, int, int, int, int], str]] = {
    # attn, ff, full, mixer, all
    "bamba": ((4, 6, 10, 1, 11), "mamba.in_proj=mixer_in mamba.out_proj=other self_attn.q_proj=attn_q"),
    "bart": ((8, 4, 12, 0, 12), "self_attn.q_proj=attn_q encoder_attn.q_proj=cross_attention fc1=ff_up"),
    "bert": ((8, 4, 12, 0, 12), "intermediate.dense=ff_up output.dense=ff_down attention.output.dense=attn_o"),
    "blt": ((24, 18, 42, 0, 42), "self_attn.q_proj=attn_q"),
    "ctrl": ((8, 4, 12, 0, 12), "multi_head_attention.Wq=attn_q multi_head_attention.dense=attn_o"),
    "dbrx": ((4, 0, 0, 0, 0), "norm_attn_norm.attn.Wqkv=attn_qkv ffn.experts.mlp=ff_experts"),
    "deepseek_v3": (
        (10, 6, 16, 0, 16),
        "self_attn.q_a_proj=attn_q self_attn.q_b_proj=attn_q self_attn.kv_a_proj_with_mqa=attn_kv "
        "self_attn.kv_b_proj=attn_kv mlp.shared_experts.up_proj=ff_up mlp.experts=ff_experts",
    ),
    "deepseek_v4": ((12, 9, 21, 0, 21), "self_attn.kv_proj=attn_kv self_attn.compressor.kv_proj=other"),
    "falcon_h1": ((8, 6, 14, 2, 16), "mamba.in_proj=mixer_in mamba.out_proj=other self_attn.o_proj=attn_o"),
    "gemma3n_text": ((12, 12, 24, 0, 24), "self_attn.q_proj=attn_q altup.correction_coefs=other"),
    "gemma4_text (experts)": ((8, 6, 14, 0, 14), "mlp.up_proj=ff_up experts=ff_experts router.proj=other"),
    "granitemoehybrid": ((4, 4, 8, 1, 9), "shared_mlp.input_linear=ff_gate_up block_sparse_moe.experts=ff_experts"),
    "hrm_text": ((16, 12, 28, 0, 28), "self_attn.q_proj=attn_q self_attn.gate_proj=other"),
    "jamba": ((4, 0, 0, 6, 0), "mamba.in_proj=mixer_in mamba.x_proj=other mamba.out_proj=mixer_out"),
    "jetmoe": ((0, 0, 0, 0, 0), "self_attention.experts.input_linear=attn_experts mlp.input_linear=ff_experts"),
    "kimi_linear": ((5, 9, 14, 8, 22), "self_attn.v_proj=mixer_in self_attn.b_proj=other self_attn.kv_b_proj=attn_kv"),
    "lfm2": ((4, 6, 10, 2, 12), "conv.in_proj=mixer_in conv.out_proj=mixer_out self_attn.out_proj=attn_o"),
    "llama4_text": ((8, 6, 14, 0, 14), "feed_forward.shared_expert.up_proj=ff_up feed_forward.experts=ff_experts"),
    "longcat_flash": ((20, 12, 32, 0, 32), "self_attn.0.q_a_proj=attn_q mlps.1.up_proj=ff_up mlp.experts=ff_experts"),
    "mamba": ((0, 0, 0, 2, 2), "mixer.in_proj=mixer_in mixer.x_proj=other mixer.out_proj=other"),
    "mllama (cross-attention)": ((8, 6, 14, 0, 14), "cross_attn.q_proj=cross_attention self_attn.q_proj=attn_q"),
    "modernbert-decoder": ((8, 4, 12, 0, 12), "attn.Wo=attn_o mlp.Wi=ff_gate_up mlp.Wo=ff_down"),
    "moshi": ((8, 4, 12, 0, 12), "self_attn.q_proj.linear=attn_q mlp.fc1=ff_gate_up"),
    "nemotron_h": ((4, 4, 8, 1, 9), "mixer.in_proj=mixer_in mixer.q_proj=attn_q mixer.shared_experts.up_proj=ff_up"),
    "olmo_hybrid": ((4, 6, 10, 5, 15), "linear_attn.v_proj=mixer_in linear_attn.a_proj=other"),
    "qwen2_moe": ((8, 6, 14, 0, 14), "mlp.shared_expert.gate_proj=ff_gate mlp.experts=ff_experts"),
    "qwen3_next": ((4, 6, 10, 2, 12), "linear_attn.in_proj_qkvz=mixer_in linear_attn.in_proj_ba=other"),
    "recurrent_gemma": ((4, 9, 13, 6, 19), "temporal_block.linear_x=mixer_in temporal_block.linear_out=mixer_out"),
    "reformer": ((21, 12, 33, 0, 33), "attention.self_attention.query_key=attn_qk feed_forward.output.dense=ff_down"),
    "rwkv": ((0, 4, 0, 8, 12), "attention.receptance=mixer_in attention.output=mixer_out feed_forward.key=ff_up"),
    "xlm": ((8, 4, 12, 0, 12), "q_lin=attn_q out_lin=attn_o lin1=ff_up lin2=ff_down"),
    "xlnet": ((0, 4, 0, 0, 0), "ff.layer_1=ff_up"),
    "xlstm": ((0, 6, 0, 10, 16), "mlstm_layer.q=mixer_in mlstm_layer.igate_preact=other ffn.proj_up_gate=ff_gate"),
    "zamba": ((8, 6, 14, 10, 24), "shared_transf.self_attn.q_proj=attn_q mamba_decoder.mamba.in_proj=mixer_in"),
    "zamba2": ((8, 4, 12, 5, 17), "shared_transformer.feed_forward.gate_up_proj=ff_gate_up mamba.out_proj=other"),
    "zaya": ((10, 0, 0, 0, 0), "self_attn.qkv_proj.v_proj_delayed=attn_v mlp.experts=ff_experts"),
}  # fmt: skip
FULL = PlacementSpec(name="full", roles=PLACEMENTS["full"])


def known(name: str) -> None:
    if name not in tiny_models.names():
        pytest.skip("a type that this transformers does not have")


@functools.cache
def targets_of(name: str) -> tuple[Target, ...]:
    known(name)
    return structure(tiny_models.outline(name))


def roles_of(name: str) -> dict[str, str]:
    """Module inside a block -> role, over all blocks."""
    inside = {t for t in targets_of(name) if t.layer is not None}
    return {re.sub(r"^.*?\.\d+\.", "", target.name): target.role for target in inside}


@pytest.mark.parametrize("name", FORMER)
def test_roles_that_were_found_before_stay(name: str) -> None:
    assert roles_of(name) == dict(pair.split("=") for pair in FORMER[name].split())
    assert [t.role for t in targets_of(name) if t.layer is None] == ["embedding", "head"]


@pytest.mark.parametrize("name", MORE)
def test_a_placement_resolves_to_so_many_modules_or_is_refused_in_one_line(name: str) -> None:
    counts, roles = MORE[name]
    found = roles_of(name)
    assert {leaf: found.get(leaf) for leaf in (pair.split("=")[0] for pair in roles.split())} == dict(
        pair.split("=") for pair in roles.split()
    )
    lines = report(targets_of(name))
    assert tuple(int(line) if line.isdigit() else 0 for line in lines.values()) == counts
    for placement, line in lines.items():
        assert line.isdigit() or (line.startswith(f"placement={placement}: ") and "\n" not in line)


@pytest.mark.parametrize("name", MORE)
def test_every_adapted_module_is_met_by_a_text_and_siblings_read_the_same_tensor(name: str) -> None:
    known(name)
    model = tiny_models.build(name)
    model.config.use_cache = False
    placed = [target for target in structure(model) if target.layer is not None and target.role in ROLES]
    met: dict[str, list[Any]] = {}  # holds the tensors, so that no two have one id
    for target in placed:
        module = model.get_submodule(target.name)
        module.register_forward_pre_hook(lambda _, args, name=target.name: met.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None])
    assert {target.name for target in placed} == set(met)
    for target in placed:
        assert {tensor.shape[-1] for tensor in met[target.name]} == {target.in_features}
        sibling = next(other for other in placed if other.inputs == target.inputs)
        assert met[target.name][0] is met[sibling.name][0]


@pytest.mark.parametrize(
    ("name", "matrices"), [("mixtral", 3 * 64), ("dbrx", 3 * 24), ("gemma4_text (experts)", 3 * 24)]
)
def test_a_token_pays_for_the_experts_it_meets(name: str, matrices: int) -> None:
    experts = [target for target in targets_of(name) if target.role == "ff_experts"]
    assert [one.in_features * one.out_features for one in experts] == [2 * 32 * matrices] * 2


def test_queries_beside_keys_of_another_input_are_no_siblings() -> None:
    roles = {target.name: target for target in targets_of("inkling2_text")}
    first, second = (roles[f"model.layers.{layer}.self_attn.q_proj"].inputs for layer in (0, 1))
    assert first == roles["model.layers.0.self_attn.k_proj"].inputs
    assert second != roles["model.layers.1.self_attn.k_proj"].inputs


def test_latent_keys_and_values_are_one() -> None:
    lines = report(targets_of("deepseek_v3"), ["attn_q", "attn_qk", "attn_qv", "attn_vo"])
    assert lines["attn_q"] == "4"
    for name in ("attn_qk", "attn_qv", "attn_vo"):
        assert "attn_k, attn_v are one matrix in this architecture" in lines[name]


def left(name: str, placement: str) -> list[str]:
    spec = PlacementSpec(name=placement, roles=PLACEMENTS[placement])
    return unadapted(targets_of(name), spec, layers=number_of_layers(targets_of(name)))


def test_what_a_placement_leaves_is_said() -> None:
    (line,) = left("lfm2", "full")
    assert line.startswith("placement=full leaves the token mixers that are not attention as they are: ")
    assert "conv.in_proj (32 -> 96)" in line
    assert "in 1 of 2 layers" in line
    assert "placement=all" in line
    assert left("lfm2", "all") == left("llama", "full") == left("llama", "all") == []
    (line,) = left("deepseek_v3", "ff")
    assert "(model.layers.1.mlp.experts)" in line
    assert left("deepseek_v3", "attn") == []
    (line,) = left("mamba", "mixer")
    assert "output projections" in line
    assert left("jamba", "mixer") == []


def test_a_layer_in_doubt_is_refused_and_one_with_another_mixer_is_not() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.something = nn.Sequential(nn.Linear(32, 32))
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))

    model: Any = tiny_models.outline("lfm2")
    attention = PlacementSpec(name="attn", roles=PLACEMENTS["attn"])
    assert {t.layer for t in resolve(structure(model), attention, layers=2)} == {1}
    model.model.layers.append(Odd())
    for name in ("attn", "full", "all"):
        spec = PlacementSpec(name=name, roles=PLACEMENTS[name])
        with pytest.raises(ModelError, match=r"attention modules of layers 2\..*something\.0 \(32 -> 32\)"):
            resolve(structure(model), spec, layers=3)


def test_names_that_peft_refuses_are_those_that_it_refuses() -> None:
    from peft import LoraConfig, get_peft_model

    for name in ("mamba", "falcon_h1", "nemotron_h"):
        known(name)
        model = tiny_models.outline(name)
        assert "out_proj" in peft_refuses(name)
        assert set(peft_refuses(name)) == set(bypassed(name))
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
    assert peft_refuses("llama") == bypassed("llama") == ()
    assert peft_refuses("bamba") == ()
    assert bypassed("bamba") == ("out_proj",)


@pytest.mark.parametrize("name", ["lfm2", "olmo_hybrid", "mamba2", "minicpm3", "rwkv", "xlm"])
def test_operations_are_those_of_the_products_that_are_called(name: str) -> None:
    known(name)
    model = tiny_models.build(name)
    model.config.use_cache = False
    products: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            size = 2 * module.in_features * module.out_features
            module.register_forward_pre_hook(lambda *_, size=size: products.append(size))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None])
    assert budget.forward_flops_per_token(structure(model), length=0) == sum(products)


def test_training_costs_count_the_mixers_that_are_adapted() -> None:
    targets = targets_of("lfm2")
    spec = PlacementSpec(name="all", roles=PLACEMENTS["all"])
    ranks = budget.uniform(resolve(targets, spec, layers=2), 4)
    fewer = {target: rank for target, rank in ranks.items() if not target.role.startswith("mixer")}
    mixers = [target for target in ranks if target.role.startswith("mixer")]
    more = budget.train_flops_per_token(targets, ranks, length=8) - budget.train_flops_per_token(
        targets, fewer, length=8
    )
    assert more >= sum(4 * 4 * (target.in_features + target.out_features) for target in mixers)
    kept = [budget.activation_bytes(targets, r, batch_size=2, length=8, bytes_per_value=4) for r in (ranks, fewer)]
    assert kept[0] >= kept[1] > 0


def test_a_block_used_at_two_layers_has_an_adapter_at_each_and_its_weights_once() -> None:
    targets = targets_of("zamba")
    placed = resolve(targets, PlacementSpec(name="attn", roles=PLACEMENTS["attn"]), layers=5)
    assert [target.shares for target in placed[:4]] == [None] * 4
    assert [target.shares for target in placed[4:]] == [target.name for target in placed[:4]]
    ranks = budget.uniform(placed, 4)
    lora = sum(4 * (target.in_features + target.out_features) for target in placed)
    assert methods.trainable(MethodSpec(name="lora"), ranks) == lora
    weights = sum(target.in_features * target.out_features for target in placed[:4])
    assert methods.trainable(MethodSpec(name="full_ft", options={"modules": "placed"}), ranks) == weights
    assert all(target.shares is None for name in ("llama", "gpt2", "bloom") for target in targets_of(name))


def test_fused_roles_are_made_of_roles() -> None:
    assert {part for parts in FUSED.values() for part in parts} <= set(ROLES)
    with pytest.raises(SpecError, match="no mixer_in, mixer_out"):
        resolve(targets_of("llama"), PlacementSpec(name="mixer", roles=PLACEMENTS["mixer"]), layers=2)
    assert resolve(targets_of("llama"), PlacementSpec(name="all", roles=PLACEMENTS["all"]), layers=2) == resolve(
        targets_of("llama"), FULL, layers=2
    )
