"""What the matrices of one transformer block do, told from their place, their names and their shapes."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_o")
FEED_FORWARD = ("ff_gate", "ff_up", "ff_down")
# into and out of a token mixer that is not attention: state space, linear attention, gated convolution, recurrence
MIXER = ("mixer_in", "mixer_out")
# one matrix that does the work of several roles
FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_qk": ("attn_q", "attn_k"),
    "attn_kv": ("attn_k", "attn_v"),
    "ff_gate_up": ("ff_gate", "ff_up"),
}
ROLES = (*ATTENTION, *FEED_FORWARD, *MIXER, *FUSED)
# roles of modules that no role-based placement adapts; a text alone never passes through cross-attention
EXPERTS, ATTENTION_EXPERTS, CROSS = "ff_experts", "attn_experts", "cross_attention"
OTHER, EMBEDDING, HEAD = "other", "embedding", "head"

# leaf names with their role, valid only inside the part of the block they belong to
_ATTENTION_LEAVES: Mapping[str, tuple[str, ...]] = {
    "attn_q": ("q_proj", "q", "query", "wq", "Wq", "query_proj", "q_lin", "project_q"),
    "attn_k": ("k_proj", "k", "key", "wk", "Wk", "key_proj", "k_lin", "project_k"),
    "attn_v": ("v_proj", "v", "value", "wv", "Wv", "value_proj", "v_lin", "project_v"),
    "attn_qkv": ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv"),
    "attn_o": (
        *("o_proj", "out_proj", "dense", "c_proj", "wo", "o", "proj"),
        *("Wo", "out_lin", "attention_out"),
    ),
}
# what else attention is made of: shared keys and queries (Reformer), latent keys and values (DeepSeek), one of both
_ATTENTION_MORE: Mapping[str, tuple[str, ...]] = {
    "attn_q": ("q_a_proj", "q_b_proj", "q_gate_proj"),
    "attn_qk": ("query_key",),
    "attn_v": ("v_proj_current", "v_proj_delayed"),
    "attn_kv": ("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "attn_o": ("o_b_proj",),
}
_FEED_FORWARD_LEAVES: Mapping[str, tuple[str, ...]] = {
    "ff_gate": ("gate_proj", "w1", "gate", "proj_up_gate", "w_0"),
    "ff_up": (
        *("up_proj", "w3", "up", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "wi"),
        *("proj_up", "w_1", "lin1"),
    ),
    "ff_gate_up": ("gate_up_proj", "input_linear"),
    "ff_down": (
        *("down_proj", "w2", "down", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo"),
        *("proj_down", "w_out", "lin2", "output_linear"),
    ),
}
# RWKV's channel mixing; the matrix that gates its output is neither
_CHANNEL_MIXING: Mapping[str, tuple[str, ...]] = {"ff_up": ("key",), "ff_down": ("value",)}
_MIXER_LEAVES: Mapping[str, tuple[str, ...]] = {
    "mixer_in": (
        *("in_proj", "in_proj_qkv", "in_proj_z", "in_proj_qkvz", "linear_x", "linear_y"),
        *("q_proj", "k_proj", "v_proj", "g_proj", "q", "k", "v", "ogate_preact", "key", "value", "receptance"),
    ),
    "mixer_out": ("out_proj", "o_proj", "linear_out", "output"),
}
_ATTENTION_PARTS = ("attn", "attention", "self_attn", "self_attention")
_FEED_FORWARD_PARTS = ("mlp", "ffn", "ff", "feed_forward", "block_sparse_moe")
_FEED_FORWARD_CLASSES = ("mlp", "feedforward", "ffn", "moe", "experts")
_CROSS_PARTS = ("encoder_attn", "cross_attn", "cross_attention", "crossattention", "crossattn")
_MIXER_CLASSES = ("mamba", "mixer", "deltanet", "deltaattention", "shortconv", "recurrentblock", "lstm")
_STATE = ("A_log", "dt_bias", "time_decay")  # parameters of a recurrence
# inside a part, but work beside it: what selects keys, compresses them, or was added to a shared block
_ASIDE = ("indexer", "compressor", "adapter", "router", "sconv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One module that can be adapted. `inputs` is equal for modules called on the very same input tensor.

    `shares` names an earlier module that has the same weight, as a block does that is used at several layers.
    kind "experts" stands for a mixture's expert weights, which are counted but not adapted: there
    `in_features * out_features` is the number of weights one token meets.
    """

    name: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    kind: str
    inputs: str
    shares: str | None = None


