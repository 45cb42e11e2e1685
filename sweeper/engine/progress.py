"""One run on its way: what has been measured so far, and the folder it leaves in the end."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from sweeper import budget
from sweeper.architecture import Target
from sweeper.engine import checkpoint
from sweeper.engine.calibrate import Solo
from sweeper.engine.evaluate import EvaluatedSplit
from sweeper.engine.events import Step
from sweeper.engine.export import write_adapter
from sweeper.engine.pack import Job, Pack, StepResult
from sweeper.engine.probe import Probe
from sweeper.engine.requests import RunRequest
from sweeper.record import METRICS, PREDICTIONS, Efficiency, Module, Record, Score, write_lines, write_record
from sweeper.spec import Settings, to_mapping
from sweeper.tasks import EncodedSplit


@dataclass(kw_only=True)
class Prepared:
    """A run that can be put in a slot: its job, the ranks of its modules and its tokenised data."""

    request: RunRequest
    job: Job
    ranks: Mapping[Target, int]
    splits: Mapping[str, EncodedSplit]
    before: dict[str, Any] = field(default_factory=dict)
    probe: Probe | None = None

    @property
    def shape(self) -> str:
        """Runs of equal shape cost the same alone."""
        spec = self.request.spec
        return repr((sorted(self.job.adapter.ranks.items()), self.job.adapter.dropout > 0, spec.trainer, spec.dataset))

    def resume(self) -> None:
        """Takes up the checkpoint of a run that was cut off, if its folder holds one."""
        found = checkpoint.load(self.request.folder)
        if found is not None and _ranks(found[0]) == self.job.adapter.ranks and self.job.done == 0:
            self.job.state, self.before = found
            self.job.done, self.job.tokens = self.before["done"], self.before["tokens"]

    def keep(self, state: dict[str, tuple[Tensor, ...]], progress: "Progress") -> None:
        """Remembers a good state, to go on from if the pack breaks."""
        self.job.state, self.before = state, progress.saved()

    def rewind(self) -> None:
        """Back to the last good state, or to the start where there is none."""
        self.job.done, self.job.tokens = self.before.get("done", 0), self.before.get("tokens", 0)


class Progress:
    """What is known of one run while it holds a slot."""

    def __init__(self, request: RunRequest, prepared: Prepared | None = None) -> None:
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
        self.diverged = self.pruned = False

    @property
    def prepared(self) -> Prepared:
        assert self._prepared is not None
        return self._prepared

    def note_step(self, result: StepResult, seconds: float, *, warming: bool) -> Step:
        """Adds one step. `seconds` is its share of the pack's time; that of a warming step is one-off work."""
        if warming:
            self.compile_seconds += seconds
        else:
            self.train_seconds += seconds
        if not math.isfinite(result.loss):
            self.diverged = True
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

    @property
    def _done(self) -> int:
        return 0 if self._prepared is None else self._prepared.job.done

    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the slot's state."""
        job = self.prepared.job
        return {
            "done": job.done, "tokens": job.tokens, "started": self.started, "train_seconds": self.train_seconds,
            "compile_seconds": self.compile_seconds,
            "metrics": [row for row in self.metrics if row.get("moment") not in ("before", "after")],
        }  # fmt: skip

    def write(
        self, settings: Settings, weights: Mapping[str, tuple[Tensor, Tensor]], solo: Solo | None, pack: Pack,
        environment: Mapping[str, Any],
    ) -> Record:  # fmt: skip
        """Writes adapter, metrics and predictions, and last the record that refers to them."""
        run, folder, spec = self.prepared, self.request.folder, self.request.spec
        folder.mkdir(parents=True, exist_ok=True)
        adapter_bytes = write_adapter(folder, spec, list(run.ranks), weights)
        write_lines(folder / METRICS, self.metrics)
        write_lines(folder / PREDICTIONS, self.predictions)
        record = Record(
            run_id=self.request.run_id,
            study=settings.study,
            status="diverged" if self.diverged else "pruned" if self.pruned else "completed",
            spec=to_mapping(spec),
            modules=tuple(
                Module(
                    name=target.name, role=target.role, layer=target.layer, rank=rank,
                    parameters=budget.lora_parameters({target: rank}),
                    score=None if run.probe is None else run.probe.scores[target.name],
                )
                for target, rank in run.ranks.items()
            ),
            trainable_parameters=budget.lora_parameters(run.ranks),
            total_parameters=sum(p.numel() for p in pack.base.model.parameters()),
            steps=run.job.done,
            scores=self.scores,
            data={
                name: {
                    "examples": len(split.examples), "truncated": split.truncated, "dropped": len(split.dropped),
                    "tokens": sum(len(e.input_ids) for e in split.examples), "majority": dict(split.majority),
                }
                for name, split in run.splits.items()
            },
            efficiency=self._efficiency(adapter_bytes, solo, pack),
            environment=environment,
            search=self.request.search,
            started=self.started,
            finished=_now(),
        )  # fmt: skip
        write_record(folder, record)
        checkpoint.remove(folder)
        return record

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
            tokens_per_second_solo=None if solo is None else tokens / max(run.job.done, 1) / solo.step_seconds,
            train_tokens=tokens,
            train_flops=budget.train_flops(pack.base.targets, run.ranks, length=mean_length, tokens=tokens),
            adapter_bytes=adapter_bytes,
            pack_runs=self.pack_runs,
            pack_seconds=time.monotonic() - self.began,
            compile_seconds=self.compile_seconds,
            probe_seconds=None if run.probe is None else run.probe.seconds,
            probe_flops=None if run.probe is None else run.probe.flops,
        )

    def write_failure(self, settings: Settings, error: BaseException, environment: Mapping[str, Any]) -> Record:
        """Records that the run failed, with the class and the first line of the message."""
        text = str(error).strip() or type(error).__name__
        record = Record(
            run_id=self.request.run_id,
            study=settings.study,
            status="failed",
            spec=to_mapping(self.request.spec),
            steps=self._done,
            environment=environment,
            search=self.request.search,
            error={"class": type(error).__name__, "message": text.splitlines()[0][:500]},
            started=self.started,
            finished=_now(),
        )
        self.request.folder.mkdir(parents=True, exist_ok=True)
        write_record(self.request.folder, record)
        return record


def _ranks(state: Mapping[str, tuple[Tensor, ...]]) -> dict[str, int]:
    return {name: parts[0].shape[0] for name, parts in state.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
