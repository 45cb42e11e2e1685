"""Methods that train weights of the model itself: full fine-tuning, and BitFit's biases (Ben Zaken et al. 2022)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sweeper.engine.alone import AloneSpec, Trainee, twin
from sweeper.models import BaseModel
from sweeper.record import WEIGHTS
from sweeper.spec import RunSpec


class OwnWeights(Trainee):
    """Some of the model's own parameters, trained.

    Args:
        base: the model. names: parameters to train, by their names in the model.
        biases: modules that are given a bias of zeros to train, as they have none.
    """

    graphable = True
    spares_vectors = True

    def __init__(self, base: BaseModel, names: Sequence[str], biases: Sequence[str] = (), *, saved: bool = True) -> None:
        super().__init__(twin(base.model))
        self.base, self.saved = base, saved
        self.added = tuple(f"{module}.bias" for module in biases)
        add_biases(self.model, self.added)
        for name in (*names, *self.added):
            self.model.get_parameter(name).requires_grad_()

    def fresh(self) -> Mapping[str, Tensor]:
        start = {n: self.base.model.get_parameter(n) for n, p in self._trained() if n not in self.added}
        return start | {n: torch.zeros_like(p) for n, p in self._trained() if n in self.added}

    def save(self, folder: Path) -> int:
        """Writes the trained parameters by their names, as they are in the model."""
        if not self.saved:
            return 0
        tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self._trained()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def read(self, folder: Path) -> None:
        load_weights(self.model, folder)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts saved weights into a model; a module that had no bias is given one if the file has it."""
    tensors = load_file(folder / WEIGHTS)
    own = dict(model.named_parameters())
    add_biases(model, [name for name in tensors if name not in own])
    with torch.no_grad():
        for name, value in tensors.items():
            model.get_parameter(name).copy_(value)
