"""A placement resolved to full module names: which roles, in which layers."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from sweeper.errors import ModelError, SpecError, unknown
from sweeper.models.architecture import (
    ATTENTION,
    EMBEDDING,
    FEED_FORWARD,
    FUSED,
    HEAD,
    ROLES,
    Target,
    listing,
    matches,
    number_of_layers,
    smaller_side,
)
from sweeper.spec import Layers, PlacementSpec

__all__ = [
    "PLACEMENTS",
    "Target",
    "check_rank",
    "number_of_layers",
    "resolve",
    "select_layers",
]

PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "attn": ATTENTION,
    "attn_q": ("attn_q",),
    "attn_qk": ("attn_q", "attn_k"),
    "attn_qv": ("attn_q", "attn_v"),
    "attn_vo": ("attn_v", "attn_o"),
    "ff": FEED_FORWARD,
    "ff_in": ("ff_gate", "ff_up"),
    "ff_out": ("ff_down",),
    "full": (*ATTENTION, *FEED_FORWARD),
}
LAYER_CHOICES = "all, lower_half, upper_half, middle_half, every_other, first:K, last:K or a list such as [0,3,7]"


def resolve(targets: Sequence[Target], placement: PlacementSpec, *, layers: int) -> tuple[Target, ...]:
    """The targets that a placement adapts, in module order.

    Raises:
        SpecError: unknown role or layers, a pattern without a match, a role that is fused with others in this model.
        ModelError: a selected layer has modules whose role is unknown where the placement needs one.
    """
    chosen = set(select_layers(placement.layers, layers))
    in_layers = [target for target in targets if target.layer in chosen]
    if placement.layers == "all":
        in_layers += [target for target in targets if target.layer is None and target.role not in (EMBEDDING, HEAD)]
    names: set[str] = set()
    if placement.roles:
        names |= {target.name for target in _by_role(in_layers, placement)}
    for pattern in placement.patterns:
        names |= {target.name for target in _by_pattern(in_layers, pattern, placement)}
    for wanted, role in ((placement.embeddings, EMBEDDING), (placement.head, HEAD)):
        if wanted:
            ends = {target.name for target in targets if target.role == role}
            if not ends:
                raise SpecError(f"placement={placement.name}: this model has no {role} module to adapt")
            names |= ends
    return tuple(target for target in targets if target.name in names)


def select_layers(layers: Layers, count: int) -> tuple[int, ...]:
    """Layer numbers, ascending, that a `layers` value picks out of `count` layers.

    lower_half and upper_half part the layers (the upper one gets the odd one); middle_half leaves a quarter out
    at the bottom; every_other starts at layer 0.

    Raises:
        SpecError: the value is unknown, picks nothing, or names a layer that the model does not have.
    """
    every = range(count)
    if not isinstance(layers, str):
        wrong = [layer for layer in layers if layer not in every]
        if wrong or not layers or len(set(layers)) < len(layers):
            raise SpecError(f"placement.layers={list(layers)} must be distinct layers of 0 to {count - 1}")
        return tuple(sorted(layers))
    half, quarter = count // 2, count // 4
    named = {
        "all": every,
        "lower_half": every[:half],
        "upper_half": every[half:],
        "middle_half": every[quarter : quarter + half],
        "every_other": every[::2],
    }
    picked = named.get(layers)
    if picked is None:
        match = re.fullmatch(r"(first|last):(\d+)", layers)
        if match is None:
            raise SpecError(f"placement.layers={layers}: no such choice of layers. Choose from {LAYER_CHOICES}.")
        number = int(match[2])
        if not 1 <= number <= count:
            raise SpecError(f"placement.layers={layers}: this model has {count} layers, so K must be 1 to {count}")
        picked = every[:number] if match[1] == "first" else every[count - number :]
    if count and not picked:
        raise SpecError(
            f"placement.layers={layers} picks no layer of a model with {count}. Choose from {LAYER_CHOICES}."
        )
    return tuple(picked)


def check_rank(targets: Iterable[Target], rank: int, *, highest: Callable[[Target], int] = smaller_side) -> None:
    """Raises SpecError where `rank` is above the highest that makes sense in a placed module."""
    for target in targets:
        limit = highest(target)
        if rank > limit:
            raise SpecError(
                f"rank={rank} is above the size of {target.name} "
                f"({target.in_features} x {target.out_features}): choose at most {limit}"
            )


def _by_role(targets: Sequence[Target], placement: PlacementSpec) -> list[Target]:
    asked: set[str] = set()
    for role in placement.roles:
        if role not in ROLES:
            raise SpecError(unknown("placement.roles", role, ROLES))
        asked |= set(FUSED.get(role, (role,)))
    for part in (ATTENTION, FEED_FORWARD):
        if asked & set(part):
            _check_part(targets, placement, part)
    picked = [target for target in targets if asked.issuperset(_components(target.role))]
    for target in targets:
        parts = set(_components(target.role))
        if parts & asked and not parts <= asked:
            raise SpecError(
                f"placement={placement.name}: {', '.join(FUSED[target.role])} are one matrix in this architecture "
                f"({target.name}), so {', '.join(sorted(parts & asked))} cannot be adapted alone. "
                f"Choose from {_choices(targets)}."
            )
    missing = asked - {part for target in picked for part in _components(target.role)}
    if "ff_up" in asked:
        missing.discard("ff_gate")  # a feed-forward block without a gate is entered through ff_up alone
    if missing:
        raise SpecError(
            f"placement={placement.name}: this model has no {', '.join(sorted(missing))}. "
            f"Choose from {_choices(targets)}."
        )
    return picked


def _check_part(targets: Sequence[Target], placement: PlacementSpec, part: tuple[str, ...]) -> None:
    """Raises where a selected layer has no known attention (or feed-forward) module."""
    label = "attention" if part is ATTENTION else "feed-forward"
    if part is FEED_FORWARD:
        for target in targets:
            if target.kind == "experts":
                raise SpecError(
                    f"placement={placement.name}: the feed-forward blocks of this model are mixtures of experts "
                    f"({target.name}) whose weights are not one matrix a layer, and adapting only some experts would "
                    f"not be the placement asked for. Choose from {_choices(targets)}."
                )
    known = {target.layer for target in targets if set(_components(target.role)) & set(part)}
    lacking = sorted({target.layer for target in targets if target.layer is not None} - known)
    if lacking or not known:
        where = f"layers {', '.join(map(str, lacking[:6]))}{', ...' if lacking[6:] else ''}" if known else "this model"
        raise ModelError(
            f"placement={placement.name}: cannot tell which are the {label} modules of {where}. The linear modules "
            f"there are {listing(t for t in targets if not known or t.layer in lacking)}. Declare roles in conf/model, "
            f"for example roles: {{{part[0]}: 'regular expression for the end of a module name'}} "
            f"(roles: {', '.join(ROLES)}), choose other placement.layers, or use placement=custom."
        )


def _by_pattern(targets: Sequence[Target], pattern: str, placement: PlacementSpec) -> list[Target]:
    try:
        re.compile(pattern)
    except re.error as error:
        raise SpecError(f"placement.patterns: {pattern!r} is no regular expression ({error})") from None
    picked = [target for target in targets if target.kind != "experts" and matches(pattern, target.name)]
    if not picked:
        where = "" if placement.layers == "all" else f" in layers {placement.layers}"
        raise SpecError(
            f"placement.patterns: {pattern!r} matches no module{where}. The modules are {listing(targets)}; "
            "embeddings and head are chosen with placement.embeddings=true and placement.head=true."
        )
    return picked


def _components(role: str) -> tuple[str, ...]:
    return FUSED.get(role, (role,))


def _choices(targets: Sequence[Target]) -> str:
    return ", ".join([*_workable(targets), "custom"])


def _workable(targets: Sequence[Target]) -> list[str]:
    """Names of the placements that these targets can honour."""
    present = {role for target in targets for role in _components(target.role)}
    experts = any(target.kind == "experts" for target in targets)
    names = []
    for name, roles in PLACEMENTS.items():
        asked = set(roles)
        split = any(set(parts) & asked and not set(parts) <= asked for parts in _fused_in(targets))
        lacks = asked - present - ({"ff_gate"} if "ff_up" in present else set())
        if not split and not lacks and not (experts and asked & set(FEED_FORWARD)):
            names.append(name)
    return names


def _fused_in(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    return [parts for role, parts in FUSED.items() if any(target.role == role for target in targets)]