Named = tuple[str, "nn.Module"]
Matrices = Mapping[str, Target]


def block_targets(members: Sequence[Named], matrices: Matrices) -> Iterator[Target]:
    """The matrices of one block with their roles, its expert weights among them; `members` are the block's children."""
    parts = _parts(members, matrices)
    # OPT keeps its two feed-forward matrices in the block itself, BERT in two modules of it
    loose = [matrices[full] for full, _ in members if full in matrices]
    if not parts["feed_forward"]:
        for one in [one for one in parts["other"] if one[0].endswith((".intermediate", ".output"))]:
            parts["other"].remove(one)
            inside = _inside(one[0], matrices)
            loose += [target for target in inside if not _is_aside(target.name)]
            yield from (target for target in inside if _is_aside(target.name))
    for kind, found in parts.items():
        for full, module in found:
            inside = _inside(full, matrices)
            if kind == "feed_forward" and _holds_experts(full, module):
                yield from _mixture(full, module, inside, members)
            elif kind == "attention" and any("experts" in type(one).__name__.lower() for one in module.modules()):
                yield from _experts(full, module, ATTENTION_EXPERTS, members)
                yield from inside
            elif kind == "cross":
                yield from (replace(target, role=CROSS) for target in inside)
            elif kind == "mixer":
                yield from _mixer(inside)
            elif kind == "other" or not _alone(full, module, found):
                yield from inside
            elif kind == "attention":
                yield from _attention(full, inside, one_input=_has_one_input(module))
            else:
                aside = [target for target in inside if _is_aside(target.name.removeprefix(full))]
                yield from aside
                yield from _feed_forward([target for target in inside if target not in aside])
    yield from loose if parts["feed_forward"] else _feed_forward(loose)


def block_members(name: str, block: "nn.Module") -> list[Named]:
    return [(f"{name}.{child_name}", child) for child_name, child in block.named_children()]


def peft_refuses(model_type: str | None) -> tuple[str, ...]:
    """Leaf names that PEFT puts no LoRA on in models of a type, for Mamba's kernels read those weights themselves."""
    types = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
    return ("out_proj", "conv1d") if model_type in types else ()


def bypassed(model_type: str | None) -> tuple[str, ...]:
    """Leaf names of a token mixer that an adapter has no hold on: what PEFT refuses, and where it does not know of it
    the output projection that the fused kernel of a Mamba 2 layer multiplies with itself.
    """
    return ("out_proj",) if model_type in ("bamba", "granitemoehybrid", "zamba2") else peft_refuses(model_type)


def _parts(members: Sequence[Named], matrices: Matrices) -> dict[str, list[Named]]:
    """The parts of a block by kind. Lists of parts and blocks inside the block are taken apart."""
    from torch import nn

    parts: dict[str, list[Named]] = {kind: [] for kind in ("attention", "feed_forward", "mixer", "cross", "other")}
    for full, child in members:
        if full in matrices or not (_inside(full, matrices) or _holds_experts(full, child)):
            continue
        kind = _part(full.rpartition(".")[2], child)
        listed = isinstance(child, nn.ModuleList) and not _are_experts(full, child)
        if listed or (kind == "other" and not full.endswith("norm")):
            inner = _parts(block_members(full, child), matrices)
            if any(found for other, found in inner.items() if other != "other"):
                for other, found in inner.items():
                    parts[other] += found
                # what lies loose in a block inside the block
                parts["other"] += [(name, part) for name, part in block_members(full, child) if name in matrices]
                continue
        parts[kind].append((full, child))
    return parts


def _part(name: str, module: "nn.Module") -> str:
    kind = type(module).__name__.lower()
    if name in _CROSS_PARTS:
        return "cross"
    recurs = any(hasattr(module, parameter) for parameter in _STATE)
    mixes = any(word in kind for word in _MIXER_CLASSES) and not ("decoderlayer" in kind or "feedforward" in kind)
    if recurs or mixes:
        return "mixer"
    if name in _ATTENTION_PARTS or ("decoderlayer" not in kind and ("attention" in kind or "attn" in kind)):
        return "attention"
    if name in _FEED_FORWARD_PARTS or any(word in kind for word in _FEED_FORWARD_CLASSES):
        return "feed_forward"
    return "other"


def _inside(full: str, matrices: Matrices) -> list[Target]:
    return [target for other, target in matrices.items() if other == full or other.startswith(f"{full}.")]


def _alone(full: str, module: "nn.Module", found: Sequence[Named]) -> bool:
    """Whether a part is the only one of its kind, beside equals in the same list and beside mixtures of experts."""
    if full.rpartition(".")[2].isdigit():
        return True
    return sum(not _holds_experts(*other) for other in found) == 1


