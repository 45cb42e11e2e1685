"""What a run trains that has a model to itself: a method on a twin of the base model.

A twin has modules of its own over the weights of the base, so that whatever is put on it or changed in it, the base
stays as it is and can be scored beside it.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sweeper.models import BaseModel
from sweeper.models.forward import inner_model
from sweeper.record import ADAPTER


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackedSpec:
    """What a run trains that has a model to itself.

    Attributes:
        build: puts the method on a twin of the base model; draws from torch's generator, which is seeded.
        ranks: module name -> rank of the placed modules. dropout: of what is put on them.
        key: equal for runs that cost the same, which are those that can use one another's compiled model.
        settles: steps until what is trained is of its final size. average, keep_best, noise: as in `AdapterSpec`.
        outdated: part of the names of what only former versions trained; their checkpoints are not gone on from.
    """

    build: Callable[[BaseModel], "Trainee"]
    ranks: Mapping[str, int]
    dropout: float
    seed: int
    key: str = ""
    average: float | None = None
    keep_best: bool = False
    noise: float = 0.0
    settles: int = 0
    outdated: str | None = None

    def saveable(self, step: int) -> bool:
        """Whether what there is after a step is such as the method is to leave."""
        return step >= self.settles

    def resumes(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint of parameters with these names can be gone on from."""
        return self.outdated is None or not any(self.outdated in name for name in names)

    def settled(self) -> "UnpackedSpec":
        """What is left of it to be scored."""
        return replace(self, average=None, keep_best=False, noise=0.0)

    def shape(self) -> dict[str, Any]:
        """All that time and memory of a step depend on."""
        return {
            "key": self.key, "dropout": self.dropout > 0, "average": self.average is not None, "best": self.keep_best,
            "noise": self.noise > 0,
        }  # fmt: skip


class Trainee:
    """A twin with what a method trains on it: its parameters that require a gradient. Methods extend it.

    Attributes:
        model: the twin. steps: optimiser steps done. folder: of a run's, where it is saved.
        graphable: whether a step can be captured as a CUDA graph. compilable: whether its layers can be compiled too.
        importance: whether `updated` looks at gradients.
        spares_vectors: whether biases and norms are spared weight decay, as Hugging Face's Trainer spares them.
    """

    folder = ADAPTER
    graphable = False
    compilable = False
    importance = False
    spares_vectors = False

    def __init__(self, model: Any) -> None:
        self.model, self.steps = model, 0

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def decoder(self) -> Callable[..., Any]:
        """Called as the base's inner model is, and gives the last hidden state of every token that it was given."""
        decoder: Callable[..., Any] = inner_model(self.model)
        return decoder

    def fresh(self) -> Mapping[str, Tensor] | None:
        """The value each trained parameter starts from, for another run with this twin; None where it cannot serve."""
        return None

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a step."""
        return None

    def updated(self, step: int) -> None:
        """Called after optimiser step `step`, from 1, with the clipped gradients still in place if `importance`."""

    def state(self) -> dict[str, Tensor]:
        """What resuming needs besides the parameters and their moments."""
        return {}

    def resume(self, state: Mapping[str, Tensor], step: int) -> None:
        """Takes up a `state` saved after `step` steps."""

    def ranks(self) -> dict[str, int]:
        """Effective rank of each module, where it is not the one the run began with."""
        return {}

    def files(self) -> Mapping[str, Mapping[str, Tensor] | str]:
        """What was trained, copied to the host: name of a file -> its tensors or text."""
        raise NotImplementedError

    def read(self, folder: Path) -> None:
        """Takes up what was written of `files`."""
        raise NotImplementedError


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, ready to be written."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def twin(model: nn.Module) -> Any:
    """Modules of their own over the weights of `model`: nothing put on or replaced in the twin is seen by it."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        # another object on the same storage; a quantised one carries its own state and is shared as it is
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if plain else parameter
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            memo[id(state)] = state
        for value in vars(module).values():  # such as a recurrent state that the last batch left
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
