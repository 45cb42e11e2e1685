"""What each method puts on the base. One file a method; `METHODS` is the table of them."""

from collections.abc import Callable, Mapping

from sweeper.architecture import Target
from sweeper.engine.adapters import AdapterSpec
from sweeper.errors import SpecError, unknown
from sweeper.methods import lora
from sweeper.spec import RunSpec

METHODS: dict[str, Callable[[RunSpec, Mapping[Target, int]], AdapterSpec]] = {
    "lora": lora.adapter,
}


def adapter(spec: RunSpec, ranks: Mapping[Target, int]) -> AdapterSpec:
    """The adapter of a run, with a rank for every placed module.

    Raises:
        SpecError: there is no such method.
    """
    if spec.method.name not in METHODS:
        raise SpecError(unknown("method", spec.method.name, METHODS))
    return METHODS[spec.method.name](spec, ranks)
