"""Methods that PEFT trains, one run at a time: its own tuners on a twin of the base model."""

import contextlib
import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.errors import SpecError, gist, unknown
from sweeper.lora.forms.peft import lora_config, places
from sweeper.lora.trainee import Trainee, UnpackedSpec, on_host, twin
from sweeper.methods import qlora
from sweeper.methods.method import Method, Ranks, lora_parameters, unpacked
from sweeper.methods.prompts import Prompted
from sweeper.models import BaseModel, learned_positions
from sweeper.models.files import base_reference, quiet
from sweeper.spec import MethodSpec, RunSpec
from sweeper.tasks.package import is_installed

NAME = "default"  # of the one adapter in a PEFT model
DIVISOR = "ranknum"  # of AdaLoRA's update: the rank that a module began with


class Tuned(Trainee):
    """A PEFT model around a twin.

    Args:
        config: PEFT's. cast: keep the adapter in the base's precision, its float32 values in the store; else it is in
            the precision that PEFT chooses. graphable: whether its steps can be captured, unless they draw dropout.
        places: the modules that it adapts, no more and no fewer; None where that is the tuner's own affair.

    Raises:
        SpecError: PEFT refuses, or puts its adapters elsewhere.
    """

    def __init__(
        self, base: BaseModel, config: Any, *, cast: bool = False, graphable: bool = True,
        places: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(twin(base.model))
        self.base, self.cast = base, cast
        self._wrap(lambda peft: peft.get_peft_model(self.model, config, autocast_adapter_dtype=not cast))
        if places is not None:
            self._check_places(set(places))
        self.graphable = graphable and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.peft.modules())

    def _wrap(self, make: Callable[[Any], Any]) -> None:
        import peft

        try:
            with quiet(), _unwarned(), contextlib.redirect_stderr(io.StringIO()):  # some draw progress bars
                self.peft = make(peft)
        except (ValueError, TypeError, NotImplementedError, AssertionError, KeyError, AttributeError) as error:
            raise SpecError(f"PEFT refuses: {gist(error)}") from error
        self.config = self.peft.peft_config[NAME]
        if self.cast:
            dtype = next(self.base.model.parameters()).dtype
            for name, parameter in self.peft.named_parameters():
                if f".{NAME}." in name:
                    parameter.data = parameter.data.to(dtype)

    def _check_places(self, wanted: set[str]) -> None:
        """For some mixtures of experts PEFT takes the names of modules for those of the experts' weights."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        named = self.peft.get_base_model().named_modules()
        found = {name for name, module in named if isinstance(module, BaseTunerLayer)}
        found = {name for name in found if not any(name.startswith(f"{other}.") for other in found)}
        if found != wanted:
            missing, more = sorted(wanted - found), sorted(found - wanted)
            raise SpecError(
                f"PEFT adapts {more[0] if more else 'nothing'} in place of {missing[0] if missing else 'nothing'} in a "
                f"{type(self.model).__name__}. Choose a method that packs (lora, rslora, pissa), or another placement."
            )

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    @property
    def decoder(self) -> Callable[..., Any]:
        return Prompted(self.peft) if self.config.is_prompt_learning else super().decoder

    def files(self) -> dict[str, dict[str, Tensor] | str]:
        """The adapter as PEFT saves it, for `PeftModel.from_pretrained`."""
        from peft import get_peft_model_state_dict

        with _unwarned():
            tensors = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        plain = self.config.to_dict() | {"inference_mode": True, **base_reference(self.base.spec)}
        text = json.dumps(plain, indent=1, sort_keys=True, default=_plain) + "\n"
        return {"adapter_model.safetensors": on_host(tensors), "adapter_config.json": text}

    def read(self, folder: Path) -> None:
        self.model = twin(self.base.model)
        self._wrap(
            lambda peft: peft.PeftModel.from_pretrained(self.model, str(folder), autocast_adapter_dtype=not self.cast)
        )


class AdaptiveRanks(Tuned):
    """AdaLoRA (Zhang et al. 2023): W + P E Q with singular values E masked as the rank budget falls."""

    importance = True

    def __init__(self, base: BaseModel, config: Any, places: Iterable[str]) -> None:
        super().__init__(base, config, places=places)
        self.adapter = self.peft.base_model
        # the divisor of the update, which PEFT neither saves nor means to train; moved or cast, it asks for a gradient
        for name, parameter in self.model.named_parameters():
            if f".{DIVISOR}.{NAME}" in name:
                parameter.requires_grad_(False)

    def penalty(self) -> Tensor | None:
        """Orthogonality of P and Q (eq. 4 of the paper), as AdaLoraModel adds it to the loss."""
        if not self.config.orth_reg_weight:
            return None
        parts = []
        for name, p in self.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                parts.append(torch.norm(gram - torch.eye(len(gram), device=gram.device)))
        weight: float = self.config.orth_reg_weight
        return weight * torch.stack(parts).mean()

    def updated(self, step: int) -> None:
        self.adapter.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        allocator = self.adapter.rankallocator
        found = {f"importance:{name}": value for name, value in allocator.exp_avg_ipt.items()}
        found |= {f"uncertainty:{name}": value for name, value in allocator.exp_avg_unc.items()}
        return found | {f"kept:{name}": torch.tensor(kept) for name, kept in (self.config.rank_pattern or {}).items()}

    def resume(self, state: Mapping[str, Tensor], step: int) -> None:
        allocator = self.adapter.rankallocator
        device = next(self.model.parameters()).device
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if kind == "importance":
                allocator.exp_avg_ipt[name] = value.to(device)
                allocator.ipt[name] = torch.zeros_like(value, device=device)
            elif kind == "uncertainty":
                allocator.exp_avg_unc[name] = value.to(device)
        kept = {key.partition(":")[2]: value.tolist() for key, value in state.items() if key.startswith("kept:")}
        self.config.rank_pattern = kept or None

    def ranks(self) -> dict[str, int]:
        """Singular values that are not zero, by module."""
        return {name.split(".lora_E")[0]: int(values.count_nonzero()) for name, values in self._singular().items()}

    def _singular(self) -> dict[str, Tensor]:
        return {name: values for name, values in self.model.named_parameters() if f".lora_E.{NAME}" in name}

    def files(self) -> dict[str, dict[str, Tensor] | str]:
        """Without the masked singular values, where all of them are zero: an average, or an early end, has others."""
        pattern = self.config.rank_pattern
        values = self._singular()
        if any(bool(values[name][~torch.tensor(kept)].any()) for name, kept in (pattern or {}).items()):
            self.config.rank_pattern = None
        try:
            return super().files()
        finally:
            self.config.rank_pattern = pattern


def dora(spec: RunSpec, ranks: Ranks) -> UnpackedSpec:
    """DoRA (Liu et al. 2024) with dropout, which falls on the low-rank part alone and so leaves no packed form."""
    return unpacked(spec, ranks, lambda base: _lora(spec, ranks, base, use_dora=True))


def quantised_lora(spec: RunSpec, ranks: Ranks) -> UnpackedSpec:
    """LoRA on the quantised base that `methods.load_base` made."""
    return unpacked(spec, ranks, lambda base: _lora(spec, ranks, base))


def _lora(spec: RunSpec, ranks: Ranks, base: BaseModel, **more: Any) -> Tuned:
    names = [target.name for target in ranks]
    return Tuned(base, lora_config(spec, ranks, **more), cast=True, places=names)


def adalora(spec: RunSpec, ranks: Ranks) -> UnpackedSpec:
    """AdaLoRA with the run's rank as the mean rank in the end; the schedule is in steps of the run."""
    steps, option = spec.trainer.max_steps, partial(ADALORA.option, spec.method)

    def build(base: BaseModel) -> AdaptiveRanks:
        from peft import AdaLoraConfig

        configure: Any = AdaLoraConfig  # its annotations are narrower than what it takes
        before, after = _phases(spec)
        config = configure(
            target_r=spec.rank, init_r=initial_rank(spec.method, spec.rank), total_step=steps,
            tinit=before, tfinal=after, deltaT=_or(option("delta_t"), max(1, steps // 100)),
            beta1=option("beta1"), beta2=option("beta2"),
            orth_reg_weight=option("orthogonality"), lora_alpha=spec.alpha, lora_dropout=spec.method.dropout,
            **places(ranks),
        )  # fmt: skip
        return AdaptiveRanks(base, config, [target.name for target in ranks])

    return replace(unpacked(spec, ranks, build), settles=steps - _phases(spec)[1], outdated=f".{DIVISOR}.")


def initial_rank(method: MethodSpec, rank: int) -> int:
    """The rank each module begins with: `initial` times the rank that is left on average, as in the paper 1.5."""
    return max(rank + 1, math.ceil(float(ADALORA.option(method, "initial")) * rank))


def any_tuner(spec: RunSpec, ranks: Ranks) -> UnpackedSpec:
    """A tuner of PEFT by its name. Where its configuration has such fields, and `arguments` does not set them, it is
    given the placed modules, and the run's rank, alpha and dropout.
    """
    graphable = str(PEFT.option(spec.method, "tuner")).upper() in CAPTURED

    def build(base: BaseModel) -> Tuned:
        config = _tuner_config(spec, ranks, base)
        given = set(getattr(config, "target_modules", None) or ())
        names = {target.name for target in ranks}
        return Tuned(base, config, graphable=graphable, places=names if given == names else None)

    return unpacked(spec, ranks, build)


def tuners() -> dict[str, Any]:
    """PEFT's tuners that a run can train: name -> class of the configuration."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.name: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.name not in UNABLE}


def _tuner_config(spec: RunSpec, ranks: Ranks, base: BaseModel) -> Any:
    kind = tuners()[str(PEFT.option(spec.method, "tuner")).upper()]
    arguments = dict(PEFT.option(spec.method, "arguments"))
    fields = {field.name for field in dataclasses.fields(kind)}
    given = {"r": spec.rank, "alpha": spec.alpha, "lora_alpha": spec.alpha, "task_type": "CAUSAL_LM"}
    given |= {name: spec.method.dropout for name in fields if name.endswith("dropout") and spec.method.dropout}
    if "target_modules" in fields and kind.__name__ not in OWN_PLACES:
        given |= places(ranks)
    # (IA)3 scales what goes into these rather than what comes out
    given["feedforward_modules"] = [target.name for target in ranks if target.role == "ff_down"]
    chosen = {name: value for name, value in given.items() if name in fields} | arguments
    try:
        with _unwarned():
            return kind(**chosen)
    except (TypeError, ValueError) as error:
        raise SpecError(f"method.options.arguments: {gist(error)}") from error


def _check_adalora(spec: RunSpec) -> None:
    steps = spec.trainer.max_steps
    if steps < 2:  # importance is known after the first step, and the last ranks are given up after another
        raise SpecError("method=adalora spreads its ranks while it trains: trainer.max_steps must be at least 2")
    if spec.trainer.ema_decay is not None:
        raise SpecError("trainer.ema_decay: an average of method=adalora's weights has ranks that were given up")
    if spec.allocation.name != "uniform":
        raise SpecError(f"allocation={spec.allocation.name}: method=adalora spreads its ranks itself")
    for name, least in (("tinit", 0), ("tfinal", 0), ("delta_t", 1)):
        value = ADALORA.option(spec.method, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SpecError(f"method.options.{name} must be a whole number of steps, at least {least}, got {value}")
    before, after = _phases(spec)
    if steps - after < max(before + 1, 2):
        raise SpecError(
            f"method.options.tinit={before} and tfinal={after} leave none of trainer.max_steps={steps} to spread ranks"
        )


def _phases(spec: RunSpec) -> tuple[int, int]:
    """Steps before the budget falls, and steps after it has fallen."""
    steps, option = spec.trainer.max_steps, partial(ADALORA.option, spec.method)
    return _or(option("tinit"), steps // 10), _or(option("tfinal"), 3 * steps // 10)


def _check_tuner(spec: RunSpec) -> None:
    name = str(PEFT.option(spec.method, "tuner")).upper()
    if name in UNABLE:
        raise SpecError(f"method.options.tuner={name}: {UNABLE[name]}")
    module, package = NEEDED.get(name, ("torch", "torch"))
    if not is_installed(module):
        raise SpecError(f"method.options.tuner={name} needs the Python package {package}: pip install {package}")
    if name in ("PREFIX_TUNING", "CARTRIDGE") and spec.trainer.activation_checkpointing:
        raise SpecError(
            f"trainer.activation_checkpointing=true: method.options.tuner={name} works through the key-value cache, "
            "which transformers drops then"
        )
    if name not in tuners():
        raise SpecError(unknown("method.options.tuner", name, sorted(tuners())))
    _check_arguments(spec, name)


def _check_arguments(spec: RunSpec, tuner: str) -> None:
    arguments = PEFT.option(spec.method, "arguments")
    fields = {field.name for field in dataclasses.fields(tuners()[tuner])}
    for needed in ("num_virtual_tokens", "token_indices", "adapter_len", "adapter_layers"):
        if needed in fields and not arguments.get(needed):
            raise SpecError(
                f"method.options.tuner={tuner} needs {needed}: give '+method.options.arguments={{{needed}: ...}}'"
            )
    if spec.method.dropout and not any(name.endswith("dropout") for name in fields):
        raise SpecError(f"method.dropout={spec.method.dropout}: method.options.tuner={tuner} has no dropout")
    virtual = arguments.get("num_virtual_tokens", 0)
    most = learned_positions(spec.model) if isinstance(virtual, int) and virtual else None
    if most is not None and spec.dataset.max_length + virtual > most:
        raise SpecError(
            f"dataset.max_length={spec.dataset.max_length} and num_virtual_tokens={virtual}: model={spec.model.name} "
            f"has learned {most} positions. Choose dataset.max_length at most {most - virtual}."
        )


def _leaves(method: MethodSpec) -> str:
    return str(PEFT.option(method, "tuner")).lower()


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without PEFT's notes on what it was told to do, and on names in transformers that are about to go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# configurations whose target_modules are no linear modules: PEFT's own choice for the architecture, or `arguments`
OWN_PLACES = ("LNTuningConfig", "AdaptionPromptConfig", "TrainableTokensConfig")
NEEDED = {"ADAMSS": ("sklearn", "scikit-learn")}  # what a tuner imports that PEFT does not bring: module, package
# whose steps can be captured as a CUDA graph: they copy nothing from the host and draw no random numbers
CAPTURED = {
    "ADAPTION_PROMPT", "BEFT", "C3A", "DEFT", "DELORA", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING",
    "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA",
    "VERA",
}  # fmt: skip
# why a tuner of PEFT trains no causal language model here
UNABLE = {
    "LORA": "method=lora is this tuner, and packs",
    "ADALORA": "method=adalora is this tuner with its schedule",
    "CPT": "its loss is over the examples in its prompt, weighted by their place, and not the NLL of the response",
    "POLY": "it routes by the task that each row is of, and a run has one",
    "SHADOW": "it runs a second model beside the base in a forward pass of its own",
    "XLORA": "it mixes adapters that must have been trained before",
}

ADALORA = Method(
    unpacked=adalora,
    parameters=lambda method, target, rank: initial_rank(method, rank) * (target.in_features + target.out_features + 1),
    options={
        "initial": 1.5, "tinit": None, "tfinal": None, "delta_t": None, "beta1": 0.85, "beta2": 0.85,
        "orthogonality": 0.5,
    },
    check=_check_adalora, scaled=False, inner_rank=initial_rank, leaves=lambda method: "adalora",
    ranges={"optim.lr": (1e-3, 1e-1)},
)  # fmt: skip
QLORA = Method(unpacked=quantised_lora, check=qlora.check, quantised=True)
PEFT = Method(
    unpacked=any_tuner, parameters=lora_parameters, options={"tuner": "", "arguments": {}}, check=_check_tuner,
    scaled=False, work="none", leaves=_leaves,
)  # fmt: skip
