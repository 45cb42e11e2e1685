"""One pack from its first run to its last: slots are filled, stepped, scored, checkpointed and emptied."""

import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from sweeper.errors import gist
from sweeper.lora.slot_store import Saved
from sweeper.spec import RunSpec
from sweeper.training import checkpoint
from sweeper.training.calibrate import Solo
from sweeper.training.evaluate import EvaluatedSplit, evaluate, queue_evaluation
from sweeper.training.events import Evaluated, Event, RunFinished, RunStarted, Stage, Step
from sweeper.training.failure import MEMORY, Failure
from sweeper.training.loaded import Loaded
from sweeper.training.pack import Job, Pack, StepResult
from sweeper.training.progress import Prepared, Progress
from sweeper.training.run_queue import RunQueue

T = TypeVar("T")
Made = Event | Callable[[], Event | None]  # an event, or what the reader of events does (and perhaps makes one of)

Group = Sequence[tuple[int, Progress]]  # slots and their runs, of one dataset and evaluation
Scoring = Callable[[], list[EvaluatedSplit]]

VALIDATION = "validation"
# steps that a CUDA device is given before it has done the first, so that it need not wait for the host: as many as
# last while a step is recorded
IN_FLIGHT, MOST_IN_FLIGHT = 4, 32
FLIGHT_SECONDS = 0.4
ASK_SECONDS = 0.5  # between questions for work for a slot that is empty while others train
WAIT_SECONDS = 0.2  # between looks whether to stop, while a pack waits to hear what follows


