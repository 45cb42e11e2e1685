"""How much each module matters: a short probe on training batches, before ranks are allocated.

The base stays frozen and no weight asks for its gradient. A hook on each module keeps its input; a hook on its output
meets the output's gradient in the backward pass, makes the weight's gradient G [out, in] from the two, takes a number
of it and drops it. So at most one weight's gradient is held at a time, whatever the model's size, and a quantised
weight can be scored as well.

Scores, each free of the module's size, so that equal modules of different shape get equal ranks:

    gradient     root mean square of G's entries, mean over batches
    fisher       root of the mean diagonal of the empirical Fisher information: G of single examples, squared, mean over
                 entries and examples (Kirkpatrick et al. 2017, with the data's own labels)
    sensitivity  mean |w g| over entries (Molchanov et al. 2019; for ranks: GoRA, He et al. 2025), mean over batches
    activation   effective rank (Roy & Vetterli 2007) of the covariance of the module's inputs: how many directions
                 carry them (EVA, Paischer et al. 2024, shares ranks out by the same spectrum)
    weight       effective rank of the weight itself; needs no data

The probe is kept on disk: it says something about a model, data and options, not about a device, and a run that is
taken up again must find the ranks it began with.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional

from sweeper.errors import ModelError
from sweeper.models import BaseModel, budget
from sweeper.models.architecture import EMBEDDING, EXPERTS, HEAD, Target
from sweeper.models.forward import hidden_states, inner_model
from sweeper.models.loss import Head
from sweeper.placement import spectrum
from sweeper.placement.importance import Probing
from sweeper.record import read_sealed, write_sealed
from sweeper.tasks.example import Tokens
from sweeper.training.batches import Batch, DataOrder, collate, supervised
from sweeper.training.compilation import eager

ROWS = 4096  # inputs of a module that `activation` looks at, spread evenly over the batches
HELD = 1 << 31  # bytes of them, or of gradients, at a time; the model runs again for the rest
SUMMED = ("gradient", "sensitivity")  # scores that are no mean over examples, and so need a whole step's gradient


@dataclass(frozen=True, slots=True)
class Probe:
    """Scores by module name, and what finding them cost; `flops` are of the passes, without decompositions."""

    scores: dict[str, float]
    seconds: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a probe is to look at: everything its scores depend on, besides the model."""

    asked: Probing
    targets: Sequence[Target]
    examples: Sequence[Tokens]
    batch_size: int
    seed: int
    accumulation: int = 1

    @property
    def batches(self) -> list[list[Tokens]]:
        """What is scored together: the examples of the first steps; for fisher each example alone."""
        return [[example for part in step for example in part] for step in self.steps]

    @property
    def steps(self) -> list[list[list[Tokens]]]:
        """The `batches`, each as the passes that it goes through the model in."""
        lengths = [len(example.input_ids) for example in self.examples]
        passes = self.accumulation
        order = DataOrder(lengths, self.batch_size, self.seed, accumulation=passes)
        found = [
            [[self.examples[i] for i in order.batch(step * passes + micro)] for micro in range(passes)]
            for step in range(self.asked.batches)
        ]
        if self.asked.score == "fisher":
            return [[[example]] for step in found for part in step for example in part]
        return found

    def key(self, base: BaseModel) -> str:
        """Identity of the probe; it does not depend on bounds, nor on what rank the run has."""
        seen = hashlib.sha256()
        if self.asked.score != "weight":
            for batch in self.batches:
                seen.update(repr([_read(example) for example in batch]).encode())
        described = [
            dataclasses.asdict(base.spec), str(base.model.dtype), self.asked.score, seen.hexdigest(),
            sorted(target.name for target in self.targets),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def _read(example: Tokens) -> tuple[object, ...]:
    asides = getattr(example, "asides", ())
    return (example.input_ids, example.prompt_length, *((asides,) if asides else ()))


def probed(base: BaseModel, placed: Sequence[Target]) -> list[Target]:
    """What a probe scores: every matrix of the layers, so that placements share a probe, and the ends where placed."""
    names = {target.name for target in placed}
    ends = (EMBEDDING, HEAD)
    return [t for t in base.targets if t.name in names or (t.role not in (*ends, EXPERTS) and t.layer is not None)]


def find(base: BaseModel, question: Question, cache: Path) -> Probe:
    """The probe's scores, from the cache folder or by probing. Another process that asks the same waits.

    Raises:
        ModelError: it does not fit in memory, or its scores are no numbers or all 0.
    """
    path = cache / f"{question.key(base)}.json"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path.with_suffix(".lock")))
        try:
            return Probe(**read_sealed(path))
        except (OSError, ValueError, TypeError):
            pass
        found = measure(base, question)
        with contextlib.suppress(OSError):
            write_sealed(path, dataclasses.asdict(found))
    return found


