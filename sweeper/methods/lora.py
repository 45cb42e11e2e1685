"""LoRA (Hu et al. 2021): W + s B A, with s = alpha / rank, or alpha / sqrt(rank) where rank-stabilised.

A module whose rank is not the run's has the run's scale, so that an allocation changes ranks and nothing else.
"""

import math

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec
from sweeper.methods.method import Method, Ranks
from sweeper.spec import RunSpec


def adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    """The adapter of a run."""
    scale = effective_scale(spec.alpha, spec.rank, rank_stabilised=spec.method.rank_stabilised)
    return AdapterSpec(
        ranks={target.name: rank for target, rank in ranks.items()},
        scales={target.name: scale for target in ranks},
        dropout=spec.method.dropout,
        seed=spec.seed,
    )


def effective_scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """Factor on B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, eq. 4)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _check_rslora(spec: RunSpec) -> None:
    if not spec.method.rank_stabilised:
        raise SpecError("method=rslora is method=lora with method.rank_stabilised=true; it cannot be false")


LORA = Method(adapter=adapter, embeddings=True, blocks=True)
RSLORA = Method(adapter=adapter, embeddings=True, blocks=True, check=_check_rslora)
