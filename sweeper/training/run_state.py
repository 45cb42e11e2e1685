"""A run while it trains: what a step of it needs, how far it is, what was measured on the way."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from torch import Tensor

from sweeper import objectives, predecessor
from sweeper.identity import short
from sweeper.lora.forms import AdapterSpec, Capacity
from sweeper.lora.optimizer import IDLE, LR, hyperparameters, learning_rate
from sweeper.lora.trainee import UnpackedSpec
from sweeper.models.architecture import Target
from sweeper.objectives.objective import Objective
from sweeper.record import Score, remove_leftovers
from sweeper.run import Run
from sweeper.spec import OptimSpec, RunSpec
from sweeper.tasks import PROGRAM, EncodedSplit
from sweeper.tasks.example import Tokens
from sweeper.tasks.mixture import unseen
from sweeper.training import checkpoint, suspects
from sweeper.training.batches import DataOrder
from sweeper.training.events import Evaluated, Step
from sweeper.training.mixing import Clock, MixedOrder, Mixture
from sweeper.training.probe import Probe
from sweeper.training.suspects import Suspect
from sweeper.training.weighing import STATE
from sweeper.untrusted import sandbox

# what a run may be resumed with another of, and what the analysis looks at (`analysis.checks`)
COMPARED = ("device_type", "device", "precision", "attention", "versions", "sandbox_python")
ENDS = ("before", "after")  # phases whose scores are of the run, not of its way


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProof:
    """How what a run leaves is loaded.

    Attributes:
        refused: why stock PEFT does not give the engine's logits; None where it does.
        as_parameters: whether it does so only where the adapter names the weights rather than their modules.
        unreached: modules whose adapter changes nothing, for the model does not call them as modules.
        effect, difference: the throw-away adapter's largest change of a log-probability, and the largest difference
            between PEFT and the engine, in nats.
    """

    refused: str | None = None
    as_parameters: bool = False
    unreached: tuple[str, ...] = ()
    effect: float = 0.0
    difference: float | None = 0.0


UNPROVED = ExportProof()


@dataclass(frozen=True, slots=True)
class EvaluatedSplit:
    """Score of one split and its rows for `predictions.jsonl`; of several tasks, of each."""

    score: Score
    rows: list[dict[str, Any]]
    parts: Mapping[str, "EvaluatedSplit"] = field(default_factory=dict)

    def by_name(self, split: str) -> "dict[str, EvaluatedSplit]":
        """Itself under the split's name, and each task as SPLIT/TASK."""
        return {split: self, **{f"{split}/{name}": part for name, part in self.parts.items()}}


