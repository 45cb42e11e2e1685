"""One pack from its first run to its last: slots are filled, stepped, scored, checkpointed and emptied."""

import functools
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sweeper.errors import gist
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.slot_store import Saved
from sweeper.methods.sharing import apart
from sweeper.training import checkpoint, conflict, experts
from sweeper.training.calibrate import Solo
from sweeper.training.consolidate import consolidate
from sweeper.training.evaluate import Scoring, evaluate, find_routes, queue_evaluation, queue_routed, queue_through
from sweeper.training.events import Event, Remark, RunFinished, RunStarted, Stage, Step
from sweeper.training.failure import MEMORY, Failure
from sweeper.training.loaded import Loaded
from sweeper.training.pack import Pack
from sweeper.training.results import write_run
from sweeper.training.routing import ROUTER
from sweeper.training.run_queue import RunQueue
from sweeper.training.run_state import EvaluatedSplit, RunState, StepResult

T = TypeVar("T")
Group = Sequence[tuple[int, RunState]]  # slots and their runs, of one dataset and evaluation

VALIDATION = "validation"
# steps that a CUDA device is given before it has done the first, so that it need not wait for the host: as many as
# last while a step is recorded
IN_FLIGHT, MOST_IN_FLIGHT = 4, 32
FLIGHT_SECONDS = 0.4
ASK_SECONDS = 0.5  # between questions for work for a slot that is empty while others train
WAIT_SECONDS = 0.2  # between looks whether to stop, while a pack waits to hear what follows


