"""A model's structure read into roles: which module is the query projection, which the feed-forward output.

A module's role follows from its place: the list of transformer blocks, inside a block the attention and the
feed-forward part, inside a part the leaf name and the shape. A leaf name alone says nothing: GPT-2 calls both
the attention output and the feed-forward output `c_proj`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sweeper.errors import ModelError, SpecError, unknown

if TYPE_CHECKING:
    from torch import nn

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_o")
FEED_FORWARD = ("ff_gate", "ff_up", "ff_down")
# one matrix that does the work of several roles
FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ff_gate_up": ("ff_gate", "ff_up"),
}
ROLES = (*ATTENTION, *FEED_FORWARD, *FUSED)
# roles of modules that no role-based placement adapts
EXPERTS, OTHER, EMBEDDING, HEAD = "ff_experts", "other", "embedding", "head"

# leaf names with their role, valid only inside the part of the block they belong to
_ATTENTION_LEAVES: Mapping[str, tuple[str, ...]] = {
    "attn_q": ("q_proj", "q", "query", "wq"),
    "attn_k": ("k_proj", "k", "key", "wk"),
    "attn_v": ("v_proj", "v", "value", "wv"),
    "attn_qkv": ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv"),
    "attn_o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "o", "proj"),
}
_FEED_FORWARD_LEAVES: Mapping[str, tuple[str, ...]] = {
    "ff_gate": ("gate_proj", "w1", "gate"),
    "ff_up": ("up_proj", "w3", "up", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "wi"),
    "ff_gate_up": ("gate_up_proj",),
    "ff_down": ("down_proj", "w2", "down", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo"),
}
_ATTENTION_PARTS = ("attn", "attention", "self_attn", "self_attention")
_FEED_FORWARD_PARTS = ("mlp", "ffn", "ff", "feed_forward", "block_sparse_moe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One module that can be adapted. `inputs` is equal for modules called on the very same input tensor.

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


def structure(model: "nn.Module", roles: Mapping[str, str] | None = None) -> tuple[Target, ...]:
    """The token embedding, the head and every matrix of the transformer blocks, in module order, with their roles.

    `roles` (role -> pattern) declares the roles of modules of an unknown architecture and wins over what was found.
    Modules whose role is unclear get "other": only `placement=custom` reaches them.

    Raises:
        ModelError: the model has no linear module.
        SpecError: `roles` names an unknown role, or a pattern that matches nothing or a module declared already.
    """
    matrices = _matrices(model)
    if not matrices:
        raise ModelError(f"{type(model).__name__} has no linear module that an adapter could be put on")
    embedding, head = _ends(model, matrices)
    blocks = _blocks(model, matrices, embedding)
    found: dict[str, Target] = {}
    for name, role in ((embedding, EMBEDDING), (head, HEAD)):
        if name is not None:
            found[name] = replace(matrices[name], role=role)
    products = {name: target for name, target in matrices.items() if target.kind != "embedding"}
    for layer, (name, block) in enumerate(blocks):
        for target in _block_targets(name, block, products):
            found[target.name] = replace(target, layer=layer)
    if not blocks:
        found = {**matrices, **found}
    found.update(_declared(roles or {}, matrices, found))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(found.values(), key=lambda target: order[target.name]))


def number_of_layers(targets: Iterable[Target]) -> int:
    """Number of transformer blocks; 0 for a model without any."""
    return 1 + max((target.layer for target in targets if target.layer is not None), default=-1)


def smaller_side(target: Target) -> int:
    """The highest rank that a matrix of this shape can have."""
    return min(target.in_features, target.out_features)


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a full module name, or all of it from some dot on.

    >>> matches(r"mlp\\.c_proj", "transformer.h.0.mlp.c_proj"), matches("c_proj", "h.0.attn.xc_proj")
    (True, False)
    """
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def listing(targets: Iterable[Target], most: int = 16) -> str:
    """Distinct module names with the layer number replaced by *, and their shapes."""
    lines = list(
        dict.fromkeys(
            f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', target.name)} ({target.in_features} -> {target.out_features})"
            for target in targets
            if target.kind != "experts"
        )
    )
    return ", ".join(lines[:most]) + (f" and {len(lines) - most} more" if len(lines) > most else "")


