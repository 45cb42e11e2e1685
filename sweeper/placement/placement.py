"""A placement resolved to full module names: which roles, in which layers."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from sweeper.errors import ModelError, SpecError, unknown
from sweeper.models.architecture import (
    ATTENTION,
    ATTENTION_EXPERTS,
    EMBEDDING,
    EXPERTS,
    FEED_FORWARD,
    FUSED,
    HEAD,
    MIXER,
    OTHER,
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
    "report",
    "resolve",
    "select_layers",
    "unadapted",
]

PLACEMENTS: dict[str, tuple[str, ...]] = {
    "attn": ATTENTION,
    "attn_q": ("attn_q",),
    "attn_qk": ("attn_q", "attn_k"),
    "attn_qv": ("attn_q", "attn_v"),
    "attn_vo": ("attn_v", "attn_o"),
    "ff": FEED_FORWARD,
    "ff_in": ("ff_gate", "ff_up"),
    "ff_out": ("ff_down",),
    "full": (*ATTENTION, *FEED_FORWARD),
    "mixer": MIXER,
    "all": (*ATTENTION, *FEED_FORWARD, *MIXER),
}
PICKS: dict[str, Callable[[Sequence[Target]], Iterable[Target]]] = {}
"""Of placements by a function (`sweeper.register`): of the modules that roles, patterns and layers choose, which."""
PARTS: Mapping[str, tuple[str, ...]] = {"attention": ATTENTION, "feed-forward": FEED_FORWARD, "token mixer": MIXER}
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
    if pick := PICKS.get(placement.name):
        names = {target.name for target in pick([target for target in targets if target.name in names])} & names
        if not names:
            raise SpecError(f"placement={placement.name}: its function picks no module of this model")
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
    if all(asked & set(part) for part in PARTS.values()):  # whatever the model has of the three
        present = {part for target in targets for part in _components(target.role)}
        absent = [part for part in PARTS.values() if not present & set(part) and _understood(targets, part)]
        asked -= {role for part in absent for role in part} if len(absent) < len(PARTS) else set()
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
    if "mixer_in" in asked - missing:
        missing.discard("mixer_out")  # adapters have no hold on that of some Mamba layers
    if missing:
        raise SpecError(
            f"placement={placement.name}: this model has no {', '.join(sorted(missing))}. "
            f"Choose from {_choices(targets)}."
        )
    return picked


def _check_part(targets: Sequence[Target], placement: PlacementSpec, part: tuple[str, ...]) -> None:
    """Raises where a selected layer has no known attention (or feed-forward) module and may well have one."""
    label = next(label for label, roles in PARTS.items() if roles == part)
    known = {target.layer for target in targets if set(_components(target.role)) & set(part)}
    for target in targets:
        if part is FEED_FORWARD and target.role == EXPERTS and target.layer not in known:
            raise SpecError(
                f"placement={placement.name}: the feed-forward blocks of this model are mixtures of experts "
                f"({target.name}) whose weights are not one matrix a layer, and adapting only some experts would "
                f"not be the placement asked for. Choose from {_choices(targets)}."
            )
        if part is ATTENTION and target.role == ATTENTION_EXPERTS:
            raise SpecError(
                f"placement={placement.name}: the queries and outputs of this model's attention are mixtures of "
                f"experts ({target.name}) whose weights are not one matrix a layer. Choose from {_choices(targets)}."
            )
    mixing = {target.layer for target in targets if part is ATTENTION and target.role in MIXER}
    lacking = sorted(_in_doubt(targets) - known - mixing) if known else []
    if lacking or not known:
        mixers = ", or mixer: its token mixers are not attention" if any(t.role in MIXER for t in targets) else ""
        where = f"layers {', '.join(map(str, lacking[:6]))}{', ...' if lacking[6:] else ''}" if known else "this model"
        raise ModelError(
            f"placement={placement.name}: cannot tell which are the {label} modules of {where}. The linear modules "
            f"there are {listing(t for t in targets if not known or t.layer in lacking)}. Declare roles in conf/model, "
            f"for example roles: {{{part[0]}: 'regular expression for the end of a module name'}} "
            f"(roles: {', '.join(ROLES)}), choose other placement.layers, or use placement=custom{mixers}."
        )


def _in_doubt(targets: Sequence[Target]) -> set[int]:
    """Layers with modules of which nothing is known, not even the part of the layer that they belong to.

    What lies beside modules with a role belongs to their part: what steers a state, or selects keys.
    """
    layers = {target.layer for target in targets if target.layer is not None}
    told = [target for target in targets if target.role != OTHER and target.layer is not None]
    parts = {_part(target) for target in told} - {""}
    untold = [target for target in targets if target.role == OTHER and target.layer is not None]
    strange = {target.layer for target in untold if target.layer is not None and _part(target) not in parts}
    return strange | (layers - {target.layer for target in told})


def _part(target: Target) -> str:
    """The name of the child of the block that a module lies in; empty for one that lies in the block itself."""
    found = re.match(r"(?:.*?\.)?\d+\.[^.]+(?=\.)", target.name)
    return found[0] if found else ""


def _understood(targets: Sequence[Target], part: tuple[str, ...]) -> bool:
    """Whether it is known that a model lacks a part altogether, so that there is nothing of it to adapt."""
    roles = {target.role for target in targets}
    if part is ATTENTION:
        return bool(roles & set(MIXER)) and ATTENTION_EXPERTS not in roles and not _in_doubt(targets)
    return part is MIXER or (EXPERTS not in roles and not _in_doubt(targets))


def unadapted(targets: Sequence[Target], placement: PlacementSpec, *, layers: int) -> list[str]:
    """What a placement by roles leaves as it is though its name may promise it, a line each; none for most models.

    `full` is attention and feed-forward: token mixers of a hybrid model are not in it. Experts that a router chooses
    are never adapted, and a mixer's output projection is not where nothing but its kernel reads it.
    """
    if not placement.roles:
        return []
    chosen = set(select_layers(placement.layers, layers))
    inside = [target for target in targets if target.layer in chosen]
    asked = {part for role in placement.roles for part in FUSED.get(role, (role,))}
    lines = []
    mixers = [target for target in inside if target.role in MIXER]
    if mixers and not asked & set(MIXER):
        where = sorted({target.layer for target in mixers if target.layer is not None})
        lines.append(
            f"placement={placement.name} leaves the token mixers that are not attention as they are: "
            f"{listing(mixers, most=4)}, in {len(where)} of {len(chosen)} layers. placement=mixer adapts them, "
            "placement=all these and the rest"
        )
    if "mixer_out" in asked and mixers and not any(target.role == "mixer_out" for target in mixers):
        lines.append(
            f"placement={placement.name} leaves the token mixers' output projections as they are: a kernel reads "
            "those weights itself, past any adapter"
        )
    experts = [target.name for target in inside if target.role == EXPERTS]
    if experts and asked & set(FEED_FORWARD):
        more = f" and {len(experts) - 1} more" if len(experts) > 1 else ""
        lines.append(
            f"placement={placement.name} leaves the experts that a router chooses as they are ({experts[0]}{more}): "
            "of the feed-forward modules it adapts those that every token meets"
        )
    return lines


def report(targets: Sequence[Target], names: Iterable[str] = ("attn", "ff", "full", "mixer", "all")) -> dict[str, str]:
    """For each named placement the number of modules it adapts in a model, or the line that refuses it."""
    found = {}
    for name in names:
        spec = PlacementSpec(name=name, roles=PLACEMENTS[name])
        try:
            found[name] = str(len(resolve(targets, spec, layers=number_of_layers(targets))))
        except (SpecError, ModelError) as error:
            found[name] = str(error)
    return found


def _by_pattern(targets: Sequence[Target], pattern: str, placement: PlacementSpec) -> list[Target]:
    try:
        matches(pattern, "")
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
    routed = {target.layer for target in targets if target.role == EXPERTS}
    dense = {target.layer for target in targets if set(_components(target.role)) & set(FEED_FORWARD)}
    barred = set(FEED_FORWARD) if routed - dense else set()
    if any(target.role == ATTENTION_EXPERTS for target in targets):
        barred |= set(ATTENTION)
    names = []
    for name, roles in PLACEMENTS.items():
        asked = set(roles)
        if name == "all":
            if not present & set(MIXER):
                continue  # the same as full
            asked = {role for part in PARTS.values() if present & set(part) for role in part}
        split = any(set(parts) & asked and not set(parts) <= asked for parts in _fused_in(targets))
        spared = {"ff_gate"} if "ff_up" in present else set()
        spared |= {"mixer_out"} if "mixer_in" in present else set()
        if not split and not asked - present - spared and not asked & barred:
            names.append(name)
    return names


def _fused_in(targets: Sequence[Target]) -> list[tuple[str, ...]]:
    return [parts for role, parts in FUSED.items() if any(target.role == role for target in targets)]
