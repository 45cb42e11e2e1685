"""Placements written as sums of roles, `placement=q+v`, and every subset of some as an axis, `placement=lattice`."""

import itertools
from collections.abc import Sequence
from typing import Any

from sweeper.errors import SpecError, unknown
from sweeper.models.architecture import ROLES
from sweeper.placement.placement import PLACEMENTS

LATTICE = "lattice"
SHORT = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_o", "gate": "ff_gate", "up": "ff_up", "down": "ff_down",
}  # fmt: skip
LONG = {role: short for short, role in SHORT.items()}
ORDER = (*SHORT.values(), *(role for role in ROLES if role not in LONG))
MOST = 12  # parts of a lattice, which has 2^n - 1 placements


def roles_of(text: str) -> tuple[str, ...] | None:
    """The roles of a sum such as `q+v+down` or `attn+up`; None for the name of a placement or of nothing.

    >>> roles_of("v+q"), roles_of("down"), roles_of("attn")
    (('attn_q', 'attn_v'), ('ff_down',), None)

    Raises:
        SpecError: a sum with a part that is neither a role nor a placement.
    """
    if "+" not in text and text not in SHORT:
        return None
    found: set[str] = set()
    for part in text.split("+"):
        roles = (SHORT.get(part, part),) if SHORT.get(part, part) in ROLES else PLACEMENTS.get(part)
        if roles is None:
            raise SpecError(f"placement={text}: {unknown('part', part, [*SHORT, *PLACEMENTS], given=part)}")
        found |= set(roles)
    return tuple(role for role in ORDER if role in found)


def name_of(roles: Sequence[str]) -> str:
    """What a placement of these roles is called: as the preset that has them, so that both are one run, else as a sum.

    >>> name_of(("attn_v", "attn_q")), name_of(("attn_q", "ff_down"))
    ('attn_qv', 'q+down')
    """
    for name, own in PLACEMENTS.items():
        if set(own) == set(roles):
            return name
    return "+".join(LONG.get(role, role) for role in ORDER if role in roles)


def option(text: str) -> dict[str, Any] | None:
    """What `placement=TEXT` has, where the text is a sum of roles; else None.

    Raises:
        SpecError: as `roles_of`.
    """
    roles = roles_of(text)
    if roles is None:
        return None
    return {
        "name": name_of(roles), "roles": list(roles), "layers": "all", "patterns": [], "embeddings": False,
        "head": False,
    }  # fmt: skip


def placements(of: Any, sizes: Any = None) -> tuple[str, ...]:
    """The placements that `placement=lattice` stands for, smaller ones first.

    Args:
        of: the parts whose subsets are wanted, each a role or a sum of roles: `[q+k, v+o, gate+up, down]`.
        sizes: how many parts a subset has, a list; None for any.

    Raises:
        SpecError: a part is none, or overlaps with another; too many parts; a size that there is not.
    """
    if not isinstance(of, Sequence) or isinstance(of, str) or not of:
        raise SpecError(f"placement.of must be a list of roles such as [q,k,v,o], got {of}")
    parts = [_part(str(one)) for one in of]
    for (i, one), (j, two) in itertools.combinations(enumerate(parts), 2):
        if shared := set(one) & set(two):
            raise SpecError(f"placement.of: {of[i]} and {of[j]} have both {LONG.get(min(shared), min(shared))}")
    if len(parts) > MOST:
        raise SpecError(
            f"placement.of has {len(parts)} parts, whose subsets are {2 ** len(parts) - 1:,}: at most {MOST}"
        )
    known = range(1, len(parts) + 1)
    wanted = list(known) if sizes is None else sizes if isinstance(sizes, Sequence) else [sizes]
    for size in wanted:
        if size not in known or isinstance(size, bool):
            raise SpecError(f"placement.sizes={size}: a subset of {len(parts)} parts has 1 to {len(parts)} of them")
    subsets = (chosen for size in sorted(set(wanted)) for chosen in itertools.combinations(parts, size))
    return tuple(name_of([role for part in chosen for role in part]) for chosen in subsets)


def _part(text: str) -> tuple[str, ...]:
    roles = roles_of(text) or ((text,) if text in ROLES else PLACEMENTS.get(text))
    if roles is None:
        raise SpecError(unknown("placement.of", text, [*SHORT, *PLACEMENTS]))
    return roles
