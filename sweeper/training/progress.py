"""One run on its way: what has been measured so far, and the folder it leaves in the end."""

import errno
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from sweeper import methods
from sweeper.identity import short
from sweeper.lora.forms import AdapterSpec, Capacity
from sweeper.lora.slot_store import Learnt
from sweeper.lora.trainee import UnpackedSpec
from sweeper.models import total_parameters
from sweeper.models.architecture import Target
from sweeper.record import (
    METRICS,
    PREDICTIONS,
    TRACEBACK,
    Efficiency,
    Module,
    Record,
    Score,
    remove_leftovers,
    write_atomically,
    write_lines,
    write_record,
)
from sweeper.run import Run
from sweeper.spec import Settings, to_mapping
from sweeper.tasks import PROGRAM, EncodedSplit, data_of
from sweeper.training import checkpoint, suspects
from sweeper.training.calibrate import Solo
from sweeper.training.evaluate import EvaluatedSplit
from sweeper.training.events import Step
from sweeper.training.export import write_adapter, write_readme
from sweeper.training.export_proof import UNPROVED, ExportProof
from sweeper.training.failure import Failure
from sweeper.training.pack import Job, Pack, StepResult
from sweeper.training.probe import Probe
from sweeper.training.suspects import Suspect
from sweeper.untrusted import sandbox

# what a run may be resumed with another of, and what the analysis looks at (`analysis.checks`)
COMPARED = ("device_type", "device", "precision", "attention", "versions", "sandbox_python")


@dataclass(kw_only=True)
class Prepared:
    """A run that can be put in a slot: its job, the ranks of its modules and its tokenised data."""

    request: Run
    job: Job
    ranks: Mapping[Target, int]
    splits: Mapping[str, EncodedSplit]
    before: dict[str, Any] = field(default_factory=dict)
    probe: Probe | None = None
    exported: ExportProof = UNPROVED
    precision: str = ""
    content: Mapping[str, str | None] = field(default_factory=dict)
    suspect: Suspect | None = None

    @property
    def capacity(self) -> Capacity:
        """The least that a slot must have, for a run that packs."""
        assert isinstance(self.job.adapter, AdapterSpec)
        return self.job.adapter.capacity

    @property
    def shape(self) -> str:
        """Runs of equal shape cost the same alone."""
        spec = self.request.spec
        return repr((self.job.adapter.shape(), spec.trainer, spec.dataset))

    def resume(self) -> str | None:
        """Takes up the checkpoint of a run that was cut off, if there is one, and clears away what else it left.

        Returns why it was not taken up, where it is not of this run.
        """
        remove_leftovers(self.request.folder)
        self.suspect = suspects.read(self.request.folder)
        found = checkpoint.load(self.request.folder)
        adapter = self.job.adapter
        if found is None or self.job.done > 0:
            return None
        if (why := self._other(found[1])) is not None:
            return f"{self.request.run_id}: its checkpoint {why}; it starts anew"
        if isinstance(adapter, UnpackedSpec):
            matches = adapter.resumes(found[0])
        else:
            matches = set(found[0]) == set(adapter.ranks) and self._same_ranks(found[0])
        if matches:
            self.job.state, self.before = found
            self.job.done, self.job.tokens = self.before["done"], self.before["tokens"]
        return None

    def _other(self, progress: Mapping[str, Any]) -> str | None:
        """What a checkpoint was made with that this run is not; those of earlier versions do not say."""
        for name in ("model", "dataset"):
            former = (progress.get("content") or self.content).get(name)
            if former != self.content.get(name):
                return f"is of another {name} (then {short(former)}, now {short(self.content.get(name))})"
        former = progress.get("precision") or self.precision
        return None if former == self.precision else f"is in {former}, the study in {self.precision}"

    def _same_ranks(self, state: Mapping[str, tuple[Tensor, ...]]) -> bool:
        """Whether a probe that was made again allocates as the one did that the checkpoint began with."""
        assert isinstance(self.job.adapter, AdapterSpec)
        ranks = self.job.adapter.ranks
        return self.probe is None or all(len(parts[0]) == ranks[name] for name, parts in state.items())

    def keep(self, state: dict[str, tuple[Tensor, ...]], progress: "Progress") -> None:
        """Remembers a good state, to go on from if the pack breaks."""
        self.job.state, self.before = state, progress.saved()

    def rewind(self) -> None:
        """Back to the last good state, or to the start where there is none."""
        self.job.done, self.job.tokens = self.before.get("done", 0), self.before.get("tokens", 0)
        self.job.halted = False