def _matrices(model: "nn.Module") -> dict[str, Target]:
    """Every linear, Conv1D and embedding module, as yet without a role."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind, shape = "linear", (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            kind, shape = "conv1d", (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            kind, shape = "embedding", (module.num_embeddings, module.embedding_dim)
        else:
            continue
        found[name] = Target(
            name=name, role=OTHER, layer=None, in_features=shape[0], out_features=shape[1], kind=kind, inputs=name
        )
    return found


def _ends(model: "nn.Module", matrices: Mapping[str, Target]) -> tuple[str | None, str | None]:
    """Names of the token embedding and of the head."""
    names = {id(module): name for name, module in model.named_modules()}

    def name_of(getter: str) -> str | None:
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            return None
        name = names.get(id(module))
        return name if name in matrices else None

    embedding = name_of("get_input_embeddings")
    first = next((target.name for target in matrices.values() if target.kind == "embedding"), None)
    return embedding or first, name_of("get_output_embeddings")


def _blocks(model: "nn.Module", matrices: Mapping[str, Target], embedding: str | None) -> list[tuple[str, "nn.Module"]]:
    """The blocks of the language model: the list of equals nearest to the token embedding (a vision tower has one too).

    A list inside a block, such as a list of experts, is deeper and so never the nearest.
    """
    from torch import nn

    candidates = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = [(f"{name}.{key}", block) for key, block in module.named_children()]
            if all(any(other.startswith(f"{block}.") for other in matrices) for block, _ in blocks):
                candidates.append((name, blocks))
    if not candidates:
        return []

    def distance(name: str) -> tuple[int, int, int]:
        path, near = name.split("."), (embedding or "").split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(path, near, strict=False)) if a != b), min(len(path), len(near))
        )
        size = sum(1 for other in matrices if other.startswith(f"{name}."))
        return -shared, len(path), -size

    return min(candidates, key=lambda candidate: distance(candidate[0]))[1]


def _block_targets(name: str, block: "nn.Module", matrices: Mapping[str, Target]) -> Iterator[Target]:
    """The matrices of one block with their roles."""
    parts: dict[str, list[tuple[str, nn.Module]]] = {"attention": [], "feed_forward": [], "other": []}
    loose = []
    for child_name, child in block.named_children():
        full = f"{name}.{child_name}"
        if full in matrices:
            loose.append(matrices[full])
        else:
            parts[_part(child_name, child)].append((full, child))
    for kind, members in parts.items():
        for full, module in members:
            inside = [target for other, target in matrices.items() if other.startswith(f"{full}.")]
            alone = len(members) == 1
            if kind == "feed_forward" and _is_mixture(module):
                yield from _mixture(full, module, inside)
            elif kind == "attention" and alone:
                yield from _with_roles(inside, _ATTENTION_LEAVES, _attention_fits)
            elif kind == "feed_forward" and alone:
                yield from _with_roles(inside, _FEED_FORWARD_LEAVES, _feed_forward_fits)
            else:
                yield from inside
    # OPT keeps its two feed-forward matrices in the block itself
    if parts["feed_forward"]:
        yield from loose
    else:
        yield from _with_roles(loose, _FEED_FORWARD_LEAVES, _feed_forward_fits)


def _part(name: str, module: "nn.Module") -> str:
    kind = type(module).__name__.lower()
    if name in _ATTENTION_PARTS or "attention" in kind or "attn" in kind:
        return "attention"
    if name in _FEED_FORWARD_PARTS or any(word in kind for word in ("mlp", "feedforward", "ffn", "moe")):
        return "feed_forward"
    return "other"


def _with_roles(inside: Sequence[Target], table: Mapping[str, tuple[str, ...]], fits: Any) -> list[Target]:
    """Roles by leaf name where names and shapes agree, by shape alone for two feed-forward matrices, else none."""
    by_leaf = {leaf: role for role, leaves in table.items() for leaf in leaves}
    named = [(by_leaf.get(target.name.rpartition(".")[2]), target) for target in inside]
    roles = {role: target for role, target in named if role is not None}
    repeated = len(roles) < sum(role is not None for role, _ in named)
    if repeated or not fits(roles):
        roles = _by_shape(inside) if fits is _feed_forward_fits else {}
    role_of = {target.name: role for role, target in roles.items()}
    entry = set(roles) - {"attn_o", "ff_down"}
    return [
        replace(
            target,
            role=role_of.get(target.name, OTHER),
            inputs=f"{target.name.rpartition('.')[0]}:in" if role_of.get(target.name) in entry else target.name,
        )
        for target in inside
    ]


def _attention_fits(roles: Mapping[str, Target]) -> bool:
    if set(roles) == {"attn_q", "attn_k", "attn_v", "attn_o"}:
        return len({roles["attn_o"].out_features, *(roles[r].in_features for r in FUSED["attn_qkv"])}) == 1
    if set(roles) == {"attn_qkv", "attn_o"}:
        fused, out = roles["attn_qkv"], roles["attn_o"]
        return fused.in_features == out.out_features and fused.out_features > out.in_features
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


def _is_mixture(module: "nn.Module") -> bool:
    from torch import nn

    return any(
        isinstance(child, nn.ModuleList) or any(p.ndim == 3 for p in child.parameters(recurse=False))
        for child in module.modules()
    )


def _mixture(name: str, module: "nn.Module", inside: Sequence[Target]) -> Iterator[Target]:
    """One target for all expert weights of a layer, and shared matrices without a role; the router is no target."""
    from torch import nn

    for child_name, child in module.named_modules():
        weights = [p for p in child.parameters(recurse=False) if p.ndim == 3]
        if isinstance(child, nn.ModuleList):
            weights = [p for p in child.parameters() if p.ndim == 2]
        if not weights:
            continue
        full = f"{name}.{child_name}" if child_name else name
        experts = len(child) if isinstance(child, nn.ModuleList) else weights[0].shape[0]
        active = _active_experts(module, experts)
        width = min(min(p.shape[-2:]) for p in weights)
        used = sum(p.numel() for p in weights) * active // experts
        yield Target(
            name=full,
            role=EXPERTS,
            layer=None,
            in_features=width,
            out_features=used // width,
            kind="experts",
            inputs=full,
        )
        for target in inside:
            if not target.name.startswith(f"{full}.") and target.out_features not in (1, experts):
                yield target
        return


def _active_experts(module: "nn.Module", experts: int) -> int:
    """How many experts a token meets; all of them where the module does not say."""
    for child in module.modules():
        for attribute in ("top_k", "num_experts_per_tok"):
            value = getattr(child, attribute, None)
            if isinstance(value, int):
                return min(value, experts)
    return experts


def _declared(
    roles: Mapping[str, str], matrices: Mapping[str, Target], found: Mapping[str, Target]
) -> dict[str, Target]:
    """Targets whose role `model.roles` declares. Which of them share an input is not known, so none do."""
    declared: dict[str, Target] = {}
    for role, pattern in roles.items():
        if role not in (*ROLES, EMBEDDING, HEAD):
            raise SpecError(unknown("model.roles", role, (*ROLES, EMBEDDING, HEAD)))
        try:
            names = [name for name in matrices if matches(pattern, name)]
        except re.error as error:
            raise SpecError(f"model.roles.{role}: {pattern!r} is no regular expression ({error})") from None
        if not names:
            shown = listing(matrices.values())
            raise SpecError(f"model.roles.{role}: {pattern!r} matches no module. The modules are {shown}.")
        for name in names:
            if name in declared:
                raise SpecError(f"model.roles: {name} is declared both {declared[name].role} and {role}")
            layer = found[name].layer if name in found else _first_number(name)
            declared[name] = replace(matrices[name], role=role, layer=layer)
    return declared


def _first_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