class PackTrainer:
    """A pack and the runs in its slots. `train` is the whole of it; `running` are the runs that are in it.

    What one run alone is the reason of ends as its failure, and the others go on. What the whole pack raises, what may
    be for want of memory, and the loss of the device go to the caller.

    On a GPU the host is steps ahead of the device, and records are written and trials judged meanwhile (`Writer`). Who
    follows a run may depend on how it ended, so slots are filled only when that is known (`judged`), and the device is
    given the steps that need no decision before (`_step_ahead`).
    """

    def __init__(self, loaded: Loaded, pack: Pack, queue: RunQueue, solo: Mapping[str, Solo]) -> None:
        self.loaded, self.context = loaded, loaded.context
        self.pack, self.queue, self.solo = pack, queue, solo
        self.running: dict[str, RunState] = {}
        self.clock = Clock(pack)
        self.left = False  # whether runs have left their slots since `judged` was last asked for
        self.judged: threading.Event | None = None  # set when all that listen know which runs have ended
        self.arrival_seconds = 0.0  # that the host took to put the latest runs in their slots, each
        self.saved = self.asked = time.monotonic()

    def train(self, until: Mapping[str, int] | None = None) -> None:
        """Trains until all slots are empty and nothing follows, or until a stop is asked for.

        Args:
            until: for a trial, run id -> the steps that it is to have done; when all have, what trains is kept.
        """
        self.fill()
        while self.pack.active or self.judged is not None:
            if self.judged is not None and (self.judged.is_set() or not self.pack.active):
                self.refill()
                continue
            if self.context.should_stop():
                self.catch_up()
                self.checkpoint()
                return
            self.compare_gradients()
            self.step()
            self.evaluate_due()
            self.consolidate()
            self.halt()
            self.retire_finished()
            if until is not None and self.judged is None and self._reached(until):
                self.settle()
                return
            self._ask_or_save()

    def fill(self) -> None:
        """Puts runs into the slots that are free."""
        arrived: list[RunState] = []
        began = time.perf_counter()
        refused = False
        with self.context.timeline.span("refill"):
            self.queue.want(len(self.pack.states) - len(self.pack.active))
            for state in list(self.queue.waiting):
                slot = self.pack.free_slot(state.adapter)
                if slot is None:
                    continue
                failure = self._add(state, slot)
                self.queue.waiting.remove(state)
                if failure is None:
                    self.running[state.run_id] = state
                    arrived.append(state)
                else:
                    refused = True
                    self.context.fail(state.run, failure, state)
        if arrived:
            self.arrival_seconds = (time.perf_counter() - began) / len(arrived)
        pack = [state.run_id for _, state in self.pack.active]
        for state in arrived:
            environment = self.context.environment(self.pack) | ({"pack": pack} if len(pack) > 1 else {})
            if (said := state.made_with(environment)) is not None:
                self.context.emit(Remark(message=said))
            self.context.emit(RunStarted(run_id=state.run_id, steps=state.steps))
        failed: list[tuple[RunState, Failure]] = []
        for state in arrived:
            try:
                self._score_base(state)
                self._score_begun(state)
            except Exception as error:
                failed.append((state, self._own(error)))
        self._fail(failed)
        # a pack that broke while it was scored broke after the step
        self.evaluate_due(but=lambda state: state not in arrived or state.has_scores(state.phase))
        self.consolidate()
        if refused or failed:
            self.judged = self.context.writer.mark()

    def refill(self) -> None:
        """Fills slots when it is known what became of the runs that left them."""
        assert self.judged is not None
        while not (self.judged.wait(WAIT_SECONDS) or self.context.should_stop()):
            self.context.writer.check()
        self.judged = None
        if not self.context.should_stop():
            self._step_ahead()
            self.fill()
        if not self.pack.pending:
            self.clock.restart()

    def step(self) -> None:
        """One step of every run that is neither finished nor halted; notes the results that have arrived."""
        with self.context.timeline.span("train") as span:
            self.pack.step()
            span.name = "compile" if self.pack.warming else "train"
            moving = any(not (state.finished or state.halted) for _, state in self.pack.active)
            arrived = self.clock.collect(but=self.clock.in_flight if moving else 0)
        for event in arrived:
            self.context.emit(event)

    def compare_gradients(self) -> None:
        """Compares the gradients of the tasks of the runs that are due for it, before they move on."""
        found = [(slot, state) for slot, state in self.pack.active if not state.halted and conflict.due(state)]
        if not found:
            return
        self.catch_up()
        with self.context.timeline.span("compare gradients"):
            for slot, state in found:
                conflict.look(self.pack, slot, state)
        self.clock.restart()

    def evaluate_due(self, but: Callable[[RunState], bool] = lambda state: False) -> None:
        """Scores the runs that are due for it, except some."""
        active = [(slot, state) for slot, state in self.pack.active if not state.halted]
        due = [(slot, state) for slot, state in active if _due(state) and not but(state)]
        if not due:
            return
        groups = _by_dataset(due)
        with self.context.timeline.span("evaluate"):
            begun = [self._begin_midway(group) for group in groups]
        self.catch_up()  # only now: a GPU has more to do
        failed: list[tuple[RunState, Failure]] = []
        for group, scores in zip(groups, begun, strict=True):
            with self.context.timeline.span("evaluate"):
                found, bad = self._score(group, self._queue_midway, scores)
            failed += bad
            for slot, state, result in found:
                self._note(state, VALIDATION, state.phase, result)
                if state.adapter.keep_best and state.adapter.saveable(state.done) and state.judge(result.score):
                    self.pack.store.keep_best(slot)
        self._fail(failed)
        self.left = self.left or bool(failed)
        gone = [state for state, _ in failed]
        self._score_stages([(slot, state) for slot, state in due if state.stage_over and state not in gone])
        self.clock.restart()

    def consolidate(self) -> None:
        """Has runs with elastic weights hold what the task depends on that has just ended, before they go on."""
        ended = [
            (slot, state)
            for slot, state in self.pack.active
            if state.to_consolidate and not (state.halted or state.diverged)
        ]
        if ended:
            self.catch_up()
            with self.context.timeline.span("consolidate"):
                consolidate(self.pack, ended)
            self.clock.restart()

    def halt(self) -> None:
        """Steps no further what its search has pruned, what diverged, and what ran out of patience."""
        for run_id in self.queue.source.to_prune():
            if run_id in self.running and not self.running[run_id].finished:
                self.running[run_id].pruned = True
        for state in self.running.values():
            state.halted = state.diverged or state.pruned or state.stopped

    def retire_finished(self) -> None:
        """Takes runs that go no further, and of which every step is known, out of their slots, scored and written."""
        ended = [
            (slot, state)
            for slot, state in self.pack.active
            if (state.finished or state.halted) and state.noted >= state.done
        ]
        if ended:
            self._retire(ended)
        if self.left:
            self.left = False
            self.judged = self.context.writer.mark()

    def settle(self) -> None:
        """Keeps every run as it is after the steps there were."""
        for result in list(self.pack.drain()):
            self.context.emit(result.state.note_step(result, 0.0))
        self.checkpoint()

    def checkpoint(self) -> None:
        """Saves what trains to the run folders; a run that cannot be saved trains on."""
        for slot, state in self.pack.active:
            state.keep(self.pack.snapshot(slot))
            assert state.weights is not None
            try:
                checkpoint.save(state.run.folder, state.weights, state.kept)
            except Exception as error:
                message = f"{state.run_id}: its checkpoint cannot be written: {gist(error)}"
                self.context.emit(Remark(message=message))

    def catch_up(self) -> None:
        """Waits for every step there was."""
        with self.context.timeline.span("train"):
            arrived = self.clock.collect()
        for event in arrived:
            self.context.emit(event)

    def _ask_or_save(self) -> None:
        """Asks for work for empty slots, or saves what trains, where either was not done for some time."""
        now = time.monotonic()
        has_room = self.queue.more and len(self.pack.active) < len(self.pack.states)
        if self.judged is None and has_room and now - self.asked > ASK_SECONDS:
            self.fill()
            self.asked = now
        elif now - self.saved > self.context.settings.checkpoint_seconds:
            self.catch_up()
            self.checkpoint()
            self.saved = now
            self.clock.restart()

    def _add(self, state: RunState, slot: int) -> Failure | None:
        """Puts a run into a slot; or says why that cannot be done with it."""
        try:
            self.pack.add(state, slot)
            state.enter()
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

    def _fail(self, failed: Sequence[tuple[RunState, Failure]]) -> None:
        """Runs that failed leave their slots."""
        if not failed:
            return
        self.catch_up()
        for state, failure in failed:
            self.pack.remove(next(slot for slot, one in self.pack.active if one is state))
            del self.running[state.run_id]
            self.context.fail(state.run, failure, state)

    def _score_base(self, state: RunState) -> None:
        """A fresh adapter is the identity, so all runs on a dataset share the base model's scores."""
        spec = state.spec
        if not spec.evaluation.before:
            return
        key = repr((spec.dataset, spec.evaluation))
        if key not in self.loaded.scores:
            self.catch_up()
            scores = {}
            for split in spec.evaluation.splits:
                message = f"evaluating the base model on {spec.dataset.name} {split}"
                self.context.emit(Stage(message=message))
                scores[split] = evaluate(self.pack, [-1], state, split)[0]
            self.loaded.scores[key] = scores  # of all splits, or of none where memory ran out
            self.clock.restart()
        for split, found in self.loaded.scores[key].items():
            self._note(state, split, "before", found)

    def _score_begun(self, state: RunState) -> None:
        """Notes what another run's adapter scores that a run begins with."""
        if not (state.origin and state.spec.evaluation.before) or state.done or state.begun:
            return
        self.catch_up()
        slot = next(slot for slot, one in self.pack.active if one is state)
        for split in state.spec.evaluation.splits:
            (found,) = queue_evaluation(self.pack, [slot], state, split, generation=False)()
            state.begun |= {name: one.score.nll for name, one in found.by_name(split).items()}
        self.clock.restart()

    def _reached(self, until: Mapping[str, int]) -> bool:
        return all(state.done >= until.get(state.run_id, 0) for _, state in self.pack.active)

    def _step_ahead(self) -> None:
        """Gives a GPU the steps that it will do while slots are filled, as far as they lead to nothing else."""
        empty = len(self.pack.states) - len(self.pack.active)
        if not (self.clock.in_flight and self.pack.active and empty):
            return
        wanted = _steps_of(1.5 * self.arrival_seconds * empty, self.clock.step_seconds) - len(self.pack.pending)
        with self.context.timeline.span("train"):
            for _ in range(wanted):
                if self.pack.warming or any(_leads_on(state) for _, state in self.pack.active):
                    return
                self.pack.step()

    def _queue_midway(self, group: Group) -> Scoring:
        slots = [slot for slot, _ in group]
        return queue_evaluation(self.pack, slots, group[0][1], VALIDATION, generation=False)

    def _begin_midway(self, group: Group) -> Scoring | None:
        """What gives the scores of a group; None where it cannot even be asked for."""
        try:
            return self._queue_midway(group)
        except Exception as error:
            self._own(error)
            return None

    def _score(
        self, group: Group, score: Callable[[Group], Scoring], begun: Scoring | None = None
    ) -> tuple[list[tuple[int, RunState, EvaluatedSplit]], list[tuple[RunState, Failure]]]:
        """Scores a group at once; where that raises, its halves, until whoever raises is alone and has failed.

        Args:
            begun: what gives the scores of the whole group, where that was asked for already.
        """
        try:
            found = (begun or score(group))()
        except Exception as error:
            failure = self._own(error)
        else:
            return [(slot, state, one) for (slot, state), one in zip(group, found, strict=True)], []
        if len(group) == 1:
            return [], [(group[0][1], failure)]
        halves = [self._score(half, score) for half in halved(group)]
        return [one for found, _ in halves for one in found], [one for _, failed in halves for one in failed]

    def _retire(self, leaving: Group) -> None:
        self.left = True
        whole = [(slot, state) for slot, state in leaving if not (state.diverged or state.pruned)]
        if whole:
            self.catch_up()
        began, size = time.perf_counter(), len(self.running)
        for slot, state in whole:
            if state.best is not None:
                self.pack.store.take_best(slot)
        self._score_splits(whole, "after")
        for score_otherwise in (self._score_through, self._score_routed):
            score_otherwise([entry for entry in whole if entry[1].run_id in self.running and _is_shared(entry[1])])
        self._watch_experts([entry for entry in whole if entry[1].run_id in self.running and entry[1].experts])
        share = (time.perf_counter() - began) / max(len(whole), 1)
        if whole:
            self.clock.restart()
        for slot, state in leaving:
            if state.run_id not in self.running:
                continue  # it failed
            state.eval_seconds += share if (slot, state) in whole else 0.0
            state.pack_runs = max(state.pack_runs, size)
            weights = self.pack.store.saved(slot, values=not state.pruned)
            self.context.writer.write(functools.partial(self._write, state, weights))
            self.pack.remove(slot)
            del self.running[state.run_id]
        self.context.trim()

    def _note(self, state: RunState, split: str, phase: str, found: EvaluatedSplit) -> None:
        for event in state.note_scores(split, phase, found):
            self.context.emit(event)

    def _score_stages(self, ended: Group) -> None:
        """Scores runs whose present task of a sequence is over on all there is besides validation."""
        if ended:
            self._score_splits(ended, but=VALIDATION)
            self.clock.restart()

    def _score_splits(self, whole: Group, phase: str = "", but: str = "") -> None:
        """Scores runs, a dataset and a split after another; without a `phase` they are on their way."""
        for group in _by_dataset(whole):
            for split in (one for one in group[0][1].spec.evaluation.splits if one != but):
                with self.context.timeline.span("evaluate"):
                    found, failed = self._score(group, functools.partial(self._queue_final, split))
                self._fail(failed)
                bad = [state for state, _ in failed]
                group = [entry for entry in group if entry[1] not in bad]
                for _, state, result in found:
                    self._note(state, split, phase or state.phase, result)
                if not group:
                    break

    def _score_through(self, whole: Group) -> None:
        """Scores the test examples of each task through the blocks of every other one, where tasks have their own."""
        for group in _by_dataset(whole):
            with self.context.timeline.span("evaluate"):
                found, failed = self._score(group, functools.partial(queue_through, self.pack))
            self._fail(failed)
            for _, state, one in found:
                state.through = {
                    task: {path: own.score.nll for path, own in other.parts.items()}
                    for task, other in one.parts.items()
                }

    def _score_routed(self, whole: Group) -> None:
        """Scores the test examples of runs whose tasks have blocks of their own as if their task were not known."""
        for group in _by_dataset(whole):
            with self.context.timeline.span("evaluate"):
                found, failed = self._score(group, self._queue_routed)
            self._fail(failed)
            for _, state, one in found:
                state.routing = _routing(self._routes(state), one)

    def _watch_experts(self, whole: Group) -> None:
        """Measures which experts the test examples of each task go through."""
        failed: list[tuple[RunState, Failure]] = []
        for slot, state in whole:
            if "test" in state.spec.evaluation.splits:
                with self.context.timeline.span("evaluate"):
                    try:
                        state.usage = experts.usage(self.pack, slot, state)
                    except Exception as error:
                        failed.append((state, self._own(error)))
        self._fail(failed)

    def _queue_routed(self, group: Group) -> Scoring:
        return queue_routed(self.pack, self._routes(group[0][1]), group)

    def _routes(self, state: RunState) -> dict[str, list[int]]:
        key = repr(state.spec.dataset)
        if key not in self.loaded.routes:
            self.loaded.routes[key] = find_routes(self.pack, state)
        return self.loaded.routes[key]

    def _queue_final(self, split: str, group: Group) -> Scoring:
        return lambda: evaluate(self.pack, [slot for slot, _ in group], group[0][1], split)

    def _write(self, state: RunState, weights: Saved) -> Event | None:
        context, pack = self.context, self.pack
        solo = self.solo.get(state.shape)
        try:
            record = write_run(state, weights(), solo, pack, context.settings, context.environment(pack))
        except Exception as error:
            if context.lost(error):  # what it has learnt is gone; whoever trains meets the same
                return None
            return context.failed(state.run, Failure.of(error), steps=state.done, started=state.started)
        return RunFinished(record=record)


