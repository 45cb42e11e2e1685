"""Methods that train weights of the model itself: full fine-tuning, and BitFit's biases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sweeper.errors import DataError, SpecError
from sweeper.lora.trainee import Trainee, UnpackedSpec, on_host, twin
from sweeper.methods.method import Method, Ranks, unpacked
from sweeper.models import BaseModel
from sweeper.models.architecture import Target
from sweeper.record import WEIGHTS
from sweeper.spec import MethodSpec, RunSpec

FILE = "model.safetensors"


class OwnWeights(Trainee):
    """Some of the model's own parameters, trained.

    Args:
        names: parameters to train, by their names in the model; a bias that a module lacks is added, as zeros.
        ranks: what the record says of the rank of each module's update. saved: whether they are kept in the end.
    """

    folder = WEIGHTS
    graphable = True
    compilable = True
    spares_vectors = True

    def __init__(self, base: BaseModel, names: Sequence[str], *, ranks: Mapping[str, int], saved: bool = True) -> None:
        super().__init__(twin(base.model))
        self.base, self._ranks, self.saved = base, dict(ranks), saved
        self.added = set(add_biases(self.model, names))
        for name in names:
            self.model.get_parameter(name).requires_grad_()

    def fresh(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(parameter) if name in self.added else self.base.model.get_parameter(name)
            for name, parameter in self.trained().items()
        }

    def ranks(self) -> dict[str, int]:
        return self._ranks

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What was trained, under its names in the model."""
        return {FILE: on_host(self.trained())} if self.saved else {}

    def read(self, folder: Path) -> None:
        load_weights(self.model, folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts saved weights into a model; a module without a bias is given one where the file has it.

    Raises:
        DataError: the file is damaged.
    """
    try:
        tensors = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / FILE}: cannot be read: {error}") from error
    add_biases(model, tensors)
    for name, value in tensors.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter)  # and not into its storage, which a twin shares with the base


def add_biases(model: nn.Module, names: Sequence[str] | Mapping[str, Tensor]) -> list[str]:
    """Gives zeros as a bias to those modules that a name says should have one and have none; returns those names."""
    added = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf == "bias" and getattr(module, "bias", None) is None:
            weight: Any = module.weight
            width = weight.shape[-1] if isinstance(module, Conv1D) else weight.shape[0]
            module.bias = nn.Parameter(weight.new_zeros(width), requires_grad=False)
            added.append(name)
    return added


def full_ft(spec: RunSpec, ranks: Ranks) -> UnpackedSpec:
    """All weights of the model, or the matrices of the placed modules without their biases."""

    def build(base: BaseModel) -> OwnWeights:
        if FULL_FT.whole(spec.method):
            names = [name for name, _ in base.model.named_parameters()]
        else:
            names = [f"{target.name}.weight" for target in ranks]
        limits = {target.name: min(target.in_features, target.out_features) for target in ranks}
        return OwnWeights(base, names, ranks=limits, saved=FULL_FT.option(spec.method, "save"))

    return unpacked(spec, ranks, build)


def bitfit(spec: RunSpec, ranks: Ranks) -> UnpackedSpec:
    """The biases of the placed modules (Ben Zaken et al. 2022); a module that has none is given one of zeros."""

    def build(base: BaseModel) -> OwnWeights:
        names = [f"{target.name}.bias" for target in ranks]
        return OwnWeights(base, names, ranks={target.name: 0 for target in ranks})

    return unpacked(spec, ranks, build)


def _trains_all(method: MethodSpec) -> bool:
    return bool(FULL_FT.option(method, "modules") == "all")


def _check_full_ft(spec: RunSpec) -> None:
    _check_no_dropout(spec)
    modules = FULL_FT.option(spec.method, "modules")
    if modules not in ("all", "placed"):
        raise SpecError(f"method.options.modules={modules}: choose all (every weight) or placed (the placed matrices)")


def _check_no_dropout(spec: RunSpec) -> None:
    if spec.method.dropout:
        raise SpecError(f"method.dropout={spec.method.dropout}: method={spec.method.name} has no adapter to drop from")


def _matrix(method: MethodSpec, target: Target, rank: int) -> int:
    return target.in_features * target.out_features


FULL_FT = Method(
    unpacked=full_ft, parameters=_matrix, options={"modules": "all", "save": True}, check=_check_full_ft, ranked=False,
    scaled=False, embeddings=True, whole=_trains_all, work="weight", leaves=lambda method: None,
    ranges={"optim.lr": (1e-5, 1e-3)},
)  # fmt: skip
BITFIT = Method(
    unpacked=bitfit, parameters=lambda method, target, rank: target.out_features, check=_check_no_dropout, ranked=False,
    scaled=False, work="none", leaves=lambda method: None, ranges={"optim.lr": (1e-3, 1e-1)},
)  # fmt: skip
