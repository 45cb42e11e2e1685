"""What a pack asks of whatever holds the trained parameters of its slots."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors.torch import save_file
from torch import Tensor

from sweeper.lora.wrappers import Lanes
from sweeper.record import replacing_folder

State = Mapping[str, tuple[Tensor, ...]]
"""Name of a module or parameter -> its values, then their moments and what else is kept of them."""


class Able(NamedTuple):
    """What can be done with a store: rows of several slots in one batch, CUDA graphs of steps, compiled layers."""

    mixes: bool
    graphs: bool
    compiles: bool


class Serving(NamedTuple):
    """The model that the present lanes run through.

    `decoder` is called as the model's inner model is, and gives the last hidden state of every token it was given.
    """

    model: Any
    decoder: Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """What a run leaves, on the host: the files of a folder, and of every placed module rank and parameters."""

    folder: str
    files: Mapping[str, Mapping[str, Tensor] | str]
    ranks: Mapping[str, int]
    parameters: Mapping[str, int]
    trainable: int

    def write(self, run: Path) -> int:
        """Writes the files to a run's folder, whole or not at all; returns the bytes of the tensors."""
        if not self.files:
            return 0
        with replacing_folder(run / self.folder) as temporary:
            for name, content in self.files.items():
                if isinstance(content, str):
                    (temporary / name).write_text(content, encoding="utf-8")
                else:
                    save_file(dict(content), temporary / name, metadata={"format": "pt"})
        tensors = [
            tensor for content in self.files.values() if not isinstance(content, str) for tensor in content.values()
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Saved = Callable[[], State | Learnt]
"""Called, perhaps in another thread, it gives what a run leaves once that has arrived on the host."""


class SlotStore(Protocol):
    """Slots with parameters, gradients and Adam moments in flat float32 stores [F].

    There are two: `AdapterStore`, low-rank adapters of many runs on one frozen base, and `UnpackedStore`, the one run
    that has a model to itself.

    Attributes:
        lanes: which slot each lane of the present batch belongs to; -1 is the bare base model.
        tasks: the most tasks that a slot tells apart; 0 where none does.
        grads: the gradients [F].
    """

    lanes: Lanes
    grads: Tensor
    tasks: int

    @property
    def slots(self) -> int:
        """How many there are."""
        ...

    @property
    def able(self) -> Able: ...

    @property
    def model(self) -> Any:
        """What is trained: the base model, or a twin of it."""
        ...

    @property
    def serving(self) -> Serving: ...

    @property
    def state_bytes(self) -> int:
        """Memory of what is trained, gradients and moments included, beyond the weights of `model`."""
        ...

    def fits(self, slot: int, adapter: Any) -> bool:
        """Whether a slot, once it is free, can be given to such a run."""
        ...

    def assign(self, slot: int, adapter: Any, state: State | None = None, step: int = 0) -> None:
        """Gives a slot to a run: afresh, or from a snapshot that was taken after `step` steps."""
        ...

    def release(self, slot: int) -> None:
        """The run of a slot has left it."""
        ...

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming pass (`seeds.for_rows`), where `lanes.draws`."""
        ...

    def one_pass(self, share: float) -> contextlib.AbstractContextManager[None]:
        """Around a forward and backward pass; `share` is the pass's of its step, 0 of one that is without penalties."""
        ...

    def update(self, rows: Mapping[int, Sequence[list[float]]], steps: Mapping[int, int]) -> Tensor:
        """An optimiser step of some slots and all that follows it; clears the gradients.

        Args:
            rows: slot -> the hyperparameters (`optimizer.hyperparameters`) of each of its rank blocks, or of all of it.
            steps: slot -> its step, from 1.

        Returns:
            Gradient norms [J] before clipping.
        """
        ...

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it averages are where the weights are, of the slots that have one: evaluation looks at them."""
        ...

    def keep_best(self, slot: int) -> None:
        """Remembers the weights of a slot as the best so far."""
        ...

    def take_best(self, slot: int) -> None:
        """Gives a slot its best weights back."""
        ...

    def views(self, slot: int, store: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Name of a module or parameter -> what is trained of it, as views of the values or of a store like them."""
        ...

    def publish(self, slot: int) -> None:
        """Brings up to date what follows from a slot's parameters, where anything but `update` wrote them."""
        ...

    def snapshot(self, slot: int) -> dict[str, tuple[Tensor, ...]]:
        """All that resuming needs besides the number of steps done, on the host."""
        ...

    def saved(self, slot: int, *, values: bool = True) -> Saved:
        """What the run of a slot leaves; without the `values`, only what the record says of them."""
        ...

    def close(self) -> None:
        """Gives the base model back as it was."""
        ...
