"""What a pack asks of whatever holds the trained parameters of its slots."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from sweeper.lora.alone import Learnt

from sweeper.lora.optimizer import PackedAdamW
from sweeper.lora.wrappers import Lanes

# called, perhaps in another thread, it gives what a run leaves once that has arrived on the host
Saved = Callable[[], "Mapping[str, tuple[Tensor, ...]] | Learnt"]


class Bank(Protocol):
    """Slots with parameters, gradients and Adam moments in flat float32 stores [F].

    There are two: `AdapterBank`, low-rank adapters of many runs on one frozen base, and `Alone`, the one run that has
    a model to itself.

    Attributes:
        mixes: whether rows of several slots may lie in one batch.
        lanes: which slot each lane of the present batch belongs to; -1 is the bare base model.
    """

    mixes: bool
    lanes: Lanes
    params: Tensor
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def capacities(self) -> Sequence[Any]:
        """What each slot has room for."""
        ...

    @property
    def model(self) -> Any:
        """What is trained: the base model, or a twin of it."""
        ...

    @property
    def graphable(self) -> bool:
        """Whether a step can be captured as a CUDA graph."""
        ...

    @property
    def compilable(self) -> bool:
        """Whether the layers can be compiled before that."""
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

    def assign(self, slot: int, adapter: Any, *, fresh: bool = True) -> None:
        """Gives a slot to a run that begins afresh, or whose snapshot is restored next."""
        ...

    def set_rates(self, slot: int, step: int) -> None:
        """Says what of a slot trains from a step (from 0) on."""
        ...

    def derive(self, slots: Iterable[int] | None = None) -> None:
        """Brings up to date what follows from the parameters, of all slots or some."""
        ...

    def project(self) -> None:
        """Makes gradients of the parameters of those of what follows from them."""
        ...

    def release(self, slot: int) -> None: ...

    def snapshot(self, slot: int, adapter: Any) -> dict[str, tuple[Tensor, ...]]:
        """All that resuming needs besides the number of steps done, on the host."""
        ...

    def saved(self, slot: int, adapter: Any, *, values: bool = True) -> "Saved":
        """What the run of a slot leaves; without the `values`, only what the record says of them."""
        ...

    def restore(self, slot: int, adapter: Any, state: Mapping[str, tuple[Tensor, ...]], step: int) -> None:
        """Puts back a snapshot that was taken after `step` steps."""
        ...

    def make_optimizer(self) -> PackedAdamW: ...

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass (`seeds.for_rows`)."""
        ...

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """Within it, random numbers come from those seeds."""
        ...

    def restart(self, slot: int, step: int) -> None:
        """Begins the next adapter of a run that merges and restarts, before its step `step` (from 0)."""
        ...

    def sense(self, steps: Mapping[int, int]) -> None:
        """Notes what runs that learn their patterns look at; slot -> its coming step (from 1)."""
        ...

    def prune(self, slot: int, step: int) -> None:
        """Sets to zero what such a run does without, after its step `step`."""
        ...

    def penalise(self, share: float) -> None:
        """Adds the gradients of what runs add to their loss, times `share`."""
        ...

    def follow(self, slot: int, step: int) -> None:
        """Moves the average of a slot's weights after its step `step` (from 1), if it has one."""
        ...

    def swap_averages(self) -> None:
        """Puts averages where the weights are, and back: evaluation looks at them."""
        ...

    def keep_best(self, slot: int) -> None:
        """Remembers the weights of a slot as the best so far."""
        ...

    def take_best(self, slot: int) -> None:
        """Gives a slot its best weights back."""
        ...