class Clock:
    """Fetches step results and shares out the time that passed among the steps it went to."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
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
        return [result.state.note_step(result, seconds / len(results)) for result in results]


def _steps_of(seconds: float, step_seconds: float) -> int:
    """How many steps to give to a device ahead so that they last for some seconds."""
    return min(MOST_IN_FLIGHT, max(IN_FLIGHT, math.ceil(seconds / step_seconds)))


def _due(state: RunState) -> bool:
    """Whether a run is evaluated now; one that may end early also at its last step, which may be its best."""
    if state.finished:
        return state.spec.trainer.patience is not None
    return _midway(state, state.done)


def _midway(state: RunState, done: int) -> bool:
    """Whether a run is evaluated after some steps: every so many, and when a task of a sequence is over."""
    every = state.spec.evaluation.every_steps
    return done > 0 and ((every > 0 and done % every == 0) or done in state.stage_ends)


def _is_shared(state: RunState) -> bool:
    """Whether a run's tasks have blocks of their own, and it stands for its arm on test."""
    blocks = state.adapter.blocks if isinstance(state.adapter, AdapterSpec) else ()
    stands = "test" in state.spec.evaluation.splits and not state.run.search.get("confirmed")
    return apart(blocks) and stands


def _leads_on(state: RunState) -> bool:
    """Whether more than a step is to be done when a run has made its next one."""
    after = state.done + 1
    compared = conflict.due(state) or after in conflict.steps(state)
    return state.halted or after >= state.steps or _midway(state, after) or compared


def halved(items: Sequence[T]) -> list[Sequence[T]]:
    """Both halves of what there is, or the one thing."""
    middle = len(items) // 2
    return [part for part in (items[:middle], items[middle:]) if part]


def _routing(routes: Mapping[str, Sequence[int]], found: EvaluatedSplit) -> dict[str, Any]:
    """What a record says of routing: which tasks examples are taken for, and the scores that follow."""
    names = list(routes)
    confusion = {task: dict(Counter(names[i] for i in own)) for task, own in routes.items()}
    right = sum(own.get(task, 0) for task, own in confusion.items())
    return {
        "router": ROUTER, "accuracy": right / sum(map(len, routes.values())), "confusion": confusion,
        "scores": {task: {"nll": one.score.nll, **one.score.metrics} for task, one in found.parts.items()},
    }  # fmt: skip


def _by_dataset(entries: Group) -> list[list[tuple[int, RunState]]]:
    def key(entry: tuple[int, RunState]) -> str:
        return repr((entry[1].spec.dataset, entry[1].spec.evaluation))

    return [list(group) for _, group in itertools.groupby(sorted(entries, key=key), key=key)]
