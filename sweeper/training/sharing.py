"""Which runs can share what: a base model, a pack on it, and a probe."""

from collections.abc import Sequence
from typing import Any

from sweeper import methods
from sweeper.spec import RunSpec


def pack_key(spec: RunSpec, lengths: Sequence[int]) -> tuple[tuple[str, Any], ...]:
    """Runs with equal keys can share a pack of the same base model: batch shape and length bucket.

    A run that trains alone has a key that only runs like it share; they follow one another. The model, its precision
    and its quantisation are decided before: a session holds one base model at a time. The
    bucket is the next power of two of a long example (the 90th percentile), so that short examples are not padded to
    the length of another dataset's.
    """
    ordered = sorted(lengths)
    typical = ordered[int(0.9 * (len(ordered) - 1))]
    return (
        ("accumulation", spec.trainer.accumulation),
        ("alone", methods.unpacked_key(spec)),
        ("batch_size", spec.trainer.batch_size),
        ("checkpointing", spec.trainer.activation_checkpointing),
        ("deterministic", spec.trainer.deterministic),
        ("length", 1 << (typical - 1).bit_length()),
    )


def model_key(spec: RunSpec) -> str:
    """Runs with equal keys train on one base model: its weights, precision and quantisation."""
    return repr((spec.model, spec.trainer.precision, methods.find(spec.method.name).quantised))


def probe_key(spec: RunSpec) -> str:
    """Runs of one base model with equal keys ask a probe the same."""
    seed = spec.seed if spec.allocation.options.get("seed", 0) is None else None
    placed = spec.placement if spec.placement.embeddings or spec.placement.head or spec.placement.patterns else None
    step = spec.trainer.batch_size, spec.trainer.accumulation
    return repr((spec.dataset, spec.allocation.options, step, seed, placed))
