"""LoRA (Hu et al. 2021): W + s B A, with s = alpha / rank, or alpha / sqrt(rank) where rank-stabilised."""

import math
from collections.abc import Mapping

from sweeper.architecture import Target
from sweeper.engine.adapters import AdapterSpec
from sweeper.spec import RunSpec


def adapter(spec: RunSpec, ranks: Mapping[Target, int]) -> AdapterSpec:
    """The adapter of a run; every module has the scale that its own rank gives."""
    return AdapterSpec(
        ranks={target.name: rank for target, rank in ranks.items()},
        scales={
            target.name: effective_scale(spec.alpha, rank, rank_stabilised=spec.method.rank_stabilised)
            for target, rank in ranks.items()
        },
        dropout=spec.method.dropout,
        seed=spec.seed,
    )


def effective_scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """Factor on B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, eq. 4)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)
