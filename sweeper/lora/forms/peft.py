"""Adapters as PEFT has them: the names of their tensors, configurations, and what is read from a folder."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sweeper.lora.forms.form import FORMS, AdapterSpec, Form
from sweeper.lora.layout import Part
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec

_TOP, _MODEL = "base_model.", "base_model.model."


def places(targets: Iterable[Target]) -> dict[str, Any]:
    """Where an adapter goes."""
    targets = list(targets)
    return {
        "target_modules": [target.name for target in targets],
        "fan_in_fan_out": any(target.kind == "conv1d" for target in targets),
        "task_type": "CAUSAL_LM",
    }


def lora_config(spec: RunSpec, ranks: Mapping[Target, int], **more: Any) -> Any:
    """A LoRA with a rank for each module, all with the run's scale."""
    from peft import LoraConfig

    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes each module's scale from its own rank and alpha
    other = {f"^{re.escape(target.name)}": rank for target, rank in ranks.items() if rank != common}
    configure: Any = LoraConfig  # its annotations are narrower than what it takes
    given = {
        "r": common,
        "lora_alpha": _alpha_of(spec, common),
        "lora_dropout": spec.method.dropout,
        "use_rslora": spec.method.rank_stabilised,
        "rank_pattern": other,
        "alpha_pattern": {name: _alpha_of(spec, rank) for name, rank in other.items()},
        **places(ranks),
    }
    return configure(**(given | more))


def _alpha_of(spec: RunSpec, rank: int) -> float:
    """The alpha that gives a module of another rank the run's scale; what PEFT calls its alpha pattern."""
    share = rank / spec.rank
    return spec.alpha * (math.sqrt(share) if spec.method.rank_stabilised else share)


def lora_scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Factor on B A of a module, which PEFT takes from its own rank and alpha."""
    patterns = config.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha: float = next(found, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def form_of(config: Mapping[str, Any]) -> Form | None:
    """The form of an adapter that was saved with this configuration, if it is one of ours."""
    return next((form for form in FORMS.values() if form.owns(config)), None)


def loaded(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Loaded | None":
    """A saved adapter, if it is of one of our forms."""
    form = form_of(config)
    plain = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    return None if form is None else Loaded(form, config, plain)


def kind_of(config: Mapping[str, Any]) -> str:
    """What an adapter is: the name of its form, or PEFT's of its type, in small letters."""
    form = form_of(config)
    return str(config.get("peft_type")).lower() if form is None else form.name


def state_dict(
    adapter: AdapterSpec, targets: Sequence[Target], weights: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """What PEFT saves of an adapter: the parts of every module, and what is shared."""
    form = FORMS[adapter.form]
    tensors = {f"{_TOP}{name}": tensor for name, tensor in form.shared(adapter, targets).items()}
    for target in targets:
        for part, value in zip(form.parts(target, 1), weights[target.name], strict=True):
            tensors[f"{_MODEL}{target.name}.{part.peft}"] = _turned(part, value).cpu().contiguous()
    return tensors


@dataclass(frozen=True)
class Loaded:
    """A saved adapter of some form: PEFT's configuration, and its tensors by name, without `.weight` at the end."""

    form: Form
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Loaded":
        """The same on a device, in float32."""
        return replace(self, tensors={name: tensor.to(device).float() for name, tensor in self.tensors.items()})

    def has(self, target: Target) -> bool:
        """Whether a module is adapted."""
        return all(_key(target, part) in self.tensors for part in self.form.parts(target, 1))

    def parts(self, target: Target) -> tuple[Tensor, ...]:
        """The parts of a module's adapter."""
        return tuple(_turned(part, self.tensors[_key(target, part)]) for part in self.form.parts(target, 1))

    def factors(self, target: Target) -> tuple[Tensor, Tensor] | None:
        """B [out, rank], scaled, and A [rank, in] of a module's update; None where it is no product of such."""
        if self.form.factors is None:
            return None
        a, b = self.form.factors(target, self.parts(target), self._shared)
        return self._scale(target) * b.t(), a

    def update(self, target: Target, weight: Tensor) -> Tensor:
        """dW [out, in] of a module whose weight [out, in] this is."""
        factors = self.factors(target)
        if factors is not None:
            return factors[0] @ factors[1]
        assert self.form.update is not None
        return self.form.update(weight, self._scale(target), self.parts(target))

    def _scale(self, target: Target) -> float:
        return self.form.scale(self.config, target.name, len(self.parts(target)[0]))

    @property
    def _shared(self) -> dict[str, Tensor]:
        return {name.removeprefix(_TOP): t for name, t in self.tensors.items() if not name.startswith(_MODEL)}


def _key(target: Target, part: Part) -> str:
    return f"{_MODEL}{target.name}.{part.peft}".removesuffix(".weight")


def _turned(part: Part, value: Tensor) -> Tensor:
    return value.t() if part.transposed else value