@dataclass(kw_only=True, eq=False)
class RunState:
    """A run and all that is live of it while it trains.

    Attributes:
        adapter: what it trains. order: which of its `examples` a forward pass sees.
        rows: the token rows that each of them becomes; without it, those of the objective.
        mixture: its tasks, where it has several.
        ranks: its modules. splits: its tokenised data. texts: those of its examples, by split (`training.texts`).
        content: digests of its model's and its dataset's files.
        precision: what it computes in.
        done: optimiser steps. tokens: response tokens seen.
        halted: it keeps its slot and is stepped no more.
        weights: `Pack.snapshot` to go on from, or the values alone that it begins with; None begins afresh.
        origin: the run that those are of: its `run_id`, and the `digest` of its adapter.
        kept: what was measured when that was taken (`measured`); empty where nothing was.
        noted: steps whose results are known.
        best: lowest validation NLL (or of a metric its negative) and its step, where the run may end early. waited:
            evaluations since.
        consolidated: tasks of a sequence whose Fisher information is in its weights' elasticity.
        diverged: a loss was not finite. pruned: its search ended it. stopped: it ran out of patience.
    """

    run: Run
    adapter: AdapterSpec | UnpackedSpec
    examples: Sequence[Tokens]
    order: DataOrder | MixedOrder
    mixture: Mixture | None = None
    ranks: Mapping[Target, int] = field(default_factory=dict)
    splits: Mapping[str, EncodedSplit] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    probe: Probe | None = None
    exported: ExportProof = UNPROVED
    precision: str = ""
    content: Mapping[str, str | None] = field(default_factory=dict)
    suspect: Suspect | None = None
    done: int = 0
    tokens: int = 0
    halted: bool = False
    weights: dict[str, tuple[Tensor, ...]] | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    rows: Sequence[Sequence[Tokens]] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            self.rows = self.objective.rows_of(self.examples)
        self.enter()

    def enter(self) -> None:
        """Begins to measure, from what was kept: a run is about to be given a slot."""
        kept = self.kept
        self.metrics: list[dict[str, Any]] = list(kept.get("metrics", []))
        self.scores: dict[str, dict[str, Score]] = {}
        self.predictions: list[dict[str, Any]] = []
        self.before: dict[str, dict[str, float]] = {}  # split -> task -> NLL of the base
        self.through: dict[str, dict[str, float]] = {}  # task -> whose blocks -> test NLL
        self.routing: dict[str, Any] = {}  # scores where the task is not named
        self.usage: dict[str, Any] = {}  # of experts (`training.experts`)
        self.conflict: list[dict[str, Any]] = list(kept.get("conflict", []))  # a row a comparison of gradients
        self.train_seconds: float = kept.get("train_seconds", 0.0)
        self.compile_seconds: float = kept.get("compile_seconds", 0.0)
        self.eval_seconds = 0.0
        self.pack_runs = 1
        self.started: str = kept.get("started", now())
        self.began = time.monotonic()
        self.noted = self.done
        self.best: tuple[float, int] | None = tuple(kept["best"]) if kept.get("best") else None
        self.waited: int = kept.get("waited", 0)
        self.begun: dict[str, float] = dict(kept.get("begun", {}))  # split -> NLL of what it began with
        self.consolidated: int = kept.get("consolidated", 0)
        self.environment: Mapping[str, Any] = {}
        self.resumed: dict[str, Any] = dict(kept.get("resumed_from") or {})
        self.pruned = False
        self.diverged = any(not math.isfinite(row["loss"]) for row in self.metrics if "loss" in row)
        self.stopped = self._out_of_patience()
        self.halted = self.diverged or self.stopped

    def with_spec(self, **sections: Any) -> "RunState":
        """A copy whose spec has other sections."""
        spec = replace(self.spec, **sections)
        rows = self.rows if spec.objective == self.spec.objective else ()
        return replace(self, run=replace(self.run, spec=spec), rows=rows)

    @property
    def run_id(self) -> str:
        return self.run.run_id

    @property
    def spec(self) -> RunSpec:
        return self.run.spec

    @property
    def optim(self) -> OptimSpec:
        return self.run.spec.optim

    @cached_property
    def objective(self) -> Objective:
        return objectives.of(self.run.spec.objective)

    @property
    def rows_of_example(self) -> int:
        """Token rows that each example becomes."""
        return len(self.rows[0])

    @property
    def experts(self) -> int:
        """Blocks of its ranks that a learnt gate opens; 0 where there is none."""
        return self.adapter.experts if isinstance(self.adapter, AdapterSpec) else 0

    @property
    def steps(self) -> int:
        """Optimiser steps to do in all."""
        return self.run.spec.trainer.max_steps

    @cached_property
    def clocks(self) -> list[Clock]:
        """Those of its rank blocks; none where all its ranks train together."""
        blocks = self.adapter.blocks if isinstance(self.adapter, AdapterSpec) else ()
        if not blocks:
            return []
        assert self.mixture is not None
        return [self.mixture.clock(block.trains) for block in blocks]

    @cached_property
    def task_clocks(self) -> list[Clock]:
        """The steps that each of its tasks has rows in; none where it learns no weights of their losses."""
        return [] if self.mixture is None else [self.mixture.clock([task]) for task in range(self.mixture.learns)]

    def hyperparameters(self) -> list[list[float]]:
        """The optimiser's settings for the next step: of the run, or of each of its rank blocks."""
        if self.clocks:
            at = [clock.at(self.done) for clock in self.clocks]
            rows = zip(self.clocks, at, strict=True)
            return [IDLE if n is None else hyperparameters(self.optim, n, clock.steps) for clock, n in rows]
        row = hyperparameters(self.optim, self.done, self.steps)
        restarts = self.adapter.restarts if isinstance(self.adapter, AdapterSpec) else None
        if restarts is not None:
            step, factor = restarts.pace(self.done)
            row[LR] = factor * learning_rate(self.optim, step, self.steps)
        return [row]

    @property
    def stage_ends(self) -> frozenset[int]:
        """Steps after which a task of a sequence is over, but the last one's."""
        return frozenset() if self.mixture is None else self.mixture.stage_ends

    @property
    def stage_over(self) -> bool:
        """Whether a task of a sequence has just ended, and another follows."""
        return self.done in self.stage_ends

    @property
    def to_consolidate(self) -> bool:
        """Whether it is to hold what the task that has just ended depends on, and does not yet."""
        elastic = isinstance(self.adapter, AdapterSpec) and self.adapter.elasticity > 0
        return elastic and self.stage_over and self.consolidated < sum(end <= self.done for end in self.stage_ends)

    @property
    def seed(self) -> int:
        return self.run.spec.seed

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    @property
    def phase(self) -> str:
        """Of an evaluation on the way: the steps done, as text."""
        return str(self.done)

    @property
    def capacity(self) -> Capacity:
        """The least that a slot must have, for a run that packs."""
        assert isinstance(self.adapter, AdapterSpec)
        return self.adapter.capacity

    @property
    def shape(self) -> str:
        """Runs of equal shape cost the same alone."""
        trainer = replace(self.spec.trainer, init_from=None, content=None)
        return repr((self.adapter.shape(), trainer, self.spec.dataset, self.spec.objective))

    def resume(self) -> str | None:
        """Takes up the checkpoint of a run that was cut off, if there is one, and clears away what else it left.

        Returns why it was not taken up, where it is damaged or not of this run.
        """
        remove_leftovers(self.run.folder)
        self.suspect = suspects.read(self.run.folder)
        try:
            found = checkpoint.load(self.run.folder)
        except checkpoint.Damaged as error:
            return None if self.done > 0 else f"{self.run_id}: its checkpoint is damaged ({error}); it starts anew"
        if found is None or self.done > 0:
            return None
        weights, kept = found
        if (why := self._other(kept)) is not None:
            return f"{self.run_id}: its checkpoint {why}; it starts anew"
        if isinstance(self.adapter, UnpackedSpec):
            matches = self.adapter.resumes({name: parts for name, parts in weights.items() if name != STATE})
        else:
            learnt = {STATE} if self.task_clocks else set()
            matches = set(weights) == set(self.adapter.ranks) | learnt and self._same_ranks(weights)
        if matches:
            self.weights, self.kept = weights, kept
            self.done, self.tokens = kept["done"], kept["tokens"]
        return None

    def _other(self, kept: Mapping[str, Any]) -> str | None:
        """What a checkpoint was made with that this run is not; those of earlier versions do not say."""
        for name in ("model", "dataset", predecessor.CONTENT):
            former = (kept.get("content") or self.content).get(name)
            if former != self.content.get(name):
                return f"is of another {name} (then {short(former)}, now {short(self.content.get(name))})"
        former = kept.get("precision") or self.precision
        return None if former == self.precision else f"is in {former}, the study in {self.precision}"

    def _same_ranks(self, weights: Mapping[str, tuple[Tensor, ...]]) -> bool:
        """Whether a probe that was made again allocates as the one did that the checkpoint began with."""
        assert isinstance(self.adapter, AdapterSpec)
        ranks = self.adapter.ranks
        return self.probe is None or all(len(weights[name][0]) == rank for name, rank in ranks.items())

    def keep(self, weights: dict[str, tuple[Tensor, ...]]) -> None:
        """Remembers a good state, to go on from if the pack breaks."""
        self.weights, self.kept = weights, self.measured()

    def rewind(self) -> None:
        """Back to the last good state, or to the start where there is none."""
        self.done, self.tokens = self.kept.get("done", 0), self.kept.get("tokens", 0)
        self.halted = False

    def measured(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the weights."""
        return {
            "done": self.done, "tokens": self.tokens, "started": self.started, "train_seconds": self.train_seconds,
            "compile_seconds": self.compile_seconds, "best": self.best, "waited": self.waited,
            **({"consolidated": self.consolidated} if self.consolidated else {}),
            **({"begun": self.begun} if self.begun else {}),
            "content": dict(self.content), "precision": self.precision,
            "auto": self.spec.trainer.precision == "auto",
            "environment": self.environment, "resumed_from": self.resumed,
            **({"conflict": list(self.conflict)} if self.conflict else {}),
            "metrics": [row for row in self.metrics if row.get("moment") not in ENDS],
        }  # fmt: skip

    def made_with(self, environment: Mapping[str, Any]) -> str | None:
        """Notes what the run is made with from now on; returns a line where its first steps were made with else."""
        metrics = {name for part in (self.spec.dataset, *self.spec.dataset.parts) for name in part.metrics}
        programs = self.spec.evaluation.generate and PROGRAM & metrics
        self.environment = {
            **environment, "content": dict(self.content),
            **({"sandbox_python": sandbox.python()} if programs else {}),
        }  # fmt: skip
        former = self.kept.get("environment") or {}
        other = {
            name: former[name] for name in COMPARED if name in former and former[name] != self.environment.get(name)
        }
        self.resumed |= other
        if not other:
            return None
        return f"{self.run_id}: goes on with another {', '.join(other).replace('_', ' ')} than it began with"

    def note_step(self, result: "StepResult", seconds: float) -> Step:
        """Adds one step. `seconds` is its share of the pack's time, without what was compiled or captured for it."""
        self.compile_seconds += result.one_off
        self.train_seconds += seconds
        seconds += result.one_off
        if not (math.isfinite(result.loss) and math.isfinite(result.lr)):  # by such a rate it was not updated
            self.diverged = True
        self.noted = result.step
        self.metrics.append({
            "step": result.step, "loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm,
            "tokens": result.tokens, "total_tokens": result.total_tokens, "seconds": round(seconds, 6),
            "time": round(time.time(), 2),
            **({"log_variances": self._named(result.variances)} if result.variances else {}),
        })  # fmt: skip
        return Step(
            run_id=self.run_id, step=result.step, loss=result.loss, lr=result.lr, grad_norm=result.grad_norm,
            tokens=result.total_tokens, answer_tokens=result.tokens, seconds=seconds,
        )  # fmt: skip

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        assert self.mixture is not None
        return dict(zip(self.mixture.names, values, strict=True))

    @property
    def log_variances(self) -> dict[str, float]:
        """Those of its tasks after the last step that is known; empty where none are learnt."""
        found: dict[str, float] = next(
            (row["log_variances"] for row in reversed(self.metrics) if "log_variances" in row), {}
        )
        return found

    def note_scores(self, split: str, phase: str, found: EvaluatedSplit) -> list[Evaluated]:
        """Adds the scores of a split, and of each task's, before, after or on the way (`phase`)."""
        events = []
        for name, one in found.by_name(split).items():
            score = self._with_gains(found, split) if one is found and found.parts else one.score
            self.metrics.append({"step": self.done, "split": name, "moment": phase, "nll": score.nll, **score.metrics})
            if phase in ENDS:
                self.scores.setdefault(name, {})[phase] = score
                self.predictions += [{"split": name, "moment": phase, **row} for row in one.rows]
            events.append(Evaluated(run_id=self.run_id, split=name, phase=phase, score=score))
        if phase == "before":
            self.before[split] = {name: part.score.nll for name, part in found.parts.items()}
        return events

    def _with_gains(self, found: EvaluatedSplit, split: str) -> Score:
        """A score over tasks with how far their NLLs are below the base's, in nats a token, where that is known."""
        before = self.before.get(split)
        if not before:
            return found.score
        never = unseen(self.spec.dataset)
        gains = [before[name] - part.score.nll for name, part in found.parts.items() if name not in never]
        more = {"mean_gain": statistics.fmean(gains), "worst_gain": min(gains)}
        return replace(found.score, metrics={**found.score.metrics, **more})

    def has_scores(self, phase: str) -> bool:
        """Whether it was scored in a phase."""
        return any(row.get("moment") == phase for row in self.metrics)

    def judge(self, score: Score) -> bool:
        """Notes a validation score of a run that may end early; returns whether it is the best so far.

        It is what the objective is judged by, the NLL or a metric, of which the best is the highest.
        """
        name = self.objective.score
        found = score.nll if name == "nll" else -score.metrics.get(name, math.nan)
        better = math.isfinite(found) and (self.best is None or found < self.best[0])
        if better:
            self.best, self.waited = (found, self.done), 0
        else:
            self.waited += 1
            self.stopped = self._out_of_patience()
        return better

    def _out_of_patience(self) -> bool:
        patience = self.spec.trainer.patience
        return patience is not None and self.waited >= patience and not self.finished


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step of one run: `loss` is what the run minimises: of nll, nats a token.

    `one_off` are the seconds that the host spent on it to compile and capture, a run's share of them. `variances` are
    the log variances of its tasks after it, where their losses' weights are learnt. `tokens` are those of answers,
    which the loss is taken on; `total_tokens` those of prompts as well, padding not counted.
    """

    state: RunState
    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    total_tokens: int
    one_off: float = 0.0
    variances: tuple[float, ...] = ()


def now() -> str:
    """The time of day, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
