"""LoRA that starts from the base weights themselves: pissa and olora (see `sweeper.lora.forms.begin`).

pissa  B A starts as the part of W with the largest singular values (Meng et al. 2024); `niter` above 0 takes the
       fast SVD with that many power iterations (Halko et al. 2011) in place of the exact one
olora  B A starts as the first columns and rows of W = Q R (Büyükakyüz 2024)

The papers train on what is left of W. Here W stays whole and the start is subtracted as a frozen second half of the
adapter: the same function, r (in + out) trainable values, and a file that is an ordinary LoRA of rank 2 r. Dropout
acts on both halves, that is on the update B A - B0 A0 and not on W.
"""

from dataclasses import replace

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec
from sweeper.methods import lora
from sweeper.methods.method import Method, Ranks
from sweeper.spec import MethodSpec, RunSpec


def _twice(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    plain = lora.adapter(spec, ranks)
    return replace(plain, ranks={name: 2 * rank for name, rank in plain.ranks.items()}, trained=plain.ranks)


def _pissa(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    return replace(_twice(spec, ranks), begin="pissa", niter=PISSA.option(spec.method, "niter"))


def _olora(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    return replace(_twice(spec, ranks), begin="olora")


def _check_pissa(spec: RunSpec) -> None:
    niter = PISSA.option(spec.method, "niter")
    if niter < 0:
        raise SpecError(f"method.options.niter must be at least 0 (0: exact SVD), got {niter}")


def _while_training(method: MethodSpec, rank: int) -> int:
    return 2 * rank


PISSA = Method(adapter=_pissa, options={"niter": 0}, check=_check_pissa, inner_rank=_while_training)
OLORA = Method(adapter=_olora, inner_rank=_while_training)
