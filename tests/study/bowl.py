"""An engine that trains nothing: a bowl over the learning rate, for tests of what is asked, pruned and finished."""

import math
from collections.abc import Callable
from typing import Any

from sweeper import record
from sweeper.record import Record, Score
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings
from sweeper.training.events import Evaluated, RunFinished, RunStarted
from sweeper.training.source import Source


def loss(spec: RunSpec, share: float = 1.0) -> float:
    """A bowl over the learning rate whose lowest point depends on the placement; seeds shift it a little."""
    best = {"attn": -2.0, "ff": -3.0, "full": -2.5}[spec.placement.name]
    return 1 + (math.log10(spec.optim.lr) - best) ** 2 + 0.01 * spec.seed + (1 - share)


class BowlEngine:
    """Trains nothing: `slots` runs at a time advance together, a step each, and score `loss`.

    `stop_after` runs, it dies as a killed process does: without a word.
    """

    def __init__(self, make_record: Callable[..., Record], slots: int = 4) -> None:
        self.make_record, self.slots = make_record, slots
        self.trained: list[RunSpec] = []
        self.pruned: list[RunSpec] = []
        self.most = 0
        self.stop_after: float = math.inf
        self.fail: Callable[[RunSpec], bool] = lambda spec: False
        self.diverge: Callable[[RunSpec], bool] = lambda spec: False

    def __call__(self, source: Source, settings: Settings, *, should_stop: Callable[[], bool]) -> None:
        running: dict[str, tuple[Run, int]] = {}
        while True:
            kinds = [kind.key for kind in source.pending()]
            for request in source.pull(self.slots - len(running), kinds).runs:
                running[request.run_id] = (request, 0)
                source.report(RunStarted(run_id=request.run_id, steps=request.spec.trainer.max_steps))
            self.most = max(self.most, len(running))
            if not running:
                return
            for run_id, (request, step) in list(running.items()):
                spec, step = request.spec, step + 1
                running[run_id] = (request, step)
                if spec.evaluation.every_steps and step < spec.trainer.max_steps:
                    score = Score(nll=loss(spec, step / spec.trainer.max_steps), tokens=1, examples=1)
                    source.report(Evaluated(run_id=run_id, split="validation", phase=str(step), score=score))
                if run_id in source.to_prune():
                    self.pruned.append(spec)
                    source.report(self.end(running.pop(run_id)[0], status="pruned", scores={}, steps=step))
                elif step == spec.trainer.max_steps:
                    if len(self.trained) >= self.stop_after:
                        raise SystemExit("killed")
                    self.trained.append(spec)
                    source.report(self.end(running.pop(run_id)[0], **self.fate(spec)))

    def fate(self, spec: RunSpec) -> dict[str, Any]:
        if self.fail(spec):
            return {"status": "failed", "scores": {}, "error": {"class": "OutOfMemoryError", "message": "no room"}}
        score = {"after": Score(nll=loss(spec), tokens=1, examples=1, metrics={"exact_match": 1 / loss(spec)})}
        return {"status": "diverged" if self.diverge(spec) else "completed", "scores": {"validation": score}}

    def end(self, request: Run, **changes: Any) -> RunFinished:
        done = self.make_record(request.spec, search=request.search, **changes)
        record.write_record(request.folder, done)
        return RunFinished(record=done)