class Drive:
    """A pack and the runs in its slots. `fill`, then `go`; `running` are those that are in it.

    What one run alone is the reason of ends as its failure, and the others go on. What the whole pack raises, what may
    be for want of memory, and the loss of the device go to the caller.
    """

    def __init__(self, loaded: Loaded, pack: Pack, queue: RunQueue, solo: Mapping[str, Solo]) -> None:
        self.loaded, self.context = loaded, loaded.context
        self.pack, self.queue, self.solo = pack, queue, solo
        self.running: dict[str, Progress] = {}
        self.clock = Clock(pack, self.running)
        self.left = False  # whether runs have left their slots of which the reader of events does not know yet
        self.told: threading.Event | None = None  # set when the reader of events knows which runs have ended
        self.arrival_seconds = 0.0  # that the host took to put the latest runs in their slots, each

    def fill(self) -> Iterator[Made]:
        """Puts runs into the slots that are free."""
        arrived, refused = [], []
        began = time.perf_counter()
        with self.context.timeline.span("refill"):
            self.queue.want(len(self.pack.jobs) - len(self.pack.active))
            for run in list(self.queue.waiting):
                slot = self.pack.free_slot(run.job.adapter)
                if slot is None:
                    continue
                failure = self._add(run, slot)
                self.queue.waiting.remove(run)
                progress = Progress(run.request, run)
                if failure is None:
                    self.running[run.request.run_id] = progress
                    arrived.append(progress)
                else:
                    refused.append((progress, failure))
        if arrived:
            self.arrival_seconds = (time.perf_counter() - began) / len(arrived)
        yield from self.queue.problems()
        for progress, failure in refused:
            yield self.context.failed(progress, failure)
        for progress in arrived:
            if (said := progress.made_with(self.context.environment(self.pack))) is not None:
                yield Stage(message=said)
            yield RunStarted(run_id=progress.request.run_id, steps=progress.prepared.job.steps)
        failed: list[tuple[Progress, Failure]] = []
        for progress in arrived:
            try:
                yield from self._score_base(progress)
            except Exception as error:
                failed.append((progress, self._own(error)))
        yield from self._fail(failed)
        # a pack that broke while it was scored broke after the step
        yield from self._evaluate_midway(but=lambda run: run not in arrived or run.has_scores(_moment(run)))
        if refused or failed:
            yield from self._tell()

    def _add(self, run: Prepared, slot: int) -> Failure | None:
        """Puts a run into a slot; or says why that cannot be done with it."""
        try:
            self.pack.add(run.job, slot)
        except Exception as error:
            failure = self._own(error)
            self.pack.store.release(slot)
            return failure
        return None

    def _own(self, error: Exception) -> Failure:
        """An error that one run is the reason of; raises others again."""
        if isinstance(error, MEMORY) or self.context.lost(error):
            raise error
        return Failure.of(error)

    def _fail(self, failed: Sequence[tuple[Progress, Failure]]) -> Iterator[Made]:
        """Runs that failed leave their slots."""
        if not failed:
            return
        yield from self._catch_up()
        for progress, failure in failed:
            run_id = progress.request.run_id
            self.pack.remove(next(slot for slot, job in self.pack.active if job.run_id == run_id))
            del self.running[run_id]
            yield self.context.failed(progress, failure)

    def _tell(self) -> Iterator[Made]:
        """Has it said when the reader of events knows which runs have ended."""
        self.told = threading.Event()
        yield self.told.set

    def _score_base(self, progress: Progress) -> Iterator[Made]:
        """A fresh adapter is the identity, so all runs on a dataset share the base model's scores."""
        spec = progress.request.spec
        if not spec.evaluation.before:
            return
        key = repr((spec.dataset, spec.evaluation))
        if key not in self.loaded.scores:
            yield from self._catch_up()
            scores = {}
            for split in spec.evaluation.splits:
                yield Stage(message=f"evaluating the base model on {spec.dataset.name} {split}")
                scores[split] = evaluate(self.pack, [-1], progress.prepared, split)[0]
            self.loaded.scores[key] = scores  # of all splits, or of none where memory ran out
            self.clock.restart()
        for split, found in self.loaded.scores[key].items():
            yield self._scored(progress, split, "before", found)

    def go(self, until: Mapping[str, int] | None = None) -> Iterator[Made]:
        """Steps until all slots are empty and nothing follows, or until a stop is asked for.

        Args:
            until: for a trial, run id -> the steps that it is to have done; when all have, what trains is kept.
        """
        saved = asked = time.monotonic()
        while self.pack.active or self.told is not None:
            if self.told is not None and (self.told.is_set() or not self.pack.active):
                yield from self._follow()
                continue
            if self.context.should_stop():
                yield from self._catch_up()
                yield from self.checkpoint()
                return
            yield from self._step()
            if until is not None and self.told is None and self._reached(until):
                yield from self.settle()
                return
            now = time.monotonic()
            if self.told is None and self._has_room() and now - asked > ASK_SECONDS:
                yield from self.fill()
                asked = now
            elif now - saved > self.context.settings.checkpoint_seconds:
                yield from self._catch_up()
                yield from self.checkpoint()
                saved = now
                self.clock.restart()

    def settle(self) -> Iterator[Made]:
        """Keeps every run as it is after the steps there were."""
        for result in list(self.pack.drain()):
            yield self.running[result.job.run_id].note_step(result, 0.0)
        yield from self.checkpoint()

    def _reached(self, until: Mapping[str, int]) -> bool:
        return all(job.done >= until.get(job.run_id, 0) for _, job in self.pack.active)

    def _step(self) -> Iterator[Made]:
        """One step of all, and what it leads to: scores, runs that are pruned, runs that end."""
        with self.context.timeline.span("train") as span:
            self.pack.step()
            span.name = "compile" if self.pack.warming else "train"
            moving = any(not (job.finished or job.halted) for _, job in self.pack.active)
            arrived = self.clock.collect(but=self.clock.in_flight if moving else 0)
        yield from arrived
        yield from self._evaluate_midway()
        for run_id in self.queue.source.to_prune():
            if run_id in self.running and not self.running[run_id].prepared.job.finished:
                self.running[run_id].pruned = True
        for progress in self.running.values():
            progress.prepared.job.halted = progress.diverged or progress.pruned or progress.stopped
        ended = self._ended()
        if ended:
            yield from self._finish(ended)
        if self.left:
            self.left = False
            yield from self._tell()

    def _follow(self) -> Iterator[Made]:
        """Fills slots when it is known what became of the runs that left them: their successors may depend on it."""
        assert self.told is not None
        while not (self.told.wait(WAIT_SECONDS) or self.context.should_stop()):
            pass
        self.told = None
        if not self.context.should_stop():
            self._run_ahead()
            yield from self.fill()
        if not self.pack.pending:
            self.clock.restart()

    def _run_ahead(self) -> None:
        """Gives a GPU the steps that it will do while slots are filled, as far as they lead to nothing else."""
        empty = len(self.pack.jobs) - len(self.pack.active)
        if not (self.clock.in_flight and self.pack.active and empty):
            return
        wanted = _steps_of(1.5 * self.arrival_seconds * empty, self.clock.step_seconds) - len(self.pack.pending)
        with self.context.timeline.span("train"):
            for _ in range(wanted):
                if self.pack.warming or any(self._leads_on(job) for _, job in self.pack.active):
                    return
                self.pack.step()

    def _leads_on(self, job: Job) -> bool:
        """Whether more than a step is to be done when a run has made its next one."""
        spec, after = self.running[job.run_id].request.spec, job.done + 1
        return job.halted or after >= job.steps or _midway(spec, after)

    def _catch_up(self) -> Iterator[Made]:
        """Waits for every step there was."""
        with self.context.timeline.span("train"):
            arrived = self.clock.collect()
        yield from arrived

    def _has_room(self) -> bool:
        return self.queue.more and len(self.pack.active) < len(self.pack.jobs)

    def _evaluate_midway(self, but: Callable[[Progress], bool] = lambda run: False) -> Iterator[Made]:
        """Scores the runs that are due for it, except some."""
        active = [(slot, self.running[job.run_id]) for slot, job in self.pack.active if not job.halted]
        due = [(slot, run) for slot, run in active if _due(run.request.spec, run.prepared.job) and not but(run)]
        if not due:
            return
        groups = _by_dataset(due)
        with self.context.timeline.span("evaluate"):
            begun = [self._begin_midway(group) for group in groups]
        yield from self._catch_up()  # only now: a GPU has more to do
        failed: list[tuple[Progress, Failure]] = []
        for group, scores in zip(groups, begun, strict=True):
            with self.context.timeline.span("evaluate"):
                found, bad = self._score(group, self._queue_midway, scores)
            failed += bad
            for slot, progress, result in found:
                yield self._scored(progress, VALIDATION, _moment(progress), result)
                job = progress.prepared.job
                if job.adapter.keep_best and job.adapter.saveable(job.done) and progress.judge(result.score.nll):
                    self.pack.store.keep_best(slot)
        yield from self._fail(failed)
        self.left = self.left or bool(failed)
        self.clock.restart()

    def _queue_midway(self, group: Group) -> Scoring:
        slots = [slot for slot, _ in group]
        return queue_evaluation(self.pack, slots, group[0][1].prepared, VALIDATION, generation=False)

    def _begin_midway(self, group: Group) -> Scoring | None:
        """What gives the scores of a group; None where it cannot even be asked for."""
        try:
            return self._queue_midway(group)
        except Exception as error:
            self._own(error)
            return None

    def _score(
        self, group: Group, score: Callable[[Group], Scoring], begun: Scoring | None = None
    ) -> tuple[list[tuple[int, Progress, EvaluatedSplit]], list[tuple[Progress, Failure]]]:
        """Scores a group at once; where that raises, its halves, until whoever raises is alone and has failed.

        Args:
            begun: what gives the scores of the whole group, where that was asked for already.
        """
        try:
            found = (begun or score(group))()
        except Exception as error:
            failure = self._own(error)
        else:
            return [(slot, progress, one) for (slot, progress), one in zip(group, found, strict=True)], []
        if len(group) == 1:
            return [], [(group[0][1], failure)]
        halves = [self._score(half, score) for half in halved(group)]
        return [one for found, _ in halves for one in found], [one for _, failed in halves for one in failed]

    def _finish(self, ended: Sequence[tuple[int, Job]]) -> Iterator[Made]:
        self.left = True
        leaving = [(slot, self.running[job.run_id]) for slot, job in ended]
        whole = [(slot, progress) for slot, progress in leaving if not (progress.diverged or progress.pruned)]
        if whole:
            yield from self._catch_up()
        began, size = time.perf_counter(), len(self.running)
        for slot, progress in whole:
            if progress.best is not None:
                self.pack.store.take_best(slot)
        scored = len(whole)
        for group in _by_dataset(whole):
            for split in group[0][1].request.spec.evaluation.splits:
                with self.context.timeline.span("evaluate"):
                    found, failed = self._score(group, functools.partial(self._queue_final, split))
                yield from self._fail(failed)
                bad = [progress for progress, _ in failed]
                group = [entry for entry in group if entry[1] not in bad]
                for _, progress, result in found:
                    yield self._scored(progress, split, "after", result)
                if not group:
                    break
        share = (time.perf_counter() - began) / max(scored, 1)
        if whole:
            self.clock.restart()
        for slot, progress in leaving:
            if progress.request.run_id not in self.running:
                continue  # it failed
            progress.eval_seconds += share if (slot, progress) in whole else 0.0
            progress.pack_runs = max(progress.pack_runs, size)
            weights = self.pack.store.saved(slot, values=not progress.pruned)
            yield functools.partial(self._write, progress, weights)
            self.pack.remove(slot)
            del self.running[progress.request.run_id]

    def _queue_final(self, split: str, group: Group) -> Scoring:
        return lambda: evaluate(self.pack, [slot for slot, _ in group], group[0][1].prepared, split)

    def _write(self, progress: Progress, weights: Saved) -> Event | None:
        context, pack = self.context, self.pack
        solo = self.solo.get(progress.prepared.shape)
        try:
            record = progress.write(context.settings, weights(), solo, pack, context.environment(pack))
        except Exception as error:
            if context.lost(error):  # what it has learnt is gone; whoever trains meets the same
                return None
            return context.failed(progress, Failure.of(error))
        return RunFinished(record=record)

    def _scored(self, progress: Progress, split: str, moment: str, found: EvaluatedSplit) -> Evaluated:
        progress.note_scores(split, moment, found)
        return Evaluated(run_id=progress.request.run_id, split=split, moment=moment, score=found.score)

    def checkpoint(self) -> Iterator[Made]:
        """Saves what trains to the run folders; a run that cannot be saved trains on."""
        for slot, job in self.pack.active:
            progress = self.running[job.run_id]
            state = self.pack.snapshot(slot)
            progress.prepared.keep(state, progress)
            try:
                checkpoint.save(progress.request.folder, state, progress.saved())
            except Exception as error:
                yield Stage(message=f"{job.run_id}: its checkpoint cannot be written: {gist(error)}")

    def _ended(self) -> list[tuple[int, Job]]:
        """Runs that go no further, and of which every step is known."""
        return [
            (slot, job)
            for slot, job in self.pack.active
            if (job.finished or job.halted) and self.running[job.run_id].noted >= job.done
        ]


