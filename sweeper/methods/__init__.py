"""What each method puts on the base. `METHODS` is the table of them; docs/methods.md shows it to readers."""

from sweeper.architecture import Target
from sweeper.engine.adapters import AdapterSpec
from sweeper.errors import SpecError, unknown
from sweeper.methods import lora
from sweeper.methods.method import Method, Ranks
from sweeper.spec import MethodSpec, RunSpec

__all__ = ["METHODS", "Method", "adapter", "check", "find", "packs", "parameters", "trainable"]

METHODS: dict[str, Method] = {
    "lora": lora.LORA,
    "rslora": lora.RSLORA,
}


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        SpecError: there is no such method.
    """
    if name not in METHODS:
        raise SpecError(unknown("method", name, METHODS))
    return METHODS[name]


def packs(spec: RunSpec) -> bool:
    """Whether a run shares the frozen base with others in a pack; one that does not is a pack of one."""
    method = find(spec.method.name)
    return method.adapter is not None and method.packs(spec)


def parameters(method: MethodSpec, target: Target, rank: int) -> int:
    """Trainable parameters of one placed module."""
    return find(method.name).parameters(method, target, rank)


def trainable(method: MethodSpec, ranks: Ranks) -> int:
    """Trainable parameters of a run."""
    count = find(method.name).parameters
    return sum(count(method, target, rank) for target, rank in ranks.items())


def check(spec: RunSpec) -> None:
    """Raises SpecError for a method that there is not, wrong options, or a run that the method cannot train."""
    method = find(spec.method.name)
    method.check_options(spec.method)
    if not method.ranked and spec.allocation.name != "uniform":
        raise SpecError(f"allocation={spec.allocation.name} spreads rank, and method={spec.method.name} has none")
    if spec.placement.embeddings and not method.embeddings:
        able = ", ".join(name for name, one in METHODS.items() if one.embeddings)
        raise SpecError(f"placement.embeddings=true: method={spec.method.name} cannot adapt the embedding; {able} can")
    method.check(spec)


def adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    """The adapter of a run that packs, with a rank for every placed module.

    Raises:
        SpecError: there is no such method, or it cannot train this run.
    """
    check(spec)
    method = find(spec.method.name)
    if method.adapter is None or not method.packs(spec):
        raise SpecError(f"method={spec.method.name} does not train in packs")
    return method.adapter(spec, ranks)
