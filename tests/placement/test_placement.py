"""Roles are read from structure: one tiny model of every supported family, and the published counts."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sweeper.errors import ModelError, SpecError, unknown
from sweeper.models.architecture import matches, structure
from sweeper.placement.lattice import LATTICE
from sweeper.placement.placement import PLACEMENTS, Target, check_rank, number_of_layers, resolve, select_layers
from sweeper.spec import PlacementSpec, from_mapping, typed_fields

CONF = Path(__file__).parents[2] / "conf" / "placement"
LAYERS = 2
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD = {"n_embd": 32, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 64} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_o": "o_proj",
    "ff_gate": "gate_proj",
    "ff_up": "up_proj",
    "ff_down": "down_proj",
}
NEOX = {"attn_qkv": "query_key_value", "attn_o": "dense", "ff_up": "dense_h_to_4h", "ff_down": "dense_4h_to_h"}
# model type -> config, name of a block, role -> module inside the block
FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    **{
        kind: (
            TINY | ({"head_dim": 8} if kind.startswith(("gemma", "qwen3")) else {}),
            "model.layers.{}",
            {r: ("self_attn." if r.startswith("attn") else "mlp.") + leaf for r, leaf in GATED.items()},
        )
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    },
    "phi3": (
        TINY,
        "model.layers.{}",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_o": "self_attn.o_proj",
            "ff_gate_up": "mlp.gate_up_proj",
            "ff_down": "mlp.down_proj",
        },
    ),
    "gpt2": (
        OLD,
        "transformer.h.{}",
        {"attn_qkv": "attn.c_attn", "attn_o": "attn.c_proj", "ff_up": "mlp.c_fc", "ff_down": "mlp.c_proj"},
    ),
    "gpt_neox": (
        TINY,
        "gpt_neox.layers.{}",
        {r: ("attention." if r.startswith("attn") else "mlp.") + leaf for r, leaf in NEOX.items()},
    ),
    "opt": (
        {key: value for key, value in TINY.items() if key != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers.{}",
        {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_o": "self_attn.out_proj",
            "ff_up": "fc1",
            "ff_down": "fc2",
        },
    ),
    "falcon": (
        TINY | {"ffn_hidden_size": 48},
        "transformer.h.{}",
        {r: ("self_attention." if r.startswith("attn") else "mlp.") + leaf for r, leaf in NEOX.items()},
    ),
    "bloom": (
        OLD,
        "transformer.h.{}",
        {r: ("self_attention." if r.startswith("attn") else "mlp.") + leaf for r, leaf in NEOX.items()},
    ),
}


@functools.lru_cache
def targets_of(kind: str) -> tuple[Target, ...]:
    return structure(build(kind, FAMILIES[kind][0]))


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))


def placed(targets: tuple[Target, ...], name: str, **fields: Any) -> tuple[Target, ...]:
    spec = PlacementSpec(name=name, **({"roles": PLACEMENTS.get(name, ())} | fields))
    return resolve(targets, spec, layers=number_of_layers(targets))


def parameters(targets: Iterable[Target], rank: int) -> int:
    return sum(rank * (target.in_features + target.out_features) for target in targets)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_module_of_a_block_has_its_role(kind: str) -> None:
    _, block, roles = FAMILIES[kind]
    wanted = {f"{block.format(layer)}.{leaf}": (role, layer) for layer in range(LAYERS) for role, leaf in roles.items()}
    found = {t.name: (t.role, t.layer) for t in targets_of(kind) if t.layer is not None}
    assert found == wanted
    assert [t.role for t in targets_of(kind) if t.layer is None] == ["embedding", "head"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_shapes_are_those_of_the_modules(kind: str) -> None:
    model = build(kind, FAMILIES[kind][0])
    for target in targets_of(kind):
        weight = model.get_submodule(target.name).weight
        shape = (target.in_features, target.out_features)
        assert tuple(weight.shape) == (shape[::-1] if target.kind == "linear" else shape)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_adapts_exactly_its_roles_or_is_refused(kind: str, name: str) -> None:
    _, block, roles = FAMILIES[kind]
    asked, fused = set(PLACEMENTS[name]), "attn_qkv" in roles
    if fused and name in ("attn_q", "attn_qk", "attn_qv", "attn_vo"):
        workable = r"one matrix in this architecture \(.*\), .* Choose from attn, ff, ff_in, ff_out, full, custom\."
        with pytest.raises(SpecError, match=workable):
            placed(targets_of(kind), name)
        return
    if name == "mixer":
        with pytest.raises(SpecError, match=r"no mixer_in, mixer_out\. Choose from attn, .*full, custom\."):
            placed(targets_of(kind), name)
        return
    parts = {"attn_qkv": {"attn_q", "attn_k", "attn_v"}, "ff_gate_up": {"ff_gate", "ff_up"}}
    wanted = {
        f"{block.format(layer)}.{leaf}"
        for layer in range(LAYERS)
        for role, leaf in roles.items()
        if parts.get(role, {role}) <= asked
    }
    assert {t.name for t in placed(targets_of(kind), name)} == wanted


@pytest.mark.parametrize("kind", FAMILIES)
def test_modules_that_share_an_input_are_those_called_on_one_tensor(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind][0])).eval()
    seen: dict[str, int] = {}
    targets = [t for t in targets_of(kind) if t.layer is not None]
    hooks = [
        model.get_submodule(t.name).register_forward_pre_hook(
            lambda _, args, name=t.name: seen.update({name: id(args[0])})
        )
        for t in targets
    ]
    tensors = []  # kept alive, so that an id is of one tensor only
    hooks += [
        model.get_submodule(t.name).register_forward_pre_hook(lambda _, args: tensors.append(args[0])) for t in targets
    ]
    with torch.no_grad():
        model(torch.arange(6)[None])
    for hook in hooks:
        hook.remove()
    for key in {t.inputs for t in targets}:
        assert len({seen[t.name] for t in targets if t.inputs == key}) == 1
    groups = {key: {t.role for t in targets if t.inputs == key} for key in {t.inputs for t in targets}}
    roles = set(FAMILIES[kind][2])
    assert {"attn_q", "attn_k", "attn_v"} & roles in (set(), *groups.values())
    assert all(group in ({"attn_o"}, {"ff_down"}) for group in groups.values() if group & {"attn_o", "ff_down"})


def test_counts_are_those_of_the_known_answers() -> None:
    shape = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
    model = build("gpt2", shape)
    targets = structure(model)
    assert sum(p.numel() for p in model.parameters()) == 354_823_168
    for name, count in {"attn": 2_359_296, "ff": 3_932_160, "full": 6_291_456}.items():
        assert parameters(placed(targets, name), 16) == count
    by_name = {("c_attn", "c_proj"): 4_325_376, ("c_fc",): 1_966_080, ("c_attn", "c_proj", "c_fc"): 6_291_456}
    for patterns, count in by_name.items():
        assert parameters(placed(targets, "custom", patterns=patterns), 16) == count
    assert parameters(placed(targets, "custom", patterns=(r"attn\.c_proj", "c_attn")), 16) == 2_359_296


def test_counts_of_the_default_model() -> None:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "pad_token_id": 0}
    model = build("llama", shape)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert parameters(placed(structure(model), "attn"), 8) == 921_600


def test_embeddings_and_head_are_opt_in() -> None:
    targets = targets_of("llama")
    assert {t.layer for t in placed(targets, "full")} == {0, 1}
    assert {t.role for t in placed(targets, "both", embeddings=True, head=True)} == {"embedding", "head"}
    assert {t.role for t in placed(targets, "attn_q", head=True)} == {"attn_q", "head"}
    with pytest.raises(SpecError, match=r"placement\.head=true"):
        placed(targets, "custom", patterns=("lm_head",))


def test_modules_come_in_model_order() -> None:
    targets = targets_of("opt")
    names = [t.name for t in targets]
    assert [t.name for t in placed(targets, "full")] == [name for name in names if ".layers." in name]
    patterns = ("fc2", "q_proj")
    reverse = placed(targets, "custom", patterns=patterns[::-1])
    assert placed(targets, "custom", patterns=patterns) == reverse


@pytest.mark.parametrize(
    ("layers", "count", "picked"),
    [
        ("all", 3, (0, 1, 2)),
        ("lower_half", 5, (0, 1)),
        ("upper_half", 5, (2, 3, 4)),
        ("middle_half", 8, (2, 3, 4, 5)),
        ("middle_half", 30, tuple(range(7, 22))),
        ("every_other", 5, (0, 2, 4)),
        ("first:2", 5, (0, 1)),
        ("last:2", 5, (3, 4)),
        ("last:5", 5, (0, 1, 2, 3, 4)),
        ((4, 1), 5, (1, 4)),
    ],
)
def test_layers(layers: Any, count: int, picked: tuple[int, ...]) -> None:
    assert select_layers(layers, count) == picked


@pytest.mark.parametrize("count", [2, 3, 12, 31])
def test_the_halves_part_the_layers(count: int) -> None:
    assert select_layers("lower_half", count) + select_layers("upper_half", count) == tuple(range(count))


@pytest.mark.parametrize("layers", ["lower", "first:0", "last:6", "first:", "first:-1", (5,), (-1,), (1, 1), ()])
def test_layers_that_the_model_does_not_have_are_refused(layers: Any) -> None:
    with pytest.raises(SpecError, match=r"placement\.layers="):
        select_layers(layers, 5)


def test_layers_compose_with_roles_and_with_patterns() -> None:
    targets = targets_of("gpt2")
    assert [t.name for t in placed(targets, "attn", layers="last:1")] == [
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
    ]
    assert [t.name for t in placed(targets, "custom", patterns=("c_fc",), layers=(0,))] == ["transformer.h.0.mlp.c_fc"]
    with pytest.raises(SpecError, match="matches no module in layers last:1"):
        placed(targets, "custom", patterns=(r"h\.0\.mlp\.c_fc",), layers="last:1")


@pytest.mark.parametrize("pattern", ["c_projj", "proj", "attn", ".*_head"])
def test_a_pattern_without_a_match_is_refused_even_beside_one_with(pattern: str) -> None:
    with pytest.raises(SpecError, match=re.escape(repr(pattern)) + r" matches no module.*attn\.c_attn \(32 -> 96\)"):
        placed(targets_of("gpt2"), "custom", patterns=("c_attn", pattern))


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(SpecError, match="no regular expression"):
        placed(targets_of("gpt2"), "custom", patterns=("c_attn(",))


def test_unknown_and_absent_roles_are_refused() -> None:
    with pytest.raises(SpecError, match=r"placement\.roles=attn_x.*attn_q, .*Did you mean"):
        placed(targets_of("gpt2"), "mine", roles=("attn_x",))
    with pytest.raises(SpecError, match="no ff_gate"):
        placed(targets_of("gpt2"), "mine", roles=("ff_gate",))
    assert {t.role for t in placed(targets_of("gpt2"), "mine", roles=("attn_qkv",))} == {"attn_qkv"}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_adapts_attention_and_refuses_feed_forward(kind: str) -> None:
    config = TINY | {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
    targets = structure(build(kind, config))
    assert {t.role for t in placed(targets, "attn")} == {"attn_q", "attn_k", "attn_v", "attn_o"}
    for name in ("ff", "full", "ff_in", "ff_out"):
        with pytest.raises(
            SpecError, match=r"mixtures of experts \(model\.layers\.0\.mlp\.experts\).*Choose from attn,"
        ):
            placed(targets, name)
    experts = next(t for t in targets if t.kind == "experts")
    assert experts.in_features * experts.out_features == 2 * 3 * 32 * 48
    assert not any("gate" in t.name.rpartition(".")[2] for t in targets)


def test_a_vision_tower_is_no_target() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    targets = structure(build("gemma3", {"text_config": TINY | {"head_dim": 8}, "vision_config": vision}))
    assert number_of_layers(targets) == LAYERS
    assert len(placed(targets, "full")) == 7 * LAYERS
    assert not any("vision" in t.name for t in targets)


MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def test_an_unknown_architecture_shows_its_modules_and_how_to_declare_roles() -> None:
    targets = structure(build("mamba", MAMBA))
    with pytest.raises(
        ModelError, match=r"mixer\.in_proj \(32 -> 128\).*conf/model, for example roles: {attn_q"
    ) as caught:
        placed(targets, "attn")
    assert "\n" not in str(caught.value)
    assert [t.layer for t in placed(targets, "custom", patterns=("in_proj",))] == [0, 1]


def test_declared_roles_are_used() -> None:
    roles = {"attn_qkv": r"mixer\.in_proj", "attn_o": r"mixer\.out_proj"}
    targets = structure(build("mamba", MAMBA), roles)
    assert [t.name.rpartition(".")[2] for t in placed(targets, "attn", layers="last:1")] == ["in_proj", "out_proj"]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"attn": "in_proj"}, "model.roles=attn: no such"),
        ({"attn_q": "nothing"}, "matches no module"),
        ({"attn_q": "in_proj", "attn_k": "in_proj"}, "declared both"),
        ({"attn_q": "("}, "no regular expression"),
    ],
)
def test_declared_roles_that_cannot_be_used_are_refused(roles: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        structure(build("mamba", MAMBA), roles)


def test_a_model_without_blocks_can_still_be_adapted_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    targets = structure(model)
    assert [t.name for t in placed(targets, "custom", patterns=("1",))] == ["1"]
    with pytest.raises(ModelError, match="this model"):
        placed(targets, "attn")
    with pytest.raises(ModelError, match="no linear module"):
        structure(nn.ReLU())


def test_two_unnamed_feed_forward_matrices_are_told_apart_by_shape() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    assert [t.role for t in structure(model)] == ["ff_up", "ff_down"] * 2


def test_rank_above_a_matrix_names_module_and_limit() -> None:
    targets = placed(targets_of("llama"), "attn")
    check_rank(targets, 16)
    with pytest.raises(
        SpecError, match=r"rank=17 .*model\.layers\.0\.self_attn\.k_proj \(32 x 16\): choose at most 16"
    ):
        check_rank(targets, 17)


@pytest.mark.parametrize(
    "path", [path for path in sorted(CONF.glob("*.yaml")) if path.stem != LATTICE], ids=lambda path: path.stem
)
def test_the_configuration_files_hold_the_placements(path: Path) -> None:
    fields = yaml.safe_load(path.read_text())
    assert fields["name"] == path.stem
    if path.stem == "custom":
        with pytest.raises(SpecError, match=r"placement=custom: 'placement\.patterns="):
            from_mapping(PlacementSpec, fields)
        fields["patterns"] = ["c_fc"]
    spec = from_mapping(PlacementSpec, fields)
    assert spec.roles == PLACEMENTS.get(path.stem, ())
    assert set(fields) == set(typed_fields(PlacementSpec))


def test_every_placement_has_a_configuration_file() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {*PLACEMENTS, "custom", LATTICE}


def test_where_no_named_placement_is_possible_custom_is_what_is_left() -> None:
    """Its only known role is one of the two ends of the attention, which no placement has alone."""
    target = Target(name="l.0.o", role="attn_o", layer=0, in_features=8, out_features=8, kind="linear", inputs="x")
    with pytest.raises(SpecError, match=r"this model has no attn_q\. Choose from custom\.$"):
        resolve([target], PlacementSpec(name="attn_q", roles=("attn_q",)), layers=1)


def test_a_choice_among_nothing_says_so() -> None:
    assert unknown("metric", "nl", []) == "metric=nl: no such metric; there is none to choose from here."


def test_a_pattern_may_begin_with_flags() -> None:
    name = "model.layers.0.mlp.down_proj"
    assert matches(r"(?i)MLP\.down_proj", name)
    assert not matches(r"MLP\.down_proj", name)
    with pytest.raises(re.error):
        matches("down(?i)proj", name)
