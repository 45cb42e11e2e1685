"""DoRA (Liu et al. 2024): LoRA on the direction of the weights, and a trainable magnitude for every output.

W' = m * (W + s B A) / ||W + s B A||,  the norm of every row, taken as a constant in the backward pass
"""

from dataclasses import replace

from sweeper.lora.forms import AdapterSpec
from sweeper.methods import lora, tuners
from sweeper.methods.method import Method, Ranks, lora_parameters
from sweeper.models.architecture import Target
from sweeper.spec import MethodSpec, RunSpec


def _adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    return replace(lora.adapter(spec, ranks), form="dora")


def _parameters(method: MethodSpec, target: Target, rank: int) -> int:
    return lora_parameters(method, target, rank) + target.out_features


def _packs(spec: RunSpec) -> bool:
    """With dropout the paper's formula needs a second product with the frozen weights: PEFT does that, alone."""
    return spec.method.dropout == 0


DORA = Method(
    adapter=_adapter, unpacked=tuners.dora, parameters=_parameters, packs=_packs, leaves=lambda method: "dora"
)
