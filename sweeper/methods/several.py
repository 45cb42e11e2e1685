"""What runs of several tasks ask of their method and sharing: learnt weights, gradient surgery, compared gradients."""

from collections.abc import Callable

from sweeper import objectives
from sweeper.errors import SpecError
from sweeper.methods import sharing
from sweeper.spec import RunSpec
from sweeper.tasks.mixture import LEARNT


def check(spec: RunSpec, *, packs: bool) -> None:
    """Raises SpecError for what cannot be asked of a run.

    Args:
        packs: whether its method packs, so that what it trains is an adapter whose gradients are here.
    """
    options = spec.dataset.options if spec.dataset.family in ("mixture", "sequence") else {}
    if options.get("weights") == LEARNT:
        _check_learnt(spec)
    if options.get("surgery", "none") != "none":
        _check_surgery(spec, f"dataset.options.surgery={options['surgery']}", packs)
    if spec.evaluation.conflict:
        _check_conflict(spec, f"evaluation.conflict={spec.evaluation.conflict}", packs)


def _check_learnt(spec: RunSpec) -> None:
    if not _sums_tokens(spec):
        raise SpecError(f"dataset.options.weights={LEARNT} weighs mean NLLs: objective=nll, not {spec.objective.name}")


def _check_surgery(spec: RunSpec, start: str, packs: bool) -> None:
    if not _sums_tokens(spec):
        raise SpecError(f"{start} takes a step apart by task: objective=nll, not {spec.objective.name}")
    if not packs:
        raise SpecError(f"{start} is for adapters; method={spec.method.name} trains alone")
    if any(spec.optim.penalties):
        raise SpecError(f"{start}: the penalties of optim are of no task; give them up, or the surgery")
    if spec.dataset.family == "sequence" and not spec.dataset.options.get("replay"):
        raise SpecError(f"{start}: a step of dataset=sequence has one task; give dataset.options.replay")
    nodes = _nodes(spec)
    if nodes and not any(len(node.trains) > 1 for node in nodes):
        raise SpecError(f"{start}: sharing={spec.sharing.name} has no block that several tasks train")


def _check_conflict(spec: RunSpec, start: str, packs: bool) -> None:
    if not spec.dataset.parts:
        raise SpecError(f"{start} is between tasks: dataset=mixture 'dataset.parts=[icd10_chapter,gsm_symbolic]'")
    if not packs:
        raise SpecError(f"{start} looks at adapters; method={spec.method.name} trains alone")
    if not _sums_tokens(spec):
        raise SpecError(f"{start} looks at gradients of mean NLLs: objective=nll, not {spec.objective.name}")


def _sums_tokens(spec: RunSpec) -> bool:
    """Whether a run's loss is a weighted sum of its tokens' NLL."""
    objectives.check(spec.objective)
    return objectives.of(spec.objective).linear


def _nodes(spec: RunSpec) -> list[sharing.Node]:
    make: Callable[[RunSpec], list[sharing.Node]] = sharing.SHARINGS[spec.sharing.name]
    return make(spec)
