"""How rank is spread over the placed modules. One function an allocation; `ALLOCATIONS` is the table of them.

Whatever the ranks, every module has the scale of a uniform allocation, alpha / rank of the run.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from sweeper.errors import SpecError, unknown
from sweeper.models.architecture import ATTENTION, EXPERTS, FEED_FORWARD, FUSED, ROLES, Target
from sweeper.models.budget import uniform
from sweeper.placement.importance import GOLDEN, bounds, probing, share_out
from sweeper.spec import MethodSpec, RunSpec

Scores = Mapping[str, float]


class Counted(Protocol):
    """What a method says of ranks: `even`, one for all modules; the highest of a module; what they train."""

    @property
    def even(self) -> bool: ...

    @property
    def highest(self) -> Callable[[Target], int]: ...

    @property
    def parameters(self) -> Callable[[MethodSpec, Target, int], int]: ...

    def trainable(self, spec: MethodSpec, ranks: Mapping[Target, int]) -> int: ...


Allocate = Callable[[RunSpec, Sequence[Target], Sequence[Target], Counted, Scores | None], Mapping[Target, int]]


def ranks(
    spec: RunSpec, targets: Sequence[Target], every: Sequence[Target], method: Counted, scores: Scores | None = None
) -> Mapping[Target, int]:
    """Rank of every placed module.

    Args:
        targets: the placed modules. every: all that the model has. method: the run's.
        scores: what a probe found, by module name; without it, modules count as equally important.

    Raises:
        SpecError: there is no such allocation, or the model has no room for what it asks.
    """
    if spec.allocation.name not in ALLOCATIONS:
        raise SpecError(unknown("allocation", spec.allocation.name, ALLOCATIONS))
    chosen = ALLOCATIONS[spec.allocation.name](spec, targets, every, method, scores)
    if method.even and len(set(chosen.values())) > 1:
        found = ", ".join(map(str, sorted(set(chosen.values()))))
        raise SpecError(f"method={spec.method.name} has one rank for all modules; allocation.pattern gives {found}")
    return chosen


def matched(
    spec: RunSpec, targets: Sequence[Target], every: Sequence[Target], method: Counted, scores: Scores | None
) -> Mapping[Target, int]:
    """The ranks whose trainable parameters come closest to a budget, as even as they can be.

    Parameters are counted as the method counts them. The budget is `allocation.budget`; without one, what all linear
    modules of all layers hold at `rank`, so that placements compare at equal parameters at every rank of a grid. Ranks
    differ by at most one, except where a module is too small for more; the modules that get one more are spread evenly
    over the model.
    """
    wanted = spec.allocation.parameters

    def trained(ranks: Mapping[Target, int]) -> int:
        return method.trainable(spec.method, ranks)

    if wanted is None:
        wanted = trained(uniform(_whole(every), spec.rank))
    limits = {target: method.highest(target) for target in targets}
    least, most = trained(uniform(targets, 1)), trained(limits)
    if not least <= wanted <= most:
        raise SpecError(
            f"allocation=matched: placement={spec.placement.name} has {least:,} (rank 1) to {most:,} trainable "
            f"parameters on this model, not {wanted:,}"
        )
    low, high = 1, max(limits.values())
    while low < high:  # the highest even rank within the budget
        middle = (low + high + 1) // 2
        held = trained({target: min(middle, limit) for target, limit in limits.items()})
        low, high = (middle, high) if held <= wanted else (low, middle - 1)
    chosen = {target: min(low, limit) for target, limit in limits.items()}
    if method.even:
        return chosen
    left = wanted - trained(chosen)
    spread = sorted(enumerate(chosen), key=lambda pair: (pair[0] * GOLDEN) % 1)  # neighbours far apart
    for _, target in spread:
        more = (method.parameters(spec.method, target, rank) for rank in (chosen[target] + 1, chosen[target]))
        cost = next(more) - next(more)
        if chosen[target] < limits[target] and abs(left - cost) < left:
            chosen[target] += 1
            left -= cost
    return chosen


def importance(
    spec: RunSpec, targets: Sequence[Target], every: Sequence[Target], method: Counted, scores: Scores | None
) -> Mapping[Target, int]:
    """Ranks in proportion to a probe's scores, at the parameters of a uniform allocation or `allocation.budget`."""
    asked = probing(spec)
    assert asked is not None
    if method.even:
        raise SpecError(f"allocation=importance: method={spec.method.name} has one rank for all modules")

    def price(target: Target, rank: int) -> int:
        return method.parameters(spec.method, target, rank)

    wanted = spec.allocation.parameters or method.trainable(spec.method, uniform(targets, spec.rank))
    highest = bounds(targets, asked, wanted, price)
    found = {target: 1.0 if scores is None else scores[target.name] for target in targets}
    return share_out(found, wanted, least=asked.least, most=highest, price=price)


def pattern(
    spec: RunSpec, targets: Sequence[Target], every: Sequence[Target], method: Counted, scores: Scores | None
) -> Mapping[Target, int]:
    """`allocation.pattern`: role, or regular expression found in a module's name, -> rank; the last that fits counts.

    What none fits has the run's rank.
    """
    if not spec.allocation.pattern:
        raise SpecError("allocation.pattern is empty: give roles with their ranks, 'allocation.pattern={attn_q: 16}'")
    chosen = uniform(targets, spec.rank)
    for key, rank in spec.allocation.pattern.items():
        try:
            fitting = [t for t in targets if (t.role == key if key in ROLES else re.search(key, t.name))]
        except re.error as error:
            raise SpecError(f"allocation.pattern: {key!r} is no regular expression ({error})") from None
        if not fitting:
            names = ", ".join(dict.fromkeys(target.role for target in targets))
            raise SpecError(f"allocation.pattern: {key} fits none of the placed modules. Roles here: {names}.")
        for target in fitting:
            limit = method.highest(target)
            if not 1 <= rank <= limit:
                raise SpecError(f"allocation.pattern: {key}: rank {rank} must be 1 to {limit} for {target.name}")
            chosen[target] = rank
    return chosen


def _whole(every: Sequence[Target]) -> list[Target]:
    """Attention and feed-forward. Mixers and shared experts were no targets at first, and run ids outlive that."""
    routed = {target.layer for target in every if target.role == EXPERTS}
    return [target for target in every if target.layer is not None and _counts(target, routed)]


def _counts(target: Target, routed: Collection[int | None]) -> bool:
    parts = set(FUSED.get(target.role, (target.role,)))
    return parts <= set(ATTENTION) or (parts <= set(FEED_FORWARD) and target.layer not in routed)


ALLOCATIONS: dict[str, Allocate] = {
    "uniform": lambda spec, targets, every, method, scores: uniform(targets, spec.rank),
    "matched": matched,
    "importance": importance,
    "pattern": pattern,
}