def _has_one_input(module: "nn.Module") -> bool:
    """Whether an attention reads queries, keys and values from one tensor; Inkling 2's reads three."""
    names = inspect.signature(module.forward).parameters
    return not any(name in names for name in ("key_hidden_states", "value_hidden_states"))


def _attention(full: str, inside: Sequence[Target], *, one_input: bool) -> Iterator[Target]:
    core = [target for target in inside if not _is_aside(target.name.removeprefix(full))]
    yield from (target for target in inside if target not in core)
    roles = _named(core, _ATTENTION_LEAVES)
    if len(roles) == len(set(roles.values())) and _attention_fits({role: t for t, role in roles.items()}):
        yield from _given(core, roles, siblings=one_input)
        return
    both = {
        role: (*_ATTENTION_LEAVES.get(role, ()), *_ATTENTION_MORE.get(role, ()))
        for role in (*_ATTENTION_LEAVES, *_ATTENTION_MORE)
    }
    roles = _named(core, both)
    if set(roles.values()) == {"attn_q", "attn_k", "attn_o"}:
        roles = {target: "attn_kv" if role == "attn_k" else role for target, role in roles.items()}  # keys as values
    kinds = (
        {"attn_q", "attn_k", "attn_v", "attn_o"}, {"attn_q", "attn_kv", "attn_o"}, {"attn_qk", "attn_v", "attn_o"},
        {"attn_q", "attn_o"},  # keys and values are another layer's
    )  # fmt: skip
    yield from _given(core, roles if set(roles.values()) in kinds else {}, siblings=False)


def _feed_forward(inside: Sequence[Target]) -> Iterator[Target]:
    """Roles by leaf name where names and shapes agree, by shape alone for two matrices, else none."""
    for table in (_FEED_FORWARD_LEAVES, _CHANNEL_MIXING):
        roles = _named(inside, table)
        fits = len(roles) == len(set(roles.values())) and _feed_forward_fits({role: t for t, role in roles.items()})
        if fits:
            yield from _given(inside, roles, siblings=table is _FEED_FORWARD_LEAVES)
            return
    yield from _given(inside, {target: role for role, target in _by_shape(inside).items()})


def _mixer(inside: Sequence[Target]) -> Iterator[Target]:
    roles = _named(inside, _MIXER_LEAVES)
    width = max((target.in_features for target, role in roles.items() if role == "mixer_in"), default=0)
    fits = {target.in_features for target, role in roles.items() if role == "mixer_in"} == {width}
    fits &= {target.out_features for target, role in roles.items() if role == "mixer_out"} == {width}
    yield from _given(inside, roles if fits else {}, siblings=False)


def _named(inside: Iterable[Target], table: Mapping[str, tuple[str, ...]]) -> dict[Target, str]:
    by_leaf = {leaf: role for role, leaves in table.items() for leaf in leaves}
    found = {target: by_leaf.get(_leaf(target.name)) for target in inside}
    return {target: role for target, role in found.items() if role is not None}


def _leaf(name: str) -> str:
    """The last part of a name; Moshi and BERT wrap a matrix in a module that has the telling name."""
    path = name.split(".")
    if path[-1] == "linear" and len(path) > 1:
        return path[-2]
    return path[-1]


def _given(inside: Sequence[Target], roles: Mapping[Target, str], *, siblings: bool = True) -> list[Target]:
    """Targets with the roles found; with `siblings` those that lead into one part share its input."""
    entry = set(roles.values()) - {"attn_o", "ff_down", "mixer_out"} if siblings else set()
    return [
        replace(
            target,
            role=roles.get(target, OTHER),
            inputs=f"{target.name.rpartition('.')[0]}:in" if roles.get(target) in entry else target.name,
        )
        for target in inside
    ]


def _is_aside(path: str) -> bool:
    return any(word in path for word in _ASIDE)


def _attention_fits(roles: Mapping[str, Target]) -> bool:
    if set(roles) == {"attn_q", "attn_k", "attn_v", "attn_o"}:
        out = roles["attn_o"].out_features
        widths = {roles[role].in_features for role in FUSED["attn_qkv"]}
        return widths in ({out}, {2 * out})  # Zamba's attention reads the embedding as well
    if set(roles) == {"attn_qkv", "attn_o"}:
        fused, out_projection = roles["attn_qkv"], roles["attn_o"]
        return fused.in_features == out_projection.out_features and fused.out_features > out_projection.in_features
    return False