def measure(base: BaseModel, question: Question) -> Probe:
    """Probes a base model that no pack is installed on. As `find`, without a cache."""
    began = time.perf_counter()
    score = question.asked.score
    try:
        scores = _of_weights(base, question) if score == "weight" else _of_batches(base, question)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"allocation=importance: a probe of score={score} does not fit in memory: lower trainer.batch_size or "
            "dataset.max_length, or choose allocation.options.score=weight"
        ) from None
    if not all(0 <= value < float("inf") for value in scores.values()) or not any(scores.values()):
        raise ModelError(f"allocation=importance: score={score} is nowhere a number above 0: is the loss finite?")
    if base.model.device.type == "cuda":
        torch.cuda.synchronize(base.model.device)
    return Probe(scores, time.perf_counter() - began, _flops(base, question))


def _of_batches(base: BaseModel, question: Question) -> dict[str, float]:
    score = question.asked.score
    found: dict[str, float] = {}
    for group in _groups(question):
        observers = {target.name: OBSERVERS[score](base.model.get_submodule(target.name)) for target in group}
        with _hooked(base.model, observers, backward=score != "activation"), eager():
            for step in question.steps:
                total = sum(supervised(examples) for examples in step)
                for micro, examples in enumerate(step, start=1):
                    _look(base, question, examples, observers, total, last=micro == len(step))
        found |= {name: observer.result() for name, observer in observers.items()}
    first = {target.inputs: target.name for target in reversed(question.targets)}
    return {target.name: found.get(target.name, found.get(first[target.inputs], 0.0)) for target in question.targets}


