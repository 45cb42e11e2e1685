"""The resolved, frozen description of one run. Everything behind `train.py` reads this and nothing of Hydra."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import dacite

from sweeper.errors import SpecError, no_such_field, unknown

Precision = Literal["auto", "float32", "bfloat16"]
Layers = str | tuple[int, ...]

Spec = TypeVar("Spec")

SCHEDULES = ("cosine", "linear", "constant")

ORDERED = {"ordered": True}  # metadata of a mapping in which a later key may overrule an earlier one
ADDED = {"added": True}  # metadata of a field that came later; left out of plain data at its default, as of arms' keys
MADE = {"made": True}  # metadata of a field that is filled in and never typed; left out of plain data at its default
# of datasets of several tasks; as ADDED, by the value at which each is left out
ADDED_OPTIONS: dict[str, Any] = {"order": "given", "surgery": "none", "unseen": []}
OF_FILES = "sha256:"  # how `content` begins where it is a digest of files


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A section with something behind it that is no part of the configuration: files, a repository, a package.

    `content` says what that was (`sweeper.content`); nobody types it. `PLACE` is the field that says where files lie.
    """

    PLACE: ClassVar[str]

    content: str | None = field(default=None, metadata=MADE)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeSpec(Stored):
    """Of an option that is the user's own (`sweeper.register`): `content` is the digest of its source.

    `plugin` is the module or file that registers it, empty where that is a script or notebook.
    """

    PLACE: ClassVar[str] = "plugin"

    plugin: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Stored):
    """A base model: where its weights come from and, for unknown architectures, the roles of its modules.

    Attributes:
        source: where its weights come from.
        location: a hub id (source hub), a folder (path), `package:file` inside an installed package (gguf), or a
            transformers model type (random, built from `config`).
        revision: branch, tag or commit on the hub; null is the newest, and the record names its commit.
        trust_remote_code: whether Python that comes with the model may run.
        roles: role -> regular expression of module names, for an architecture whose modules cannot be told apart.
        config: fields of the transformers config, for source random.
    """

    PLACE: ClassVar[str] = "location"

    name: str
    source: Literal["hub", "path", "gguf", "random"]
    location: str
    revision: str | None = None
    trust_remote_code: bool = False
    roles: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.config and self.source != "random":
            raise SpecError(f"model.config.{next(iter(self.config))}: model={self.name} comes with a config of its own")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementSpec:
    """Which module roles are adapted, and in which layers.

    Attributes:
        roles: what a module does in its block: attn_q, ff_up, mixer_in and so on.
        layers: all, lower_half, upper_half, middle_half, every_other, first:K, last:K, or a list of layer numbers.
        patterns: regular expressions of module names, in place of roles, for placement=custom.
        embeddings: whether the input embedding is adapted as well.
        head: whether the output head is adapted as well.
    """

    name: str
    roles: tuple[str, ...] = ()
    layers: Layers = "all"
    patterns: tuple[str, ...] = ()
    embeddings: bool = False
    head: bool = False
    code: CodeSpec | None = field(default=None, metadata=MADE)

    def __post_init__(self) -> None:
        if bool(self.roles) == bool(self.patterns) and not (self.embeddings or self.head):
            raise SpecError(
                f"placement={self.name} needs either roles or patterns (placement=custom: "
                "'placement.patterns=[mlp\\.c_proj]'), got " + ("both" if self.roles else "neither"),
                field="placement", wanted="either roles or patterns", got=self.roles or None,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationSpec:
    """How rank is spread over the placed modules.

    Attributes:
        budget: trainable parameters, a number or text such as 2.4M, for matched and importance; null is what
            `placement=full` (matched) or a uniform allocation (importance) has at this rank.
        pattern: role or regular expression -> rank, for allocation=pattern; the last that fits counts.
        options: of allocation=importance.
    """

    name: str
    budget: int | str | None = None
    pattern: dict[str, int] = field(default_factory=dict, metadata=ORDERED)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for field_, only in (("budget", ("matched", "importance")), ("pattern", ("pattern",))):
            if getattr(self, field_) and self.name not in only:
                raise SpecError(f"allocation.{field_} needs allocation={' or '.join(only)}, not {self.name}")
        if isinstance(self.budget, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", self.budget)
            if match is None:
                raise SpecError(f"allocation.budget={self.budget}: give a number of parameters, such as 2.4M or 500k")
            factor = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]]
            object.__setattr__(self, "budget", round(float(match[1]) * factor))

    @property
    def parameters(self) -> int | None:
        """The budget as a number."""
        assert not isinstance(self.budget, str)
        return self.budget


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingSpec:
    """How several tasks share the ranks of an adapter (`sweeper.methods.sharing`).

    Attributes:
        levels: ranks of the blocks of each level of the tree, from the root; empty: shared out evenly.
        budget: whose ranks add up to the run's: those of the blocks that a row runs through, or of all.
        tree: nested lists of names of tasks.
        common, private: where the root's block and the tasks' own lie, within the run's placement.
        orthogonality: weight of |A_new A_old^T|^2 in the loss, of blocks on top of earlier ones.
        experts: blocks that a learnt gate opens; 0: one for each task, or four. router: whether it reads each token's
            input to a module or the prompt. kept: experts of a row; 0: all. tied: whether all modules share one router.
        balance: weight of the load-balancing loss, a mean over modules.
        elasticity: half of it weighs F |theta - theta*|^2 in the loss, of values that earlier tasks left.
        fisher_examples: training examples of a task, at most, that its Fisher information F is the mean over.
    """

    name: str = "single"
    levels: tuple[int, ...] = ()
    budget: Literal["active", "total"] = "active"
    tree: tuple[Any, ...] = ()
    common: PlacementSpec | None = None
    private: PlacementSpec | None = None
    orthogonality: float = 0.0
    experts: int = field(default=0, metadata=ADDED)
    router: Literal["token", "prompt"] = field(default="token", metadata=ADDED)
    kept: int = field(default=0, metadata=ADDED)
    tied: bool = field(default=False, metadata=ADDED)
    balance: float = field(default=0.0, metadata=ADDED)
    elasticity: float = field(default=0.0, metadata=ADDED)
    fisher_examples: int = field(default=64, metadata=ADDED)

    def __post_init__(self) -> None:
        for name in ("experts", "kept", "balance"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise SpecError(field=f"sharing.{name}", wanted="at least 0", got=getattr(self, name))
        if not (self.orthogonality >= 0 and math.isfinite(self.orthogonality)):
            raise SpecError(field="sharing.orthogonality", wanted="at least 0", got=self.orthogonality)
        if not (self.elasticity >= 0 and math.isfinite(self.elasticity)):
            raise SpecError(field="sharing.elasticity", wanted="at least 0", got=self.elasticity)
        if self.fisher_examples < 1:
            raise SpecError(field="sharing.fisher_examples", wanted="at least 1", got=self.fisher_examples)
        if any(level < 0 for level in self.levels):
            raise SpecError(field="sharing.levels", wanted="ranks of at least 0", got=self.levels)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSpec:
    """What is trained on the frozen base.

    Attributes:
        dropout: probability that an entry of an adapter's input is zeroed, drawn for each run by itself.
        rank_stabilised: whether the factor on B A is alpha / sqrt(rank), as in rsLoRA, instead of alpha / rank.
        options: of the method.
    """

    name: str
    dropout: float = 0.0
    rank_stabilised: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    code: CodeSpec | None = field(default=None, metadata=MADE)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise SpecError(field="method.dropout", wanted="in [0, 1)", got=self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec(Stored):
    """A task: its family (a module of `sweeper.tasks`), sizes, template and family-specific options.

    Attributes:
        family: the module of `sweeper.tasks` that reads it.
        path: file or folder, or id on the hub.
        train_examples: examples of the training split, at most; null is all.
        validation_examples: examples of the validation split, at most.
        test_examples: examples of the test split, at most.
        max_length: tokens of prompt and response together; a longer prompt loses its beginning.
        split_seed: of the split, where the data has none.
        columns: which columns of a file or hub set are prompt, response and so on (`sweeper.tasks.columns`).
        template: how prompt and response become text: chat (the model's own), alpaca or plain.
        system: system message of the chat template.
        metrics: what is scored besides the NLL.
        max_new_tokens: length of generated text; 0 where no metric needs any.
        options: of the family.
        parts: the tasks of a mixture or sequence: sizes, templates and lengths are theirs, and metrics those that all
            of them have.
    """

    PLACE: ClassVar[str] = "path"

    name: str
    family: str
    path: str | None = None
    train_examples: int | None = None
    validation_examples: int = 200
    test_examples: int = 200
    max_length: int = 256
    split_seed: int = 0
    template: str = "chat"
    system: str | None = None
    metrics: tuple[str, ...] = ("exact_match",)
    max_new_tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    parts: tuple["DatasetSpec", ...] = field(default=(), metadata=ADDED)
    columns: dict[str, str] = field(default_factory=dict, metadata=ADDED)
    code: CodeSpec | None = field(default=None, metadata=MADE)

    def __post_init__(self) -> None:
        if self.parts:
            kept = {name: value for name, value in self.options.items() if value != ADDED_OPTIONS.get(name, ...)}
            object.__setattr__(self, "options", kept)
            common = [name for name in self.parts[0].metrics if all(name in part.metrics for part in self.parts)]
            object.__setattr__(self, "max_length", max(part.max_length for part in self.parts))
            object.__setattr__(self, "metrics", tuple(common))
        for name, least in (("validation_examples", 1), ("test_examples", 1), ("max_length", 8)):
            if getattr(self, name) < least:
                raise SpecError(field=f"dataset.{name}", wanted=f"at least {least}", got=getattr(self, name))
        if self.train_examples is not None and self.train_examples < 1:
            wanted = "at least 1 or null for all"
            raise SpecError(field="dataset.train_examples", wanted=wanted, got=self.train_examples)
        if self.max_new_tokens < 0:
            raise SpecError(field="dataset.max_new_tokens", wanted="at least 0", got=self.max_new_tokens)

    @property
    def ordered_by_seed(self) -> bool:
        """Whether the run's seed says in which order its tasks come, so that seeds replicate over orders."""
        return bool(self.parts) and self.options.get("order") == "seed"

    def ordered(self, seed: int) -> "DatasetSpec":
        """The tasks in the order that a seed draws, whatever order they are in."""

        def drawn(part: "DatasetSpec") -> str:
            return hashlib.sha256(f"{seed}/{part.name}".encode()).hexdigest()

        return dataclasses.replace(self, parts=tuple(sorted(self.parts, key=drawn)))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSpec:
    """AdamW and its schedule. The penalties are weights of what is added to the loss (`sweeper.lora.penalty`).

    Attributes:
        lr: peak learning rate. A method with a rate of its own (vera, full_ft and others) replaces the default.
        weight_decay: decoupled, as in AdamW.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of squared gradients.
        eps: added to the root of the latter.
        schedule: cosine or linear (both to 0), or constant, after the warm-up.
        warmup_fraction: share of max_steps in which the rate climbs from 0.
        max_grad_norm: norm of one run's adapter gradients, whatever shares its pack; null switches clipping off.
        lr_ratio: learning rate of B over that of A; null is the method's own (16 for lora_plus, else 1).
        update_penalty: weight of |s B A|^2 in the loss.
        orthogonality_penalty: weight of |A A^T - I|^2 + |B^T B - I|^2 in the loss.
        norm_penalty: weight of |A|^2 + |B|^2 in the loss.
    """

    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: str = "cosine"
    warmup_fraction: float = 0.1
    max_grad_norm: float | None = 1.0
    lr_ratio: float | None = None
    update_penalty: float = 0.0
    orthogonality_penalty: float = 0.0
    norm_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise SpecError(field="optim.lr", wanted="a positive number", got=self.lr)
        if not 0 <= self.warmup_fraction < 1:
            raise SpecError(field="optim.warmup_fraction", wanted="in [0, 1)", got=self.warmup_fraction)
        if self.weight_decay < 0:
            raise SpecError(field="optim.weight_decay", wanted="at least 0", got=self.weight_decay)
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise SpecError(f"optim.beta1 and optim.beta2 must be in [0, 1), got {self.beta1}, {self.beta2}")
        if not self.eps > 0:
            raise SpecError(field="optim.eps", wanted="above 0", got=self.eps)
        if self.schedule not in SCHEDULES:
            raise SpecError(unknown("schedule", self.schedule, SCHEDULES, given=f"optim.schedule={self.schedule}"))
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise SpecError(field="optim.max_grad_norm", wanted="positive or null", got=self.max_grad_norm)
        if self.lr_ratio is not None and not (self.lr_ratio > 0 and math.isfinite(self.lr_ratio)):
            raise SpecError(field="optim.lr_ratio", wanted="above 0 or null", got=self.lr_ratio)
        for name in ("update_penalty", "orthogonality_penalty", "norm_penalty"):
            if getattr(self, name) < 0:
                raise SpecError(field=f"optim.{name}", wanted="at least 0", got=getattr(self, name))

    @property
    def penalties(self) -> tuple[float, float, float]:
        return self.update_penalty, self.orthogonality_penalty, self.norm_penalty


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSpec(Stored):
    """Length and shape of training. A step sees `batch_size * accumulation` examples, whichever the two are.

    `content` is of an adapter outside the study that the run begins with.

    Attributes:
        max_steps: optimiser steps.
        batch_size: examples of one run in a forward pass.
        accumulation: forward passes of a step.
        precision: of activations and frozen weights; adapters are float32. auto is bfloat16 on CUDA and the faster of
            the two on a CPU, and stays what it was in the study's first run.
        activation_checkpointing: whether activations are computed again in the backward pass: slower, less memory.
        deterministic: whether to do without the kernels of a GPU whose sums are in an order of chance, for 4 to 10%
            of the speed. On a CPU each run of a pack then has passes of its own, and its results are the same to the
            last bit whoever shares the pack; it trains no faster than alone.
        neftune_alpha: noise on the embedded tokens (Jain et al. 2023 use 5); 0 is none.
        ema_decay: decay of a moving average of the weights, which is then what is evaluated and saved; null is none.
        patience: evaluations without a lower validation NLL after which a run ends and keeps its best weights; null
            is never. Needs evaluation.every_steps.
        init_from: id of a run of the study, or a run's folder, whose adapter this one begins with.
    """

    PLACE: ClassVar[str] = "init_from"

    max_steps: int
    batch_size: int
    # named anew where runs are told apart: once each forward pass had an order of its own, and so other examples
    accumulation: int = field(default=1, metadata={"identity": "passes_of_step"})
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    deterministic: bool = field(default=False, metadata=ADDED)
    neftune_alpha: float = 0.0
    ema_decay: float | None = None
    patience: int | None = None
    init_from: str | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.init_from is not None and not self.init_from.strip():
            wanted = "the id of a run, its folder, or null"
            raise SpecError(field="trainer.init_from", wanted=wanted, got=self.init_from)
        for name, least in (("max_steps", 0), ("batch_size", 1), ("accumulation", 1)):
            if getattr(self, name) < least:
                raise SpecError(field=f"trainer.{name}", wanted=f"at least {least}", got=getattr(self, name))
        if self.neftune_alpha < 0:
            raise SpecError(field="trainer.neftune_alpha", wanted="at least 0", got=self.neftune_alpha)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise SpecError(field="trainer.ema_decay", wanted="in (0, 1) or null", got=self.ema_decay)
        if self.patience is not None and self.patience < 1:
            raise SpecError(field="trainer.patience", wanted="at least 1 or null", got=self.patience)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """What is measured, when.

    Attributes:
        splits: which splits are scored.
        before: whether the base model is scored too, before training.
        every_steps: validation NLL every so many steps; 0 is only before and after training.
        generate: whether metrics that need generated text are measured.
        options: of evaluation=lm_eval.
        conflict: how often a run of several tasks compares their gradients (`sweeper.training.conflict`).
    """

    name: str
    splits: tuple[str, ...] = ("validation", "test")
    before: bool = True
    every_steps: int = 0
    generate: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    conflict: int = field(default=0, metadata=ADDED)

    def __post_init__(self) -> None:
        for name in ("every_steps", "conflict"):
            if getattr(self, name) < 0:
                raise SpecError(field=f"evaluation.{name}", wanted="at least 0", got=getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSpec:
    """What a run minimises (`sweeper.objectives`).

    Attributes:
        options: of the objective.
    """

    name: str = "nll"
    options: dict[str, Any] = field(default_factory=dict)
    code: CodeSpec | None = field(default=None, metadata=MADE)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training job. Equal specs are the same run; `run_id` is its identity.

    Attributes:
        rank: of every adapted module under allocation=uniform.
        alpha: numerator of the factor on B A; null is twice the rank.
        seed: of data order, initialisation and dropout; seed=0,1,2 repeats every arm.
    """

    model: ModelSpec
    dataset: DatasetSpec
    method: MethodSpec
    placement: PlacementSpec
    allocation: AllocationSpec
    rank: int
    alpha: float
    optim: OptimSpec
    trainer: TrainerSpec
    evaluation: EvaluationSpec
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec, metadata=ADDED)
    sharing: SharingSpec = field(default_factory=SharingSpec, metadata=ADDED)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset.ordered_by_seed:
            object.__setattr__(self, "dataset", self.dataset.ordered(self.seed))
        if self.rank < 1:
            raise SpecError(field="rank", wanted="at least 1", got=self.rank)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise SpecError(field="alpha", wanted="a positive number", got=self.alpha)
        if not 0 <= self.seed < 2**31:
            raise SpecError(field="seed", wanted="in [0, 2**31)", got=self.seed)
        if self.trainer.patience is not None and not 0 < self.evaluation.every_steps < self.trainer.max_steps:
            start, steps = f"trainer.patience={self.trainer.patience} counts evaluations", self.trainer.max_steps
            if steps < 2:
                raise SpecError(f"{start} before the last step, and trainer.max_steps={steps} has none")
            raise SpecError(f"{start} while a run trains: give evaluation.every_steps, from 1 to {steps - 1}")
        try:
            canonical_json(self)
        except ValueError:  # comparisons with nan are false, and JSON has no such numbers
            name, value = next(_infinite(_distinct(self)))
            raise SpecError(field=name, wanted="a finite number", got=value) from None

    @cached_property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON of this spec."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How and where runs are executed: nothing in here changes a result, so nothing of it is part of `run_id`.

    Attributes:
        study: folder of the study, under `output_root`.
        output_root: where studies lie.
        device: auto, cpu, cuda or cuda:N.
        tracking: where curves go besides the run's folder.
        tracking_options: fields of `conf/tracking/`.
        dry_run: prints every run with its modules, parameters, FLOPs and memory, and trains nothing.
        max_pack: most runs trained together on one base model; 0 lets the planner choose.
        compile: on CUDA: on compiles the layers and captures whole steps as CUDA graphs, capture does only the latter,
            auto compiles where a sweep is long enough to pay for it.
        calibrate: measures time and memory of each kind of run alone, for an honest cost column.
        checkpoint_seconds: what trains is saved this often, so that a crash costs at most that.
        retry_failed: trains runs again that a former command recorded as failed.
        retries: how often the same command tries a run again that failed for a reason that may pass.
        keep_texts: off leaves no text of the data, and none that was generated, in a study's folder.
        plugins: modules and files that register parts of the user's own (`sweeper.register`).
    """

    study: str
    output_root: str = "outputs"
    device: str = "auto"
    tracking: str = "none"
    tracking_options: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    max_pack: int = 0
    compile: Literal["auto", "on", "capture", "off"] = "auto"
    calibrate: bool = True
    checkpoint_seconds: float = 300.0
    retry_failed: bool = True
    retries: int = 1
    keep_texts: bool = True
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", self.study):
            raise SpecError(
                f"study={self.study}: not a folder name. Use letters, digits, '-', '_' and '.'; '/' for a folder in it."
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise SpecError(f"trainer.device={self.device}: no such device. Choose from auto, cpu, cuda, cuda:N.")
        if self.retries < 0:
            raise SpecError(field="sweep.retries", wanted="at least 0", got=self.retries)
        if self.max_pack < 0:
            raise SpecError(field="sweep.max_pack", wanted="at least 0 (0: chosen for you)", got=self.max_pack)

        if self.checkpoint_seconds <= 0:
            raise SpecError(field="sweep.checkpoint_seconds", wanted="above 0", got=self.checkpoint_seconds)
        if self.tracking == "none" and self.tracking_options:
            name = next(iter(self.tracking_options))
            raise SpecError(
                f"tracking.{name}: tracking=none has no fields. Choose tracking=mlflow, tensorboard, trackio or wandb."
            )

    @property
    def folder(self) -> Path:
        """Where the study's run folders lie."""
        return Path(self.output_root) / self.study


def alone(spec: RunSpec, task: int | None = None) -> RunSpec:
    """A run whose adapter has no blocks; of one task of the run, where that is given."""
    if task is None:
        return dataclasses.replace(spec, sharing=SharingSpec())
    evaluation = dataclasses.replace(spec.evaluation, conflict=0)
    return dataclasses.replace(spec, sharing=SharingSpec(), dataset=spec.dataset.parts[task], evaluation=evaluation)


def unique(specs: Iterable[Spec]) -> list[Spec]:
    """Equal specs once, in order; by their text, since specs with mappings inside have no hash."""
    sections = {id(spec): spec for spec in specs}  # the runs of a grid share most of their sections
    return list({repr(spec): spec for spec in sections.values()}.values())


def canonical_json(spec: RunSpec) -> str:
    """Sorted, compact JSON of a spec; floats that are whole numbers and ints of the same field give the same text.

    A field at its default is left out, so that a field added later changes no run's identity. A default that changes
    must therefore change its meaning under a new name, and so must what a value means: `metadata["identity"]` is that
    name where the field itself keeps its own. Where the digest of files is known, their place is left out.
    """
    defaults, identities = _defaults(RunSpec), _identities(RunSpec)
    found = {name: getattr(spec, name) for name in _field_names(RunSpec)}
    texts = {
        identities[name]: _section_text(value)
        for name, value in found.items()
        if name not in defaults or value != defaults[name]
    }
    return f"{{{','.join(f'{json.dumps(name)}:{texts[name]}' for name in sorted(texts))}}}"


_TEXTS: dict[int, tuple[Any, str]] = {}  # id -> a section, which keeps the id its own, and its text
_MOST_TEXTS = 4096


def _section_text(value: Any) -> str:
    """Canonical JSON of a field of a run; that of a section is kept, for the runs of a grid share most of theirs.

    Raises:
        ValueError: there is a nan or inf in it.
    """
    if not is_dataclass(value):
        return json.dumps(value, allow_nan=False)
    known = _TEXTS.get(id(value))
    if known is not None and known[0] is value:
        return known[1]
    text = json.dumps(_distinct(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    while len(_TEXTS) >= _MOST_TEXTS:
        _TEXTS.pop(next(iter(_TEXTS)), None)
    _TEXTS[id(value)] = (value, text)
    return text


def _infinite(node: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The dotted names of all nan and inf in plain data."""
    if isinstance(node, float) and not math.isfinite(node):
        yield name, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _infinite(value, f"{name}.{key}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            yield from _infinite(value, name)


def to_mapping(spec: Any) -> dict[str, Any]:
    """Plain dict, list, str, number and None of a spec dataclass."""
    kind: Any = type(spec)
    optional = _marked(kind, "made") | _marked(kind, "added")
    found = {name: getattr(spec, name) for name in _field_names(kind)}
    kept = {name: one for name, one in found.items() if name not in optional or one != _defaults(kind)[name]}
    return {name: _to_plain(value) for name, value in kept.items()}


def typed_fields(kind: Any) -> list[str]:
    """The fields of a spec that people give."""
    return [name for name in _field_names(kind) if name not in _marked(kind, "made")]


def bare(spec: RunSpec) -> RunSpec:
    """The spec as it was typed, without what is known of its files and its code."""
    parts = {}
    for name in _field_names(RunSpec):
        section: Any = getattr(spec, name)
        if is_dataclass(section) and (typed := _typed(section)) is not section:
            parts[name] = typed
    return dataclasses.replace(spec, **parts) if parts else spec


def _typed(section: Any) -> Any:
    """A section without what is filled in; itself where nothing is."""
    kind: Any = type(section)
    found: dict[str, Any] = {key: None for key in _marked(kind, "made") if getattr(section, key)}
    parts = tuple(map(_typed, getattr(section, "parts", ())))
    if any(typed is not part for typed, part in zip(parts, getattr(section, "parts", ()), strict=True)):
        found["parts"] = parts
    return dataclasses.replace(section, **found) if found else section


def placed_by_content(spec: Any) -> str | None:
    """The field with the place of a section's files, where their digest stands for it; else None."""
    of_files = str(getattr(spec, "content", None) or "").startswith(OF_FILES)
    return str(spec.PLACE) if of_files else None


def from_mapping(kind: type[Spec], mapping: Mapping[str, Any], *, prefix: str = "") -> Spec:
    """Builds a spec dataclass from plain data, with every field's type checked and unknown keys refused.

    `prefix` (such as "optim.") goes before the field names in messages. A mapping of texts or of whole numbers may be
    given as a list of "key:value" as well, since Hydra's grammar has no quoted keys, or as null where it is empty.

    Raises:
        SpecError: one line naming the field, what was given and what would have been right.
    """
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = mapping.get(item.name)
        if int in (item.type, *get_args(item.type)) and isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise SpecError(field=f"{prefix}{item.name}", wanted="a number that fits in 64 bits", got=value)
        # dacite would take a text letter by letter, a mapping by its keys, and fails at the rest
        if get_origin(item.type) is tuple and item.name in mapping and not isinstance(value, list | tuple):
            name, shown = f"{prefix}{item.name}", _as_typed(value)
            line = f"{name} must be a list, got {shown}: write '{name}=[{'' if value is None else shown}]'"
            raise SpecError(line, field=name, wanted="a list", got=value)
        if get_origin(item.type) is dict and not isinstance(value, Mapping) and item.name in mapping:
            mapping = {**mapping, item.name: _pairs(value, f"{prefix}{item.name}", get_args(item.type)[1])}
    config = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _to_float, int: _to_int})
    try:
        return dacite.from_dict(kind, dict(mapping), config)
    except dacite.UnexpectedDataError as error:
        known = [f"{prefix}{name}" for name in typed_fields(kind)]
        names = ", ".join(f"{prefix}{key}" for key in sorted(error.keys, key=str))
        raise SpecError(no_such_field(names, known), field=names) from None
    except dacite.MissingValueError as error:
        name = f"{prefix}{error.field_path}"
        raise SpecError(f"{name} is required: give {name}=...", field=name) from None
    except dacite.WrongTypeError as error:
        name, wanted, given = f"{prefix}{error.field_path}", error.field_type, error.value
        if get_origin(wanted) is dict and isinstance(given, Mapping):  # one of its values is at fault
            wanted = get_args(wanted)[1]
            name, given = next(
                (f"{name}.{key}", value)
                for key, value in given.items()
                if not isinstance(value, wanted) or isinstance(value, bool)
            )
        line = f"{name} must be {_in_words(wanted)}, got {_as_typed(given)}"
        raise SpecError(line, field=name, wanted=_in_words(wanted), got=given) from None
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        # dacite on a section that a record has of another kind: it casts before it looks
        raise SpecError(f"{prefix.rstrip('.') or 'a run'} cannot be read: {error}") from None


def run_spec(mapping: Mapping[str, Any]) -> RunSpec:
    """A `RunSpec` from plain data; `alpha` null becomes twice the rank."""
    filled = dict(mapping)
    if filled.get("alpha") is None and isinstance(filled.get("rank"), int):
        filled["alpha"] = 2 * filled["rank"]
    kinds = get_type_hints(RunSpec)
    for name, value in filled.items():
        if isinstance(value, dict) and is_dataclass(kinds.get(name)):
            with contextlib.suppress(SpecError, ValueError, SyntaxError, RecursionError):  # told of the whole below
                filled[name] = _section(kinds[name], repr(value))
    return from_mapping(RunSpec, filled)


@functools.lru_cache(maxsize=1024)
def _section(kind: type[Spec], text: str) -> Spec:
    """A section by its plain data as text: the runs of a study share most of theirs."""
    return from_mapping(kind, ast.literal_eval(text))


def _pairs(value: Any, name: str, kind: Any) -> Any:
    """The mapping that null or a list of "key:value" stands for; what is neither is left to the check of types.

    A regular expression may hold colons, so texts are parted at the first colon, behind a role, and whole numbers at
    the last.
    """
    if value is None:
        return {}
    if not isinstance(value, Sequence) or kind not in (str, int):
        return value
    if isinstance(value, str):
        form = f"write '{name}=[\"{value}\"]'" if ":" in value else f"write '{name}={{key: value}}'"
        raise SpecError(f"{name} must be a mapping, got {_as_typed(value)}: {form}")
    found: dict[str, Any] = {}
    for one in value:
        if isinstance(one, Mapping) and len(one) == 1:
            ((key, given),) = one.items()
        else:
            key, colon, given = (str(one).partition if kind is str else str(one).rpartition)(":")
            if not (colon and key.strip() and given.strip()):
                form = "role:regular expression" if kind is str else "role or regular expression:rank"
                raise SpecError(f"{name}: {_as_typed(one)} is not of the form '{form}'")
            key, given = key.strip(), given.strip()
        if key in found:
            raise SpecError(f"{name}: {key} is there twice")
        found[key] = int(given) if kind is int and isinstance(given, str) and re.fullmatch("[0-9]+", given) else given
    return found


LARGEST_NUMBER = 2**63 - 1  # of a whole number: more is no count of anything, and overflows where costs are worked out


@functools.cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(kind))


@functools.cache
def _marked(kind: Any, mark: str) -> frozenset[str]:
    return frozenset(item.name for item in dataclasses.fields(kind) if item.metadata.get(mark))


@functools.cache
def _defaults(kind: Any) -> dict[str, Any]:
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in dataclasses.fields(kind)
        if item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
    }


@functools.cache
def _identities(kind: Any) -> dict[str, str]:
    return {item.name: item.metadata.get("identity", item.name) for item in dataclasses.fields(kind)}


def _distinct(spec: Any) -> dict[str, Any]:
    """`to_mapping` without the fields that have their default, each under the name of what it means."""
    kind: Any = type(spec)
    defaults, identities = _defaults(kind), _identities(kind)
    elsewhere = placed_by_content(spec)
    plain = {}
    for name in _field_names(kind):
        value = getattr(spec, name)
        if name == elsewhere:
            continue
        if name not in defaults or value != defaults[name]:
            plain[identities[name]] = _to_plain(value, _distinct)
            if name in _marked(kind, "ordered") and list(value) != sorted(value):  # JSON with sorted keys would lose it
                plain[f"{name}_order"] = list(value)
    return plain


def _to_plain(value: Any, of_spec: Callable[[Any], dict[str, Any]] = to_mapping) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if is_dataclass(value):
        return of_spec(value)
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item, of_spec) for key, item in value.items()}
    return [_to_plain(item, of_spec) for item in value]


def _to_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _to_int(value: Any) -> Any:
    # bool is an int in Python: rank=true must not become rank 1
    return value if not isinstance(value, bool) else str(value).lower()


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _in_words(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(choice) for choice in get_args(kind))
    if get_origin(kind) is dict:
        return "a mapping"
    return "a list of whole numbers" if get_args(kind)[:1] == (int,) else "a list"


def _as_typed(value: Any) -> str:
    """A value the way it is written on the command line."""
    if value == "":
        return "nothing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{','.join(map(_as_typed, value))}]"
    return str(value)
