"""What a pack asks of whatever holds the trained parameters of its slots."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from sweeper.engine.adapters import Lanes
from sweeper.engine.optimizer import PackedAdamW


class Bank(Protocol):
    """Slots with parameters, gradients and Adam moments in flat float32 stores [F].

    There are two: `AdapterBank`, low-rank adapters of many runs on one frozen base, and `Alone`, the one run that has
    a model to itself.

    Attributes:
        model: what is trained, the base model or a twin of it. capacities: of each slot, module name -> highest rank.
        mixes: whether rows of several slots may lie in one batch.
        lanes: which slot each lane of the present batch belongs to; -1 is the bare base model.
    """

    model: Any
    capacities: Sequence[Mapping[str, int]]
    mixes: bool
    lanes: Lanes
    params: Tensor
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def graphable(self) -> bool:
        """Whether a step can be captured as a CUDA graph."""
        ...

    @property
    def serving(self) -> Any:
        """The model that the present lanes run through."""
        ...

    @property
    def decoder(self) -> Callable[..., Any]:
        """Called as that model's inner model is; gives the last hidden state of every token it was given."""
        ...

    @property
    def state_bytes(self) -> int:
        """Memory of what is trained, gradients and moments included, beyond the weights of `model`."""
        ...

    @property
    def draws(self) -> bool:
        """Whether the coming step draws random numbers, and so must be given `seed`."""
        ...

    def install(self) -> None: ...

    def uninstall(self) -> None:
        """Gives the base model back as it was."""
        ...

    def fits(self, slot: int, adapter: Any) -> bool:
        """Whether a slot, once it is free, can be given to such a run."""
        ...

    def assign(self, slot: int, adapter: Any) -> None:
        """Gives a slot to a run that begins afresh."""
        ...

    def release(self, slot: int) -> None: ...

    def snapshot(self, slot: int, adapter: Any) -> dict[str, tuple[Tensor, ...]]:
        """All that resuming needs besides the number of steps done, on the host."""
        ...

    def restore(self, slot: int, adapter: Any, state: Mapping[str, tuple[Tensor, ...]], step: int) -> None:
        """Puts back a snapshot that was taken after `step` steps."""
        ...

    def make_optimizer(self) -> PackedAdamW: ...

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass."""
        ...

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """Within it, random numbers come from those seeds."""
        ...

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss of a step."""
        ...