class Progress:
    """What is known of one run while it holds a slot."""

    def __init__(self, request: Run, prepared: Prepared | None = None) -> None:
        self.request = request
        self._prepared = prepared
        before = prepared.before if prepared else {}
        self.metrics: list[dict[str, Any]] = list(before.get("metrics", []))
        self.train_seconds: float = before.get("train_seconds", 0.0)
        self.compile_seconds: float = before.get("compile_seconds", 0.0)
        self.eval_seconds = 0.0
        self.pack_runs = 1
        self.scores: dict[str, dict[str, Score]] = {}
        self.predictions: list[dict[str, Any]] = []
        self.started: str = before.get("started", _now())
        self.began = time.monotonic()
        self.noted: int = 0 if prepared is None else prepared.job.done  # steps whose results are known
        self.best: tuple[float, int] | None = tuple(before["best"]) if before.get("best") else None
        self.waited: int = before.get("waited", 0)
        self.environment: Mapping[str, Any] = {}
        self.resumed: dict[str, Any] = dict(before.get("resumed_from") or {})
        self.pruned = False
        self.diverged = any(not math.isfinite(row["loss"]) for row in self.metrics if "loss" in row)
        self.stopped = self._out_of_patience()
        if prepared is not None:
            prepared.job.halted = self.diverged or self.stopped

    def made_with(self, environment: Mapping[str, Any]) -> str | None:
        """Notes what a run is made with from now on; returns a line where its first steps were made with else."""
        spec = self.request.spec
        programs = spec.evaluation.generate and PROGRAM & set(spec.dataset.metrics)
        self.environment = {
            **environment, "content": dict(self.prepared.content),
            **({"sandbox_python": sandbox.python()} if programs else {}),
        }  # fmt: skip
        former = self.prepared.before.get("environment") or {}
        other = {
            name: former[name] for name in COMPARED if name in former and former[name] != self.environment.get(name)
        }
        self.resumed |= other
        if not other:
            return None
        return f"{self.request.run_id}: goes on with another {', '.join(other).replace('_', ' ')} than it began with"

    @property
    def prepared(self) -> Prepared:
        assert self._prepared is not None
        return self._prepared

    def note_step(self, result: StepResult, seconds: float) -> Step:
        """Adds one step. `seconds` is its share of the pack's time, without what was compiled or captured for it."""
        self.compile_seconds += result.one_off
        self.train_seconds += seconds
        seconds += result.one_off
        if not math.isfinite(result.loss):
            self.diverged = True
        self.noted = result.step
        row = {
            "step": result.step, "loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm,
            "tokens": result.tokens, "seconds": round(seconds, 6), "time": round(time.time(), 2),
        }  # fmt: skip
        self.metrics.append(row)
        return Step(
            run_id=self.request.run_id, step=result.step, loss=result.loss, lr=result.lr, grad_norm=result.grad_norm,
            tokens=result.tokens, seconds=seconds,
        )  # fmt: skip

    def note_scores(self, split: str, moment: str, found: EvaluatedSplit) -> None:
        self.metrics.append(
            {"step": self._done, "split": split, "moment": moment, "nll": found.score.nll, **found.score.metrics}
        )
        if moment in ("before", "after"):
            self.scores.setdefault(split, {})[moment] = found.score
            self.predictions += [{"split": split, "moment": moment, **row} for row in found.rows]

    def judge(self, nll: float) -> bool:
        """Notes a validation NLL of a run that may end early; returns whether it is the lowest so far."""
        better = math.isfinite(nll) and (self.best is None or nll < self.best[0])
        if better:
            self.best, self.waited = (nll, self._done), 0
        else:
            self.waited += 1
            self.stopped = self._out_of_patience()
        return better

    def _out_of_patience(self) -> bool:
        patience = self.request.spec.trainer.patience
        return patience is not None and self.waited >= patience and not self.prepared.job.finished

    @property
    def _done(self) -> int:
        return 0 if self._prepared is None else self._prepared.job.done

    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the slot's state."""
        job = self.prepared.job
        return {
            "done": job.done, "tokens": job.tokens, "started": self.started, "train_seconds": self.train_seconds,
            "compile_seconds": self.compile_seconds, "best": self.best, "waited": self.waited,
            "content": dict(self.prepared.content), "precision": self.prepared.precision,
            "auto": self.request.spec.trainer.precision == "auto",
            "environment": self.environment, "resumed_from": self.resumed,
            "metrics": [row for row in self.metrics if row.get("moment") not in ("before", "after")],
        }  # fmt: skip

    def write(
        self, settings: Settings, weights: Mapping[str, tuple[Tensor, ...]] | Learnt, solo: Solo | None, pack: Pack,
        environment: Mapping[str, Any],
    ) -> Record:  # fmt: skip
        """Writes adapter, metrics and predictions, and last the record that refers to them."""
        run, folder, spec = self.prepared, self.request.folder, self.request.spec
        folder.mkdir(parents=True, exist_ok=True)
        adapter_bytes = self._export(weights)
        learnt = weights if isinstance(weights, Learnt) else None
        write_lines(folder / METRICS, self.metrics)
        write_lines(folder / PREDICTIONS, self.predictions)
        record = Record(
            run_id=self.request.run_id,
            study=settings.study,
            status="diverged" if self.diverged else "pruned" if self.pruned else "completed",
            spec=to_mapping(spec),
            modules=self._modules(learnt),
            trainable_parameters=methods.trainable(spec.method, run.ranks) if learnt is None else learnt.trainable,
            total_parameters=total_parameters(pack.base.model),
            steps=run.job.done,
            scores=self.scores,
            data={
                name: ({"order": "by step"} if name == "train" else {})
                | facts
                | {"majority": dict(run.splits[name].majority)}
                for name, facts in data_of(run.splits).items()
            },
            efficiency=self._efficiency(adapter_bytes, solo, pack),
            environment={**environment, **self.environment, **({"resumed_from": self.resumed} if self.resumed else {})},
            search=self.request.search,
            saved={
                "step": run.job.done if self.best is None else self.best[1], "stopped_early": self.stopped,
                "average": spec.trainer.ema_decay is not None, **self._not_carried(),
            },
            started=self.started,
            finished=_now(),
        )  # fmt: skip
        (folder / TRACEBACK).unlink(missing_ok=True)  # of a former try
        write_record(folder, record)
        checkpoint.remove(folder)
        suspects.clear(folder)
        return record

    def _modules(self, learnt: Learnt | None) -> tuple[Module, ...]:
        """What was trained by module; a run alone says itself what it put where, and which rank that has in the end."""
        method, ranks = self.request.spec.method, self.prepared.ranks
        modules = [
            Module(
                name=target.name, role=target.role, layer=target.layer,
                rank=rank if learnt is None else learnt.ranks.get(target.name, rank),
                parameters=methods.parameters(method, target, rank)
                if learnt is None else learnt.parameters[target.name],
                score=None if self.prepared.probe is None else self.prepared.probe.scores.get(target.name),
            )
            for target, rank in ranks.items()
        ]  # fmt: skip
        return tuple(module for module in modules if module.parameters or learnt is None)

    def _export(self, weights: Mapping[str, tuple[Tensor, ...]] | Learnt) -> int:
        """Writes what the run has learnt; returns its bytes. A pruned one leaves nothing: of such there are many."""
        if self.pruned:
            return 0
        run, spec, proved = self.request.folder, self.request.spec, self.prepared.exported
        if isinstance(weights, Learnt):
            size = weights.write(run)
        else:
            size = write_adapter(run, spec, list(self.prepared.ranks), weights, as_parameters=proved.as_parameters)
        write_readme(run, spec, proved.refused)
        return size

    def _not_carried(self) -> dict[str, str]:
        """What the record says of an adapter that stock PEFT does not give back."""
        refused = self.prepared.exported.refused
        return {} if refused is None else {"peft": refused}

    def _efficiency(self, adapter_bytes: int, solo: Solo | None, pack: Pack) -> Efficiency:
        run = self.prepared
        seen = [run.job.examples[i] for n in range(run.job.done * pack.accumulation) for i in run.job.order.batch(n)]
        tokens = sum(len(example.input_ids) for example in seen)
        mean_length = round(tokens / max(len(seen), 1))
        return Efficiency(
            train_seconds_amortised=self.train_seconds,
            eval_seconds_amortised=self.eval_seconds,
            train_seconds_solo=None if solo is None else solo.step_seconds * run.job.done,
            peak_memory_solo_bytes=None if solo is None else solo.peak_memory_bytes,
            memory_measured=None if solo is None else solo.memory_measured,
            tokens_per_second_solo=None if solo is None else tokens / max(run.job.done, 1) / solo.step_seconds,
            train_tokens=tokens,
            train_flops=methods.train_flops(
                run.request.spec.method, pack.base.targets, run.ranks, length=mean_length, tokens=tokens
            ),
            adapter_bytes=adapter_bytes,
            pack_runs=self.pack_runs,
            pack_seconds=time.monotonic() - self.began,
            compile_seconds=self.compile_seconds,
            probe_seconds=None if run.probe is None else run.probe.seconds,
            probe_flops=None if run.probe is None else run.probe.flops,
        )

    def write_failure(self, settings: Settings, failure: Failure, environment: Mapping[str, Any]) -> Record:
        """Records that the run failed: class and message, and the traceback in a file beside it.

        Where its folder cannot be written either, the record is only returned.

        Raises:
            OSError: the disk is full, which would be the end of every other run as well.
        """
        folder = self.request.folder
        error = {"class": failure.kind, "message": failure.message, "traceback": TRACEBACK}
        record = Record(
            run_id=self.request.run_id,
            study=settings.study,
            status="failed",
            spec=to_mapping(self.request.spec),
            steps=self._done,
            environment=environment,
            search=self.request.search,
            error=error,
            started=self.started,
            finished=_now(),
        )
        try:
            write_atomically(folder / TRACEBACK, failure.trace)
            write_record(folder, record)
            suspects.clear(folder)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        return record

    def has_scores(self, moment: str) -> bool:
        """Whether it was scored on the way, after so many steps."""
        return any(row.get("moment") == moment for row in self.metrics)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
