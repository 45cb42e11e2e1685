"""What `allocation=importance` asks of its probe, and how scores become ranks within a budget. Arithmetic only."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sweeper.errors import SpecError, unknown
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec, from_mapping

NAME = "importance"
SCORES = ("gradient", "fisher", "sensitivity", "activation", "weight")
GENEROUS = 4  # times the even rank: the highest rank of a module unless options.most says otherwise
GOLDEN = 0.6180339887498949

Price = Callable[[Target, int], int]
"""Trainable parameters of a module at a rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probing:
    """`allocation.options` of `allocation=importance`.

    Attributes:
        score: what a module is scored by (`sweeper.training.probe` defines each).
        batches: training batches that the probe looks at.
        least, most: bounds of a module's rank; `most` null is four times the rank of an even allocation.
        seed: of the choice of batches; null is the run's own seed, so that replicates differ in their ranks as well.
    """

    score: str = "gradient"
    batches: int = 8
    least: int = 1
    most: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise SpecError(unknown("allocation.options.score", self.score, SCORES))
        for name in ("batches", "least"):
            if getattr(self, name) < 1:
                raise SpecError(f"allocation.options.{name} must be at least 1, got {getattr(self, name)}")
        if self.most is not None and self.most < self.least:
            raise SpecError(f"allocation.options.most={self.most} is below allocation.options.least={self.least}")


def probing(spec: RunSpec) -> Probing | None:
    """What a run's probe is asked for; None where its ranks need no probe.

    Raises:
        SpecError: an option is unknown or out of range.
    """
    if spec.allocation.name != NAME:
        return None
    return from_mapping(Probing, spec.allocation.options, prefix="allocation.options.")


def share_out(
    scores: Mapping[Target, float], budget: int, *, least: int, most: Mapping[Target, int], price: Price
) -> dict[Target, int]:
    """Ranks in proportion to scores, within bounds, whose parameters come closest to a budget.

    Ranks are clip(t * score, least, most) rounded down, with the highest t that the budget allows; what is left goes,
    a rank each, to the modules that rounding took most from. Equal scores give ranks that differ by at most one.

    Args:
        scores: at least 0 and not all 0; a module of score 0 has the lowest rank as long as others can have more.
        budget: in trainable parameters; the caller has seen that the bounds allow it.
    """
    top = max(scores.values())
    share = {target: max(score / top, 1e-9) for target, score in scores.items()}

    def at(t: float) -> dict[Target, int]:
        return {target: _rank(t * share[target], least, most[target]) for target in share}

    low, high = 0.0, max(most.values()) / min(share.values())
    for _ in range(100):  # parameters rise with t, in steps
        middle = (low + high) / 2
        low, high = (middle, high) if _total(at(middle), price) <= budget else (low, middle)
    chosen = at(low)
    left = budget - _total(chosen, price)
    for target in _by_what_rounding_took(chosen, share, low):
        cost = price(target, chosen[target] + 1) - price(target, chosen[target])
        if chosen[target] < most[target] and abs(left - cost) < left:
            chosen[target] += 1
            left -= cost
    return chosen


def bounds(targets: Sequence[Target], asked: Probing, budget: int, price: Price) -> dict[Target, int]:
    """The highest rank of every module.

    Raises:
        SpecError: no ranks within the bounds have this many parameters.
    """

    def uniform(rank: int) -> int:
        return sum(price(target, rank) for target in targets)

    sides = range(1, max(max(target.in_features, target.out_features) for target in targets) + 1)
    even = bisect.bisect_left(sides, budget, key=uniform) + 1
    most = asked.most or max(GENEROUS * even, asked.least)
    highest = {target: min(most, target.in_features, target.out_features) for target in targets}
    lowest = {target: min(asked.least, limit) for target, limit in highest.items()}
    fewest, greatest = _total(lowest, price), _total(highest, price)
    if not fewest <= budget <= greatest:
        raise SpecError(
            f"allocation=importance: ranks {asked.least} to {most} have {fewest:,} to {greatest:,} trainable "
            f"parameters in this placement, not {budget:,}: change rank, allocation.budget or options.most"
        )
    return highest


def _rank(wanted: float, least: int, most: int) -> int:
    return max(min(math.floor(wanted), most), min(least, most))


def _total(ranks: Mapping[Target, int], price: Price) -> int:
    return sum(price(target, rank) for target, rank in ranks.items())


def _by_what_rounding_took(ranks: Mapping[Target, int], share: Mapping[Target, float], t: float) -> list[Target]:
    """Largest loss first; equal ones in an order in which neighbours are far apart."""
    lost = {target: round(t * share[target] - rank, 6) for target, rank in ranks.items()}
    order = sorted(enumerate(ranks), key=lambda pair: (-lost[pair[1]], (pair[0] * GOLDEN) % 1))
    return [target for _, target in order]
