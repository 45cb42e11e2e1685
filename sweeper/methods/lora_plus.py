"""LoRA whose A and B learn at different rates, or one of them not at all.

lora_plus  the learning rate of B is `ratio` times that of A (Hayou et al. 2024, "LoRA+: Efficient low rank adaptation
           of large models", which advises 2^4)
lora_fa    A stays as it was drawn, B alone trains (Zhang et al. 2023, "LoRA-FA: Memory-efficient low-rank adaptation")
"""

from dataclasses import replace

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec
from sweeper.methods import lora
from sweeper.methods.method import Method, Ranks
from sweeper.models.architecture import Target
from sweeper.spec import MethodSpec, RunSpec


def _plus(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    return replace(lora.adapter(spec, ranks), rate_b=float(LORA_PLUS.option(spec.method, "ratio")))


def _check_plus(spec: RunSpec) -> None:
    ratio = LORA_PLUS.option(spec.method, "ratio")
    if ratio <= 0:
        raise SpecError(f"method.options.ratio must be above 0, got {ratio}")


def _frozen_a(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    return replace(lora.adapter(spec, ranks), rate_a=0.0)


def _b_alone(method: MethodSpec, target: Target, rank: int) -> int:
    return rank * target.out_features


LORA_PLUS = Method(adapter=_plus, options={"ratio": 16.0}, check=_check_plus, ranges={"optim.lr": (2e-5, 2e-3)})
LORA_FA = Method(adapter=_frozen_a, parameters=_b_alone)