def _look(
    base: BaseModel, question: Question, examples: Sequence[Tokens], observers: Mapping[str, "_Observer"], total: int,
    *, last: bool,
) -> None:  # fmt: skip
    """One pass through the model and, where gradients are asked for, back. `total`: target tokens of its step."""
    score, device = question.asked.score, base.model.device
    # an example's own log-likelihood is a sum; a training step takes the mean
    weight = 1.0 if score == "fisher" else 1 / total
    batch = collate([examples], [[weight] * len(examples)], fixed=False).to(device)
    lengths = torch.tensor([len(example.input_ids) for example in examples], device=device)
    mask = torch.arange(batch.ids.shape[1], device=device) < lengths[:, None]
    for observer in observers.values():
        observer.begin(mask, rows=max(ROWS // question.asked.batches, 1), last=last)
    ends = any(target.role == HEAD for target in question.targets)
    with torch.set_grad_enabled(score != "activation"):
        hidden = hidden_states(inner_model(base.model), batch.ids, lengths, base.verdict.padding)
        if score != "activation":
            _loss(base, hidden, batch, whole=ends).backward()
        elif ends:
            base.model.get_output_embeddings()(hidden)
    if last:
        for observer in observers.values():
            observer.end()


def _groups(question: Question) -> Iterator[list[Target]]:
    """Targets in groups of which what is kept fits into `HELD` bytes.

    For activation that is inputs, so there is one target for each; of a step in several passes the gradients so far.
    """
    score = question.asked.score
    if score == "activation":
        distinct = {target.inputs: target for target in reversed(question.targets)}
        targets = list(reversed(distinct.values()))
    else:
        targets = list(question.targets)
    group: list[Target] = []
    held = 0
    for target in targets:
        if score == "activation":
            size = 4 * ROWS * target.in_features if target.kind != "embedding" else 0
        else:
            size = 4 * target.in_features * target.out_features if score in SUMMED and question.accumulation > 1 else 0
        if group and held + size > HELD:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    yield group


def _loss(base: BaseModel, hidden: Tensor, batch: Batch, *, whole: bool) -> Tensor:
    """The batch's weighted NLL; `whole` goes through the head as a module, so that a hook on it sees its gradient."""
    head = Head.of(base.model, base.verdict.head)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.index.flatten())
    if not whole:
        return head.scores(rows, batch.targets, batch.weights)[0].sum()
    nll = functional.cross_entropy(head.logits(rows), batch.targets.flatten(), reduction="none")
    return torch.where(batch.weights.flatten() == 0, 0.0, batch.weights.flatten() * nll).sum()


@contextlib.contextmanager
def _hooked(model: Any, observers: dict[str, "_Observer"], *, backward: bool) -> Iterator[None]:
    handles = []
    if backward:  # with every weight frozen, this is where the graph begins
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    handles += [model.get_submodule(name).register_forward_hook(one.see) for name, one in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """Watches one module and adds up a number for each batch, on the device."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seen: list[Tensor] = []
        self.parts: list[Tensor] = []  # of the present batch

    def begin(self, mask: Tensor, *, rows: int, last: bool) -> None:
        """A pass begins, of a batch its `last`: `mask` [examples, length] is true where there is a token."""
        self.mask, self.rows, self.last = mask, rows, last

    def see(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda gradient: self.note(x, gradient))

    @torch.no_grad()
    def note(self, x: Tensor, gradient: Tensor) -> None:
        made = _weight_gradient(self.module, x, gradient)
        self.parts = [self.parts[0].add_(made)] if self.parts else [made]
        if self.last:  # and not in the end: no more than one gradient is to be held
            self.end()

    @torch.no_grad()
    def end(self) -> None:
        """A batch has gone through: also where the last pass did not come here."""
        self.seen += [self.number(made) for made in self.parts]
        self.parts = []

    def number(self, gradient_OI: Tensor) -> Tensor:
        raise NotImplementedError

    def result(self) -> float:
        """Mean over batches; 0 of a module that no batch came to, as happens to experts."""
        return float(torch.stack(self.seen).mean()) if self.seen else 0.0


class _Gradient(_Observer):
    def number(self, gradient_OI: Tensor) -> Tensor:
        return gradient_OI.square().mean().sqrt()


class _Sensitivity(_Observer):
    def number(self, gradient_OI: Tensor) -> Tensor:
        return (gradient_OI * spectrum.weight_of(self.module)).abs().mean()


class _Fisher(_Observer):
    def number(self, gradient_OI: Tensor) -> Tensor:
        return gradient_OI.square().mean()

    def result(self) -> float:
        return float(super().result() ** 0.5)


class _Activation(_Observer):
    def see(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, mask = args[0].detach(), self.mask.flatten()
        rows = x.flatten() if isinstance(module, nn.Embedding) else x.reshape(-1, x.shape[-1])
        rows = rows[mask] if len(rows) == len(mask) else rows  # a head is given rows without padding
        self.parts.append(rows)

    def end(self) -> None:
        if self.parts:
            rows = torch.cat(self.parts)
            self.seen.append(rows[:: -(-len(rows) // self.rows)])
        self.parts = []

    def result(self) -> float:
        if not self.seen:
            return 0.0
        rows = torch.cat(self.seen)
        if isinstance(self.module, nn.Embedding):  # its inputs are one-hot
            rows = functional.one_hot(rows.unique(return_inverse=True)[1])
        self.seen.clear()
        rows = rows.float()
        return spectrum.effective_rank(spectrum.singular_values(rows - rows.mean(0)).square())


OBSERVERS: dict[str, Callable[[nn.Module], _Observer]] = {
    "gradient": _Gradient, "fisher": _Fisher, "sensitivity": _Sensitivity, "activation": _Activation,
}  # fmt: skip


def _of_weights(base: BaseModel, question: Question) -> dict[str, float]:
    found = {}
    for target in question.targets:
        weight = spectrum.weight_of(base.model.get_submodule(target.name))
        found[target.name] = spectrum.effective_rank(spectrum.singular_values(weight))
    return found


def _weight_gradient(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient [out, in] of a module's weight, float32, from its input and its output's gradient."""
    rows_NO = gradient.reshape(-1, gradient.shape[-1])
    if isinstance(module, nn.Embedding):
        made = rows_NO.new_zeros(module.num_embeddings, rows_NO.shape[1], dtype=torch.float32)
        return made.index_add_(0, x.reshape(-1), rows_NO.float()).t()
    return (rows_NO.t() @ x.reshape(-1, x.shape[-1]).to(rows_NO.dtype)).float()


def _flops(base: BaseModel, question: Question) -> float:
    if question.asked.score == "weight":
        return 0.0
    forward_only = question.asked.score == "activation"
    tokens = squares = 0
    for batch in (part for step in question.steps for part in step):
        length = -(-max(len(example.input_ids) for example in batch) // 8) * 8  # as `collate` pads
        tokens += length * len(batch)
        squares += length * length * len(batch)
    scored = None if forward_only else question.targets
    each = budget.probe_flops_per_token(base.targets, scored, length=round(squares / tokens))
    return each * tokens * len(list(_groups(question)))
