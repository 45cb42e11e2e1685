"""A run that has a model to itself: any torch parameters, in the place that a pack gives to its adapters.

The trained parameters lie in one flat float32 store with gradients and Adam moments, as those of a pack do, and the
loop, the loss and the optimiser are the pack's. Where the base is in bfloat16 a trained weight of it is a working copy
of its float32 value.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweeper.lora.flat import Flat
from sweeper.lora.layout import BLOCK, padded
from sweeper.lora.optimizer import LR, MAX_NORM, WEIGHT_DECAY, PackedAdamW
from sweeper.lora.slot_store import Able, Learnt, Saved, Serving, State
from sweeper.lora.trainee import UnpackedSpec
from sweeper.lora.wrappers import Lanes
from sweeper.models import BaseModel
from sweeper.models.forward import inner_model

_STATE = "state:"


class UnpackedStore(Flat[UnpackedSpec]):
    """The one slot of a run that has a model to itself.

    Attributes:
        lanes: which of the two is served, slot 0 or, as -1, the base model.
        trained: the parameters, by name, in the order of the store.
    """

    def __init__(self, base: BaseModel, spec: UnpackedSpec, device: torch.device) -> None:
        self.base, self.spec = base, spec
        self.drawn_on = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self.drawn_on):
            torch.manual_seed(spec.seed)
            self.trainee = spec.build(base)
        self.trained = self.trainee.trained()
        sizes = {name: parameter.numel() for name, parameter in self.trained.items()}
        ends = list(itertools.accumulate(map(padded, sizes.values()), initial=0))
        self.bounds = {name: (at, at + size) for (name, size), at in zip(sizes.items(), ends, strict=False)}
        copies = [name for name, wanted in (("average", spec.average), ("best", spec.keep_best)) if wanted]
        block_slot = torch.zeros(ends[-1] // BLOCK, dtype=torch.int64)
        super().__init__([[(0, ends[-1])]], block_slot, copies, size=ends[-1], device=device)
        self.lanes = Lanes.of(1, device)
        self.draw: int | None = None
        self.taken = False
        self._take_up()
        self.optimizer = PackedAdamW(self.weak)

    @torch.no_grad()
    def _take_up(self) -> None:
        """Puts the trained parameters into the store, or where they are not in float32 copies of them."""
        self.working: list[Tensor] = []
        self.masters: list[Tensor] = []
        for name, parameter in self.trained.items():
            master, gradient = self.view(name), self.view(name, self.grads)
            master.copy_(parameter)
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = master, gradient
            else:
                parameter.data = parameter.data.clone()
                parameter.register_post_accumulate_grad_hook(_collect(gradient))
                self.working.append(parameter)
                self.masters.append(master)

    def view(self, name: str, store: Tensor | None = None) -> Tensor:
        """A trained parameter in the store, or in one of the same layout."""
        start, stop = self.bounds[name]
        return (self.params if store is None else store)[start:stop].view(self.trained[name].shape)

    def views(self, slot: int, store: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Parameter name -> the parameter in the store, or in one of the same layout."""
        return {name: (self.view(name, store),) for name in self.trained}

    @property
    def state_bytes(self) -> int:
        """Of values, gradients and moments, beyond the weights of the model itself."""
        shared = sum(p.numel() for p in self.trained.values() if p.dtype == torch.float32)
        return (16 + 4 * len(self.copies)) * self.trainable - 4 * shared

    @property
    def trainable(self) -> int:
        """Trained parameters."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def parameters_of(self, module: str) -> int:
        """Trained parameters in or on one module."""
        own = [p for name, p in self.trained.items() if f"{module}." in name]
        return sum(parameter.numel() for parameter in own)

    @property
    def able(self) -> Able:
        return Able(mixes=False, graphs=self.trainee.graphable, compiles=self.trainee.compilable)

    @property
    def model(self) -> Any:
        return self.trainee.model

    @property
    def serving(self) -> Serving:
        """The twin, or the base itself for lane -1."""
        if self.lanes.host_slots == (-1,):
            return Serving(self.base.model, inner_model(self.base.model))
        return Serving(self.model, self.trainee.decoder)

    def close(self) -> None:
        self.base.model.eval()

    def fits(self, slot: int, adapter: Any) -> bool:
        """Whether a run is like the first, and where it comes later the twin can begin afresh."""
        same = isinstance(adapter, UnpackedSpec) and adapter.key == self.spec.key
        return same and (not self.taken or self.trainee.fresh() is not None)

    @torch.no_grad()
    def assign(self, slot: int, adapter: UnpackedSpec, state: State | None = None, step: int = 0) -> None:
        """Gives the twin to a run. The first finds it as it was built, a later one as `Trainee.fresh` says."""
        self.spec = self.held[0] = adapter
        self.lanes.noise.fill_(adapter.noise)
        self.lanes.noisy = adapter.noise > 0
        # a step that can be captured draws nothing but the noise of the embedding
        self.lanes.drop = not self.trainee.graphable
        if self.taken:
            start = self.trainee.fresh()
            assert start is not None
            for name, value in start.items():
                self.view(name).copy_(value)
            self.publish(0)
        self.taken, self.trainee.steps = True, 0
        for copied in self.copies.values():
            copied.copy_(self.params)
        if state is not None:
            self._restore(state, step)

    def release(self, slot: int) -> None:
        """Forgets gradients and moments; the weights stay until the twin is given to another run."""
        for store in (self.grads, self.exp_avg, self.exp_avg_sq):
            store.zero_()
        self.held[0] = None

    @torch.no_grad()
    def publish(self, slot: int) -> None:
        """Brings the working copies up to date."""
        if self.working:
            torch._foreach_copy_(self.working, self.masters)

    def snapshot(self, slot: int) -> dict[str, tuple[Tensor, ...]]:
        """Parameter name -> value and Adam moments, and what else the method remembers, on the host."""
        stores = self._stores()
        found = {name: tuple(self.view(name, s).to("cpu", copy=True) for s in stores) for name in self.trained}
        return found | {f"{_STATE}{key}": (value.cpu(),) for key, value in self.trainee.state().items()}

    def _restore(self, state: State, step: int) -> None:
        if {name for name in state if not name.startswith(_STATE)} != set(self.trained):
            raise RuntimeError("the checkpoint is of other parameters than this version of the method trains")
        for place, store in enumerate(self._stores()):
            for name in self.trained:
                self.view(name, store).copy_(state[name][place])
        self.trainee.steps = step
        own = {name.removeprefix(_STATE): parts[0] for name, parts in state.items() if name.startswith(_STATE)}
        self.trainee.resume(own, step)
        self.publish(0)

    def _stores(self) -> list[Tensor]:
        return [self.params, self.exp_avg, self.exp_avg_sq, *self.copies.values()]

    def seed(self, seeds: Sequence[int]) -> None:
        # torch's generator on a CPU takes 32 bits: those above, of a later pass of the step, must not be lost
        graphable = self.trainee.graphable
        self.draw = None if graphable else (seeds[0] ^ (seeds[0] >> 32) * 0x9E3779B1) & 0xFFFFFFFF
        if self.lanes.noisy:
            self.lanes.seed(seeds)

    @contextlib.contextmanager
    def one_pass(self, share: float) -> Iterator[None]:
        """Random numbers of torch modules come from the run's own seed within it; then the method's own penalty."""
        with contextlib.ExitStack() as drawing:
            if self.draw is not None:
                drawing.enter_context(torch.random.fork_rng(self.drawn_on))
                torch.manual_seed(self.draw)
            yield
        penalty = self.trainee.penalty()
        if penalty is not None:
            (penalty * share).backward()

    @torch.no_grad()
    def update(self, rows: Mapping[int, Sequence[list[float]]], steps: Mapping[int, int]) -> Tensor:
        """A step of AdamW, whose weight decay falls on what `decayed` gives, and then what the method does."""
        row, trainee = list(rows[0][0]), self.trainee
        shrink, row[WEIGHT_DECAY] = row[LR] * row[WEIGHT_DECAY], 0.0
        self.optimizer.set({0: [row]})
        kept = None
        if shrink or trainee.importance:
            norm = torch.linalg.vector_norm(self.grads)
            decayed = list(self.decayed()) if shrink else []
            if decayed:
                torch._foreach_mul_(decayed, torch.where(norm.isfinite(), 1 - shrink, 1.0))
            if trainee.importance:
                kept = self.grads * (row[MAX_NORM] / (norm + 1e-6)).clamp(max=1)
        norms = self.optimizer.step()
        trainee.steps += 1
        if kept is not None:
            self.grads.copy_(kept)
        trainee.updated(trainee.steps)
        if kept is not None:
            self.grads.zero_()
        self.publish(0)
        self.update_ema(0, steps[0])
        return norms

    def decayed(self) -> Iterator[Tensor]:
        """Views of what weight decay falls on: all but biases and norms, as in Hugging Face's Trainer."""
        for name, parameter in self.trained.items():
            if parameter.dim() > 1 or not self.trainee.spares_vectors:
                yield self.view(name)

    def saved(self, slot: int, *, values: bool = True) -> Saved:
        """What the run leaves: its average, where it has one."""
        with self.averaged():
            found = Learnt(
                folder=self.trainee.folder, files=self.trainee.files() if values else {}, ranks=self.trainee.ranks(),
                parameters={module: self.parameters_of(module) for module in self.spec.ranks}, trainable=self.trainable,
            )  # fmt: skip
        return lambda: found

    def read(self, folder: Path) -> None:
        """Takes up what a run left, to be scored and not trained on."""
        self.trainee.read(folder / self.trainee.folder)
        self.trainee.model.eval()


def _collect(gradient: Tensor) -> Callable[[Tensor], None]:
    """Adds a working copy's gradient to the store and lets go of it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient.add_(parameter.grad)
        parameter.grad = None

    return hook