def _feed_forward_fits(roles: Mapping[str, Target]) -> bool:
    if "ff_down" not in roles or set(roles) - {"ff_down"} not in ({"ff_up"}, {"ff_gate", "ff_up"}, {"ff_gate_up"}):
        return False
    down = roles["ff_down"]
    wide = {role: down.in_features * (2 if role == "ff_gate_up" else 1) for role in roles if role != "ff_down"}
    return all(
        roles[role].in_features == down.out_features and roles[role].out_features == width
        for role, width in wide.items()
    )


def _by_shape(inside: Sequence[Target]) -> dict[str, Target]:
    """Two matrices that go out to a wider space and back are a feed-forward block whatever they are called."""
    if len(inside) != 2:
        return {}
    down, first = sorted(inside, key=lambda target: target.out_features)
    if down.out_features == down.in_features:
        return {}
    for role in ("ff_up", "ff_gate_up"):
        if _feed_forward_fits({role: first, "ff_down": down}):
            return {role: first, "ff_down": down}
    return {}


def _are_experts(name: str, module: "nn.Module") -> bool:
    """Whether a list of modules is one of experts: it is called so, or each of them is a feed-forward block."""
    from torch import nn

    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    return "expert" in name.rpartition(".")[2].lower()


def _expert_weights(name: str, module: "nn.Module") -> "list[nn.Parameter]":
    """The weights of experts that a module holds itself: three-dimensional, or in one matrix (DBRX), or in a list."""
    from torch import nn

    if _are_experts(name, module):
        return [p for p in module.parameters() if p.ndim == 2]
    if isinstance(module, nn.Conv1d):
        return []
    if hasattr(module, "moe_num_experts"):
        return [p for p in module.parameters(recurse=False) if p.ndim == 2]
    return [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] > 1]


def _holds_experts(name: str, module: "nn.Module") -> bool:
    return any(
        _expert_weights(f"{name}.{child_name}".rstrip("."), child) for child_name, child in module.named_modules()
    )


def _experts(name: str, module: "nn.Module", role: str, beside: Sequence[Named]) -> Iterator[Target]:
    """One target for the expert weights of each module that holds some; the router may lie beside it in the block."""
    for child_name, child in module.named_modules():
        full = f"{name}.{child_name}" if child_name else name
        weights = _expert_weights(full, child)
        if not weights:
            continue
        experts = _number_of_experts(child, weights)
        width = min(min(p.shape[-2:]) for p in weights)
        active = _active_experts([module, *(other for _, other in beside)], experts)
        used = sum(p.numel() for p in weights) * active // experts
        yield Target(
            name=full, role=role, layer=None, in_features=width, out_features=used // width, kind="experts", inputs=full
        )  # fmt: skip


def _mixture(name: str, module: "nn.Module", inside: Sequence[Target], beside: Sequence[Named]) -> Iterator[Target]:
    """A target for all expert weights, the experts that every token meets with their roles; no router."""
    experts = list(_experts(name, module, EXPERTS, beside))
    yield from experts
    holders = {one.name: module.get_submodule(one.name.removeprefix(name).removeprefix(".")) for one in experts}
    counts = {_number_of_experts(one, _expert_weights(full, one)) for full, one in holders.items()}
    left = [
        target
        for target in inside
        if not any(target.name.startswith(f"{one.name}.") for one in experts)
        and target.out_features not in {1, *counts}
    ]
    shared = [target for target in left if not _is_aside(target.name.removeprefix(name))]
    by_parent: dict[str, list[Target]] = {}
    for target in shared:
        by_parent.setdefault(target.name.rpartition(".")[0], []).append(target)
    for members in by_parent.values():
        yield from _feed_forward(members)
    yield from (target for target in left if target not in shared)


def _number_of_experts(holder: "nn.Module", weights: "Sequence[nn.Parameter]") -> int:
    from torch import nn

    if isinstance(holder, nn.ModuleList):
        return len(holder)
    return int(getattr(holder, "moe_num_experts", weights[0].shape[0]))


def _active_experts(modules: "Sequence[nn.Module]", experts: int) -> int:
    """How many experts a token meets, as a router or else its config says; all of them where nothing does."""
    inside = [child for module in modules for child in module.modules()]
    for one in (*inside, *(child.config for child in inside if hasattr(child, "config"))):
        for attribute in ("top_k", "num_experts_per_tok", "top_k_experts"):
            value = getattr(one, attribute, None)
            if isinstance(value, int):
                return min(value, experts)
    return experts
