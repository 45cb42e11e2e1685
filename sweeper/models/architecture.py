"""A model's structure read into roles: which module is the query projection, which the feed-forward output.

A module's role follows from its place: the list of transformer blocks, inside a block the attention and the
feed-forward part, inside a part the leaf name and the shape. A leaf name alone says nothing: GPT-2 calls both
the attention output and the feed-forward output `c_proj`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sweeper.errors import ModelError, SpecError, unknown
from sweeper.models.roles import (
    ATTENTION,
    ATTENTION_EXPERTS,
    CROSS,
    EMBEDDING,
    EXPERTS,
    FEED_FORWARD,
    FUSED,
    HEAD,
    MIXER,
    OTHER,
    ROLES,
    Target,
    block_members,
    block_targets,
    bypassed,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ATTENTION",
    "ATTENTION_EXPERTS",
    "CROSS",
    "EMBEDDING",
    "EXPERTS",
    "FEED_FORWARD",
    "FUSED",
    "HEAD",
    "MIXER",
    "OTHER",
    "ROLES",
    "Target",
    "listing",
    "matches",
    "number_of_layers",
    "smaller_side",
    "structure",
]

Layer = list[tuple[str, "nn.Module"]]


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
    out_of_reach = bypassed(getattr(getattr(model, "config", None), "model_type", None))
    for layer, members in enumerate(blocks):
        inside = list(block_targets(members, products))
        found_roles = {part for target in inside for part in FUSED.get(target.role, (target.role,))}
        skipped = CROSS in found_roles and not found_roles & {*ATTENTION, *MIXER}  # a layer for images: no text enters
        for target in inside:
            barred = target.role in MIXER and target.name.rpartition(".")[2] in out_of_reach
            role = CROSS if skipped else OTHER if barred else target.role
            found[target.name] = replace(target, layer=layer, role=role)
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

    Raises:
        re.error: it is no regular expression.
    """
    # Python takes flags for the whole only where an expression begins
    flags, rest = re.fullmatch(r"(?s)(?:\(\?([aimsux]+)\))?(.*)", pattern).groups()  # type: ignore[union-attr]
    inner = f"(?{flags}:{rest})" if flags else f"(?:{rest})"
    return re.fullmatch(rf"(?:.*\.)?{inner}", name) is not None


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
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind, shape = "linear", (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            kind, shape = "conv1d", (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            kind, shape = "embedding", (module.num_embeddings, module.embedding_dim)
        else:
            continue
        same = first.setdefault(id(module.weight), name) if kind != "embedding" else name
        found[name] = Target(
            name=name,
            role=OTHER,
            layer=None,
            in_features=shape[0],
            out_features=shape[1],
            kind=kind,
            inputs=name,
            shares=None if same == name else same,
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


# models of several stacks, in the order a text passes through them
_STACKS: Mapping[str, tuple[str, ...]] = {
    "blt": ("model.local_encoder.layers", "model.global_transformer.layers", "model.local_decoder.layers"),
    "hrm_text": ("model.L_module.layers", "model.H_module.layers"),
}


def _blocks(model: "nn.Module", matrices: Mapping[str, Target], embedding: str | None) -> list[Layer]:
    """The children of each block of the language model: of the list of equals nearest to the token embedding (a vision
    tower has one too), and of the lists beside it that are as long (XLM keeps attention and feed-forward apart).

    A list inside a block, such as a list of experts, is deeper and so never the nearest.
    """
    from torch import nn

    stacks = _STACKS.get(str(getattr(getattr(model, "config", None), "model_type", None)))
    if stacks is not None:
        lists = [(name, model.get_submodule(name)) for name in stacks]
        return [block_members(f"{name}.{key}", block) for name, one in lists for key, block in one.named_children()]
    candidates = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = [(f"{name}.{key}", block) for key, block in module.named_children()]
            if all(any(other.startswith(f"{block}.") for other in matrices) for block, _ in blocks):
                candidates[name] = blocks
    if not candidates:
        return []

    def distance(name: str) -> tuple[int, int, int]:
        path, near = name.split("."), (embedding or "").split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(path, near, strict=False)) if a != b), min(len(path), len(near))
        )
        size = sum(1 for other in matrices if other.startswith(f"{name}."))
        return -shared, len(path), -size

    nearest = min(candidates, key=distance)
    beside = [name for name in candidates if name != nearest and _are_halves(nearest, name, candidates)]
    if not beside:
        return [block_members(name, block) for name, block in candidates[nearest]]
    return [list(parts) for parts in zip(candidates[nearest], *(candidates[name] for name in beside), strict=True)]


def _are_halves(one: str, other: str, candidates: Mapping[str, Layer]) -> bool:
    """Whether two lists of one module hold the halves of the same blocks: attention here, feed-forward there."""
    same_place = one.rpartition(".")[0] == other.rpartition(".")[0]
    kinds = {type(module).__name__ for name in (one, other) for _, module in candidates[name]}
    telling = [any(word in kind.lower() for word in ("attention", "ffn", "mlp")) for kind in kinds]
    return same_place and len(candidates[one]) == len(candidates[other]) and len(kinds) == 2 and all(telling)


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
