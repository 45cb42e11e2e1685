"""A run that has a model to itself: any torch parameters, in the place that a pack gives to its adapters.

What a method trains is a twin of the base model: modules of its own over the weights of the base, so that whatever is
put on it or changed in it, the base stays as it is and can be scored beside it. The trained parameters lie in one flat
float32 store with gradients and Adam moments, as those of a pack do, and the loop, the loss and the optimiser are the
pack's. Where the base is in bfloat16 a trained weight of it is a working copy of its float32 value.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sweeper.lora.optimizer import LR, MAX_NORM, WEIGHT_DECAY, PackedAdamW
from sweeper.lora.store import BLOCK
from sweeper.lora.wrappers import Lanes
from sweeper.models import BaseModel
from sweeper.models.forward import inner_model
from sweeper.record import ADAPTER, replacing_folder

Changed = Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AloneSpec:
    """What one run trains by itself.

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
    restarts: None = None

    def saveable(self, step: int) -> bool:
        """Whether what there is after a step is such as the method is to leave."""
        return step >= self.settles

    def resumes(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint of parameters with these names can be gone on from."""
        return self.outdated is None or not any(self.outdated in name for name in names)

    def settled(self) -> "AloneSpec":
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


_STATE = "state:"


class Alone:
    """The one slot of a run that trains by itself; to a `Pack` it is what an `AdapterBank` is.

    Attributes:
        capacities: of the one slot. lanes: which of the two is served, slot 0 or, as -1, the base model.
        trained: the parameters, by name, in the order of the store.
    """

    mixes = False

    def __init__(self, base: BaseModel, spec: AloneSpec, device: torch.device) -> None:
        self.base, self.spec = base, spec
        self.capacities: tuple[dict[str, int], ...] = (dict(spec.ranks),)
        self.drawn_on = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self.drawn_on):
            torch.manual_seed(spec.seed)
            self.trainee = spec.build(base)
        self.lanes = Lanes(
            torch.full((1,), -1, dtype=torch.int32, device=device),
            torch.zeros(1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(1, device=device),
        )
        self.draw: int | None = None
        self.taken = False
        self._lay_out(device)

    @torch.no_grad()
    def _lay_out(self, device: torch.device) -> None:
        self.trained = trained = self.trainee.trained()
        bounds, size = {}, 0
        for name, parameter in trained.items():
            bounds[name] = (size, size + parameter.numel())
            size += -(-parameter.numel() // BLOCK) * BLOCK
        self.bounds = bounds
        self.spans = [[(0, size)]]
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        self.block_slot = torch.zeros(size // BLOCK, dtype=torch.int64, device=device)
        self.working: list[nn.Parameter] = []
        for name, parameter in trained.items():
            master, gradient = self.view(name), self.view(name, self.grads)
            master.copy_(parameter)
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = master, gradient
            else:
                parameter.data = parameter.data.clone()
                parameter.register_post_accumulate_grad_hook(_collect(gradient))
                self.working.append(parameter)
        names = [name for name, wanted in (("average", self.spec.average), ("best", self.spec.keep_best)) if wanted]
        self.copies = {name: torch.zeros(size, device=device) for name in names}
        self.rates, self.rated, self.work = None, [False], self.params
        self.masters = [self.view(name) for name, p in trained.items() if p.dtype != torch.float32]

    def view(self, name: str, store: Tensor | None = None) -> Tensor:
        """A trained parameter in the store, or in one of the same layout."""
        start, stop = self.bounds[name]
        return (self.params if store is None else store)[start:stop].view(self.trained[name].shape)

    @property
    def state_bytes(self) -> int:
        """Of values, gradients and moments, beyond the weights of the model itself."""
        shared = sum(p.numel() for p in self.trained.values() if p.dtype == torch.float32)
        return (16 + 4 * len(self.copies)) * self.trainable - 4 * shared

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.trained.values())

    def parameters_of(self, module: str) -> int:
        """Trained parameters in or on one module."""
        own = [p for name, p in self.trained.items() if f"{module}." in name]
        return sum(parameter.numel() for parameter in own)

    @property
    def graphable(self) -> bool:
        return self.trainee.graphable

    @property
    def compilable(self) -> bool:
        return self.trainee.compilable

    @property
    def model(self) -> Any:
        return self.trainee.model

    @property
    def serving(self) -> Any:
        """The model of the present lanes: the twin, or the base itself for lane -1."""
        return self.base.model if self.lanes.host_slots == (-1,) else self.model

    @property
    def decoder(self) -> Callable[..., Any]:
        return inner_model(self.base.model) if self.lanes.host_slots == (-1,) else self.trainee.decoder

    def install(self) -> None:
        """Nothing is put on the base model."""

    def uninstall(self) -> None:
        self.base.model.eval()

    def fits(self, slot: int, adapter: Any) -> bool:
        same = isinstance(adapter, AloneSpec) and adapter.key == self.spec.key
        return same and (not self.taken or self.trainee.fresh() is not None)

    @torch.no_grad()
    def assign(self, slot: int, adapter: Any, *, fresh: bool = True) -> None:
        """Gives the twin to a run. The first finds it as it was built, a later one as `Trainee.fresh` says."""
        self.spec = adapter
        self.lanes.noise.fill_(adapter.noise)
        self.lanes.noisy = adapter.noise > 0
        if self.taken:
            start = self.trainee.fresh()
            assert start is not None
            for store in (self.grads, self.exp_avg, self.exp_avg_sq):
                store.zero_()
            for name, value in start.items():
                self.view(name).copy_(value)
            self.publish()
        self.taken, self.trainee.steps = True, 0
        for copied in self.copies.values():
            copied.copy_(self.params)

    def release(self, slot: int) -> None:
        """The weights stay until the twin is given to another run."""

    @torch.no_grad()
    def publish(self) -> None:
        """Brings the working copies up to date."""
        if self.working:
            torch._foreach_copy_(list[Tensor](self.working), self.masters)

    def snapshot(self, slot: int, adapter: Any) -> dict[str, tuple[Tensor, ...]]:
        """Parameter name -> value and Adam moments, and what else the method remembers, on the host."""
        stores = self._stores()
        found = {name: tuple(self.view(name, s).to("cpu", copy=True) for s in stores) for name in self.trained}
        return found | {f"{_STATE}{key}": (value.cpu(),) for key, value in self.trainee.state().items()}

    @torch.no_grad()
    def restore(self, slot: int, adapter: Any, state: Changed, step: int) -> None:
        if {name for name in state if not name.startswith(_STATE)} != set(self.trained):
            raise RuntimeError("the checkpoint is of other parameters than this version of the method trains")
        for place, store in enumerate(self._stores()):
            for name in self.trained:
                self.view(name, store).copy_(state[name][place])
        self.trainee.steps = step
        own = {name.removeprefix(_STATE): parts[0] for name, parts in state.items() if name.startswith(_STATE)}
        self.trainee.resume(own, step)
        self.publish()

    def _stores(self) -> list[Tensor]:
        return [self.params, self.exp_avg, self.exp_avg_sq, *self.copies.values()]

    @property
    def draws(self) -> bool:
        """A step that can be captured draws nothing but the noise of the embedding."""
        return not self.graphable or self.lanes.noisy

    def seed(self, seeds: Sequence[int]) -> None:
        # torch's generator on a CPU takes 32 bits: those above, of a later pass of the step, must not be lost
        self.draw = None if self.graphable else (seeds[0] ^ (seeds[0] >> 32) * 0x9E3779B1) & 0xFFFFFFFF
        if self.lanes.noisy:
            self.lanes.seeds.copy_(torch.tensor(seeds), non_blocking=True)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers of torch modules come from the run's own seed within it."""
        if self.draw is None:
            yield
            return
        with torch.random.fork_rng(self.drawn_on):
            torch.manual_seed(self.draw)
            yield

    def penalise(self, share: float) -> None:
        """Adds the gradient of the method's own penalty, times `share`."""
        penalty = self.trainee.penalty()
        if penalty is not None:
            (penalty * share).backward()

    def set_rates(self, slot: int, step: int) -> None:
        """All that trains has the run's learning rate."""

    def derive(self, slots: Iterable[int] | None = None) -> None:
        """Nothing follows from the parameters but the model itself."""

    def restart(self, slot: int, step: int) -> None:
        """Nothing is merged."""

    def sense(self, steps: Mapping[int, int]) -> None:
        """No pattern is learnt."""

    def prune(self, slot: int, step: int) -> None:
        """No pattern is learnt."""

    def project(self) -> None:
        """Gradients are those of the parameters themselves."""

    @torch.no_grad()
    def follow(self, slot: int, step: int) -> None:
        """Moves the average of the weights, with the decay that `AdapterBank.follow` has."""
        if self.spec.average is not None:
            self.copies["average"].lerp_(self.params, 1 - min(self.spec.average, (1 + step) / (10 + step)))

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Puts the average where the weights are, and back."""
        if self.spec.average is not None:
            former = self.params.clone()
            self.params.copy_(self.copies["average"])
            self.copies["average"].copy_(former)
            self.publish()

    def _to_save(self) -> Tensor:
        return self.params if self.spec.average is None else self.copies["average"]

    def keep_best(self, slot: int) -> None:
        """Remembers the weights as the best so far."""
        self.copies["best"].copy_(self._to_save())

    def take_best(self, slot: int) -> None:
        """Gives the run its best weights back."""
        for store in (self.params, self._to_save()):
            store.copy_(self.copies["best"])
        self.publish()

    def saved(self, slot: int, adapter: Any, *, values: bool = True) -> Callable[[], Learnt]:
        """What the run leaves: its average, where it has one."""
        self.swap_averages()
        found = Learnt(
            folder=self.trainee.folder, files=self.trainee.files() if values else {}, ranks=self.trainee.ranks(),
            parameters={module: self.parameters_of(module) for module in adapter.ranks}, trainable=self.trainable,
        )  # fmt: skip
        self.swap_averages()
        return lambda: found

    def read(self, folder: Path) -> None:
        """Takes up what a run left, to be scored and not trained on."""
        self.trainee.read(folder / self.trainee.folder)
        self.trainee.model.eval()

    def make_optimizer(self) -> "AloneAdamW":
        return AloneAdamW(self)

    def decayed(self) -> Iterator[Tensor]:
        """Views of what weight decay falls on: all but biases and norms, as in Hugging Face's Trainer."""
        for name, parameter in self.trained.items():
            if parameter.dim() > 1 or not self.trainee.spares_vectors:
                yield self.view(name)


@dataclass
class AloneAdamW(PackedAdamW):
    """AdamW over the store of `Alone`, whose weight decay falls on what `Alone.decayed` gives."""

    bank: Any
    shrink: float = 0.0

    def set(self, rows: dict[int, list[float]]) -> None:
        row = list(rows[0])
        self.shrink, self.most = row[LR] * row[WEIGHT_DECAY], row[MAX_NORM]
        row[WEIGHT_DECAY] = 0.0
        super().set({0: row})

    @torch.no_grad()
    def step(self) -> Tensor:
        bank = self.bank
        kept = None
        if self.shrink or bank.trainee.importance:
            norm = torch.linalg.vector_norm(bank.grads)
            decayed = list(bank.decayed()) if self.shrink else []
            if decayed:
                factor = torch.where(norm.isfinite(), 1 - self.shrink, 1.0)
                torch._foreach_mul_(decayed, factor)
            if bank.trainee.importance:
                kept = bank.grads * (self.most / (norm + 1e-6)).clamp(max=1)
        norms = super().step()
        bank.trainee.steps += 1
        if kept is not None:
            bank.grads.copy_(kept)
        bank.trainee.updated(bank.trainee.steps)
        if kept is not None:
            bank.grads.zero_()
        bank.publish()
        return norms


def _collect(gradient: Tensor) -> Callable[[Tensor], None]:
    """Adds a working copy's gradient to the store and lets go of it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient.add_(parameter.grad)
        parameter.grad = None

    return hook
