"""Which runs can share what: a base model, a pack on it, and a probe."""

from collections.abc import Sequence
from dataclasses import dataclass

from sweeper import methods
from sweeper.spec import RunSpec
from sweeper.training.run_state import RunState


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class PackKey:
    """Runs with equal keys can share a pack of the same base model.

    Attributes:
        unpacked: of a run that has a model to itself, what those have in common that can follow it on that model;
            empty for runs that pack.
        length: bucket of its examples' lengths in tokens, so that short ones are not padded to another dataset's.
        objective: of runs whose tasks are weighed or taken apart in a step; empty for others, which mix objectives.
        by_task: of runs whose steps have passes by task, as `PackConfig` has it; (0, 0) of others.
    """

    accumulation: int
    unpacked: str
    batch_size: int
    checkpointing: bool
    deterministic: bool
    length: int
    objective: str
    by_task: tuple[int, int] = (0, 0)


def pack_key(
    spec: RunSpec, lengths: Sequence[int], by_task: tuple[int, int] | None = None, *, learns: bool = False
) -> PackKey:
    """The key of a run whose examples have these lengths, and whose steps may be cut into passes by task.

    `learns`: whether the run learns the weights of its tasks' losses.

    The model, its precision and its quantisation are decided before: a trainer holds one base model at a time. The
    bucket is the next power of two of a long example (the 90th percentile).
    """
    ordered = sorted(lengths)
    typical = ordered[int(0.9 * (len(ordered) - 1))]
    return PackKey(
        accumulation=spec.trainer.accumulation,
        unpacked=methods.unpacked_key(spec),
        batch_size=spec.trainer.batch_size,
        checkpointing=spec.trainer.activation_checkpointing,
        deterministic=spec.trainer.deterministic,
        length=1 << (typical - 1).bit_length(),
        objective=repr(spec.objective) if by_task or learns else "",
        by_task=by_task or (0, 0),
    )


def pack_key_of(state: RunState) -> PackKey:
    """`pack_key` of a run whose examples are known."""
    mixture = state.mixture
    by_task = None if mixture is None else mixture.by_task(state.spec.trainer.accumulation)
    learns = mixture is not None and mixture.learns > 0
    return pack_key(state.spec, state.order.lengths.tolist(), by_task, learns=learns)


def model_key(spec: RunSpec) -> str:
    """Runs with equal keys train on one base model: its weights, precision and quantisation."""
    return repr((spec.model, spec.trainer.precision, methods.find(spec.method.name).quantised))


def probe_key(spec: RunSpec) -> str:
    """Runs of one base model with equal keys ask a probe the same."""
    seed = spec.seed if spec.allocation.options.get("seed", 0) is None else None
    placed = spec.placement if spec.placement.embeddings or spec.placement.head or spec.placement.patterns else None
    step = spec.trainer.batch_size, spec.trainer.accumulation
    return repr((spec.dataset, spec.allocation.options, step, seed, placed))
