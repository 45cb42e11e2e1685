"""How rank is spread over the placed modules. One function an allocation; `ALLOCATIONS` is the table of them."""

from collections.abc import Callable, Mapping, Sequence

from sweeper.architecture import Target
from sweeper.budget import uniform
from sweeper.errors import SpecError, unknown
from sweeper.spec import RunSpec

Allocate = Callable[[RunSpec, Sequence[Target]], Mapping[Target, int]]

ALLOCATIONS: dict[str, Allocate] = {
    "uniform": lambda spec, targets: uniform(targets, spec.rank),
}


def ranks(spec: RunSpec, targets: Sequence[Target]) -> Mapping[Target, int]:
    """Rank of every placed module.

    Raises:
        SpecError: there is no such allocation.
    """
    if spec.allocation.name not in ALLOCATIONS:
        raise SpecError(unknown("allocation", spec.allocation.name, ALLOCATIONS))
    return ALLOCATIONS[spec.allocation.name](spec, targets)
