"""LoRA (Hu et al. 2021): W + s B A; A [rank, in] and B [rank, out] train, or some rows of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sweeper.lora.blocks import rows_of
from sweeper.lora.forms import peft
from sweeper.lora.forms.begin import principal, uniform
from sweeper.lora.forms.form import AdapterSpec, Form, SharedTensors, Wrapped
from sweeper.lora.layout import Part, Segment
from sweeper.lora.wrappers import Group
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec


def parts(target: Target, rank: int) -> tuple[Part, ...]:
    """A and B of a module."""
    named = "lora_embedding_{}" if target.kind == "embedding" else "lora_{}.weight"
    return (
        Part("A", (rank, target.in_features), "A", "a", named.format("A"), by_rank=True),
        Part("B", (rank, target.out_features), "B", "b", named.format("B"), by_rank=True, transposed=True),
    )


def begin(segment: Segment, adapter: AdapterSpec, group: Wrapped, values: Sequence[Tensor]) -> None:
    """Fills A and B, and where they do not begin at zero the frozen half that takes that off."""
    target, (a, b) = segment.target, values[:2]
    if adapter.blocks:
        for block, rows in zip(adapter.blocks, rows_of(adapter.blocks, target.name), strict=True):
            uniform(target, a[rows], b[rows], adapter.seed, again=block.level)
        return
    trained = adapter.trained.get(target.name, len(a))
    if adapter.begin == "uniform":
        uniform(target, a[:trained], b[:trained], adapter.seed)
        return
    assert isinstance(group, Group)
    first = principal(group.bases[segment.member], group.weights[segment.member], target, adapter)
    for part, value, sign in zip((a, b), first, (1, -1), strict=True):
        part[:trained], part[trained:] = value, sign * value


def factors(target: Target, values: Sequence[Tensor], shared: SharedTensors) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [rank, out] of the update."""
    return values[0], values[1]


def config(spec: RunSpec, adapter: AdapterSpec, ranks: Mapping[Target, int], **more: Any) -> Any:
    """PEFT's configuration."""
    return peft.lora_config(spec, ranks, **more)


def owns(config: Mapping[str, Any]) -> bool:
    """Whether it is a LoRA without one of PEFT's variants."""
    variants = ("use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "arrow_config", "use_bdlora")
    return config.get("peft_type") == "LORA" and not any(config.get(name) for name in variants)


def by_weight(targets: Sequence[Target]) -> dict[str, Any]:
    """For models whose modules PEFT takes for others."""
    names = [f"{target.name}.weight" for target in targets]
    return {"target_modules": [], "target_parameters": names, "lora_dropout": 0.0}


LORA = Form(
    name="lora", parts=parts, begin=begin, factors=factors, config=config, owns=owns,
    scale=peft.lora_scale, weight_config=by_weight,
)  # fmt: skip