class Clock:
    """Fetches step results and shares out the time that passed among the steps it went to."""

    def __init__(self, pack: Pack, running: dict[str, Progress]) -> None:
        self.pack, self.running = pack, running
        self.step_seconds = 1.0  # of the latest steps
        self.restart()

    def restart(self) -> None:
        self.mark = time.perf_counter()

    @property
    def in_flight(self) -> int:
        """Steps whose results need not be waited for."""
        return _steps_of(FLIGHT_SECONDS, self.step_seconds) if self.pack.device.type == "cuda" else 0

    def collect(self, but: int = 0) -> list[Step]:
        """What became of the steps since the last time, except the last `but`."""
        steps = len(self.pack.pending) - but
        results: list[StepResult] = list(self.pack.drain(but=but))
        if not results:
            return []
        one_off = sum(result.one_off for result in results)
        # while the host compiled or captured, steps before that were done: their time is not counted twice
        seconds = max(0.0, time.perf_counter() - self.mark - one_off)
        if not one_off:
            self.step_seconds = seconds / steps
        self.restart()
        return [self.running[result.job.run_id].note_step(result, seconds / len(results)) for result in results]


def _steps_of(seconds: float, step_seconds: float) -> int:
    """How many steps to give to a device ahead so that they last for some seconds."""
    return min(MOST_IN_FLIGHT, max(IN_FLIGHT, math.ceil(seconds / step_seconds)))


def _due(spec: RunSpec, job: Job) -> bool:
    """Whether a run is evaluated now; one that may end early also at its last step, which may be its best."""
    if job.finished:
        return spec.trainer.patience is not None
    return _midway(spec, job.done)


def _moment(progress: Progress) -> str:
    return str(progress.prepared.job.done)


def _midway(spec: RunSpec, done: int) -> bool:
    """Whether a run is evaluated after some steps."""
    return spec.evaluation.every_steps > 0 and done > 0 and done % spec.evaluation.every_steps == 0


def halved(items: Sequence[T]) -> list[Sequence[T]]:
    """Both halves of what there is, or the one thing."""
    middle = len(items) // 2
    return [part for part in (items[:middle], items[middle:]) if part]


def _by_dataset(entries: Sequence[tuple[int, Progress]]) -> list[list[tuple[int, Progress]]]:
    def key(entry: tuple[int, Progress]) -> str:
        return repr((entry[1].request.spec.dataset, entry[1].request.spec.evaluation))

    return [list(group) for _, group in itertools.groupby(sorted(entries, key=key), key=key)]
