"""Hands runs to whoever has room for them, and learns from what becomes of them.

The scheduler is the engine's source of runs: arms of a plain grid are a list, tuned arms are asked of their search as
slots fall free. It is told every event, prunes, retries, and passes events on to display and trackers, which only
listen.
"""

import functools
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sweeper import lost, predecessor, record
from sweeper.arms import Arm, labels, merged
from sweeper.errors import SweeperError, gist
from sweeper.lost import ContextLost
from sweeper.record import Record
from sweeper.reporting.text import point
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings, to_mapping
from sweeper.study import chain
from sweeper.study import plan as planning
from sweeper.study.claims import Claims
from sweeper.study.search_settings import SearchSettings
from sweeper.training.events import Evaluated, Event, Remark, RunFinished, RunQueued, TrialEnded
from sweeper.training.source import PendingGroup, Pulled, Source

if TYPE_CHECKING:
    from sweeper.study.search import ArmSearch, Trial

T = TypeVar("T")
Observer = Callable[[Event], None]

# failures that the same run would meet again
LASTING = (
    "OutOfMemoryError", "MemoryError", "SpecError", "DataError", "ModelError", "WorkerDied", "ContextLost",
    "IndexError", "KeyError", "TypeError", "ValueError", "AttributeError", "AssertionError", "ZeroDivisionError",
    "NotImplementedError", "TemplateError", "UndefinedError",
)  # fmt: skip
SHARE_OF_PRUNED = 0.3  # of all steps are trained where a pruner ends trials (docs/performance.md)
MOST_WORKERS_LOST = 3  # by one run, until it is taken to be the reason


class TrainRuns(Protocol):
    """The trainer, as the scheduler sees it."""

    def __call__(self, source: Source, settings: Settings, *, should_stop: Callable[[], bool]) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Records of the runs that ended now, by run id (`lean`), and whether a stop was asked for."""

    records: dict[str, Record]
    interrupted: bool = False


@dataclass(kw_only=True)
class _ArmState:
    arm: Arm
    place: int
    search: "ArmSearch | None" = None
    ready: deque[Run] = field(default_factory=deque)
    trials: dict[str, "Trial"] = field(default_factory=dict)
    tokens: int = 0
    confirmed: bool = False
    told: set[str] = field(default_factory=set)
    finishing: set[str] = field(default_factory=set)


def _locked(method: Callable[..., T]) -> Callable[..., T]:
    """The engine may ask from one thread while another tells what it did."""

    @functools.wraps(method)
    def call(self: "Scheduler", *args: Any, **kwargs: Any) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


class Scheduler:
    """Everything a command has to train.

    Args:
        todo: runs of arms that are not tuned, in order.
        arms: all arms. search: how tuned ones are searched.
        planned: runs whose records the plan has looked at.
    """

    def __init__(
        self, arms: Sequence[Arm], todo: Collection[str], settings: Settings, search: SearchSettings | None = None,
        observers: Sequence[Observer] = (), planned: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.settings, self.how = settings, search or SearchSettings()
        self.observers = list(observers)
        self.lock = threading.RLock()
        self.began = time.monotonic()
        self.running: dict[str, Run] = {}
        self.claims, self.others = Claims(self.settings.folder), set[str]()
        self.records: dict[str, Record] = {}
        self.tries: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.recovered = 0
        self.unreadable = set(planned)
        self.prune: set[str] = set()
        self.known: dict[str, Record] = {}
        self.states = {arm.key: _ArmState(arm=arm, place=place) for place, arm in enumerate(merged(arms))}
        self.waiting = chain.Waiting()
        left = set(todo)
        for state in self.states.values():
            if not state.arm.space:
                for spec in state.arm.defaults:
                    former = chain.former_of(spec, self.settings.folder)
                    if spec.run_id in left and former in left:
                        self.waiting.add(former, self._run(state, spec))
                    elif spec.run_id in left:
                        state.ready.append(self._run(state, spec))
        self._open_searches([state for state in self.states.values() if state.arm.space])

    def _open_searches(self, states: Sequence[_ArmState]) -> None:
        if not states:
            return
        from sweeper.study.search import ArmSearch
        from sweeper.study.storage import open_storage

        storage = open_storage(self.how, self.settings.folder)
        for state in states:
            usable = functools.partial(planning.usable, state.arm, settings=self.settings)
            state.search = search = ArmSearch(state.arm, self.how, storage, self.find, usable)
            self.recovered += search.recover(retry_failed=self.settings.retry_failed)
            state.tokens = self._tokens_so_far(state)
            for number, params in search.unfinished():
                for seed in state.arm.seeds:
                    spec = state.arm.make(params, seed)
                    if self.find(spec.run_id) is None:
                        state.ready.append(self._run(state, spec, self._trial(number)))

    # -- the engine asks

    @_locked
    def pending(self) -> list[PendingGroup]:
        """What may still come, an arm each."""
        found = []
        self._release_by_others()
        for state in self.states.values():
            self._advance(state)
            most = len(state.ready)
            if state.search is not None and self._open(state):
                wanted = state.search.parallel * len(state.arm.seeds)
                most = max(most, wanted)
            left = len(state.ready) + self._unasked(state) * (1 if self.how.pruner == "none" else SHARE_OF_PRUNED)
            ready = bool(most) or self._waiting_for_itself(state)
            waiting = self.waiting.count(state.arm.key, self.others)
            if ready or waiting:
                widest = state.arm.widest
                others = () if widest is None else (widest,)
                found.append(
                    PendingGroup(
                        key=state.arm.key, spec=state.arm.default, most=max(most + waiting, 1), left=left + waiting,
                        others=others, ready=ready,
                    )
                )  # fmt: skip
        return found

    @_locked
    def pull(self, count: int, groups: Collection[str], *, spread: bool = False) -> Pulled:
        """At most `count` runs of some arms; arms that have had the fewest trials come first.

        Arms that are not tuned follow one another. With `spread`, their runs are taken from all over the grid, so that
        a part of it costs what any other part does.
        """
        states = [self.states[key] for key in groups if key in self.states]
        found = self._spread(states, count) if spread else []
        while len(found) < count:
            turn = sorted(states, key=lambda s: (0 if s.search is None else s.search.asked, s.place))
            run = next((one for state in turn if (one := self._next(state)) is not None), None)
            if run is None:
                break
            found.append(run)
            self._hand_out(run)
            state = self.states[run.arm]
            while state.search is None and len(found) < count and (following := self._take(state)) is not None:
                found.append(following)
                self._hand_out(following)
        waits = any(self.waiting.count(state.arm.key, self.others) for state in states)
        more = waits or any(s.ready or self._open(s) or self._waiting_for_itself(s) for s in states)
        return Pulled(runs=tuple(found), more=more)

    def _spread(self, states: Sequence[_ArmState], count: int) -> list[Run]:
        """Runs at equal distances among those that wait; none where all of them are asked for."""
        plain = sorted((s for s in states if s.search is None), key=lambda s: s.place)
        waiting = [run for state in plain for run in state.ready]
        if not 0 < count < len(waiting):
            return []
        found = []
        for run in [waiting[place * len(waiting) // count] for place in range(count)]:
            self.states[run.arm].ready.remove(run)
            if self._mine(run):
                found.append(run)
                self._hand_out(run)
        return found

    @_locked
    def outstanding(self) -> int:
        """Runs that are training or could be handed out now."""
        count = len(self.running)
        for state in self.states.values():
            count += len(state.ready)
            if state.search is not None and self._open(state):
                room = (state.search.parallel - len(state.search.running)) * len(state.arm.seeds)
                count += max(0, int(min(room, self._unasked(state))))
        return count

    def _unasked(self, state: _ArmState) -> float:
        """Runs of trials that are still to be asked for; inf where no number of trials was given."""
        if state.search is None or not self._open(state):
            return 0
        left = math.inf if state.search.wanted is None else state.search.wanted - state.search.asked
        return max(0, left) * len(state.arm.seeds)

    @_locked
    def to_prune(self) -> Collection[str]:
        """Runs of pruned trials that are still training."""
        return tuple(self.prune)

    # -- the engine tells

    @_locked
    def report(self, event: Event) -> None:
        """Takes note of an event and passes it on."""
        match event:
            case Evaluated(split="validation", phase=phase) if phase.isdigit():
                self._evaluated(event)
            case RunFinished(record=ended):
                if self._again(ended):
                    return
                self.running.pop(ended.run_id, None)
                self.records[ended.run_id] = self.known[ended.run_id] = lean(ended)
                self.prune.discard(ended.run_id)
                self.claims.give_back(ended.run_id)
                lost.note(ended.run_id, failed=ended.status == "failed")
                self.notify(event)
                self._ended(ended)
                self._release(ended)
                return
        self.notify(event)

    def notify(self, event: Event) -> None:
        """Tells the observers. One that raises is told nothing more: what is shown may not end what trains."""
        for observer in list(self.observers):
            try:
                observer(event)
            except Exception as error:
                self.observers.remove(observer)
                with suppress(Exception):
                    print(f"{type(observer).__name__} ends, the sweep goes on: {gist(error)}", file=sys.stderr)

    @_locked
    def give_back(self, run_ids: Collection[str]) -> None:
        """A worker goes without having trained these runs to their end, and not for their sake: they go to others."""
        for run_id in run_ids:
            if (run := self.running.pop(run_id, None)) is not None:
                self.states[run.arm].ready.appendleft(run)

    @_locked
    def lose(self, run_ids: Collection[str], reason: str) -> None:
        """A worker died with these runs: they go back, from their last checkpoint, unless it was not the first time."""
        for run_id in run_ids:
            run = self.running.pop(run_id, None)
            if run is None:
                continue
            self.lost[run_id] = self.lost.get(run_id, 0) + 1
            if self.lost[run_id] < MOST_WORKERS_LOST:
                self.states[run.arm].ready.appendleft(run)
            else:
                self.running[run_id] = run
                self.abandon(run_id, reason)

    @_locked
    def abandon(self, run_id: str, reason: str, kind: str = "WorkerDied") -> None:
        """Records a run as failed that left nothing itself; `kind` is the class of the error."""
        self.report(RunFinished(record=self._failure(self.running[run_id], kind, reason)))

    @_locked
    def close(self) -> None:
        """Leaves what was cut short to the next command."""
        self.claims.close()
        for state in self.states.values():
            for trial in {id(trial): trial for trial in state.trials.values()}.values():
                assert state.search is not None
                state.search.give_up(trial)

    # -- what came of it

    def find(self, run_id: str) -> Record | None:
        """The record of a run, if it ended."""
        if run_id not in self.known:
            folder = self.settings.folder / run_id
            status = record.status(folder)
            again = self.settings.retry_failed and run_id not in lost.former().failed
            if status is None:
                self._tell_unreadable(folder)
            if status is None or (status == "failed" and again):
                return None
            self.known[run_id] = lean(record.read_record(folder))
        return self.known[run_id]

    def _tell_unreadable(self, folder: Path) -> None:
        """Says of a trial's run, once, that its record is not what was written; of a plain grid the plan does."""
        if folder.name in self.unreadable or not (folder / record.RECORD).exists():
            return
        self.unreadable.add(folder.name)
        try:
            record.read_record(folder)
        except (OSError, ValueError) as error:
            message = f"{folder.name} trains again; its record is kept beside the new one: {error}"
            self.notify(Remark(message=message))

    def taken_up(self) -> tuple[int, int]:
        """Trials that have ended already, of all arms, and those that a former command left unfinished."""
        searches = [state.search for state in self.states.values() if state.search is not None]
        counts = [search.counts() for search in searches]
        return sum(one.get("completed", 0) + one.get("pruned", 0) for one in counts), self.recovered

    def chosen(self) -> dict[str, list[Run]]:
        """Arm -> the runs that stand for it: all, or where it is tuned those of its best trial or its confirmation."""
        return {key: self._chosen(state) for key, state in self.states.items()}

    def _chosen(self, state: _ArmState) -> list[Run]:
        if state.search is None:
            return [self._run(state, spec) for spec in state.arm.defaults]
        seeds = self.how.confirm_seeds or state.arm.seeds
        points = state.search.chosen()
        return [self._run(state, state.arm.make(params, seed)) for params in points for seed in seeds]

    def table(self) -> list[dict[str, Any]]:
        """A row for each tuned arm: trials, how they ended, the best one's value, point and edges."""
        rows = []
        for state in self.states.values():
            if state.search is not None:
                best, counts = state.search.best(), state.search.counts()
                rows.append({
                    "arm": self.label(state.arm), "trials": sum(counts.values()), "pruned": counts.get("pruned", 0),
                    "failed": counts.get("failed", 0), "best": None if best is None else best.value,
                    "params": {} if best is None else best.params, "edges": {} if best is None else best.edges,
                    "widened": state.search.widened, "finished": state.search.finished,
                    "beside": len(state.search.pruned_beside_best()),
                })  # fmt: skip
        return rows

    def elsewhere(self) -> int:
        """Trials, or runs of a grid, that other drivers are working on."""
        trials = sum(state.search.elsewhere for state in self.states.values() if state.search is not None)
        return trials + sum(map(self._left, self.others))

    def searches(self) -> dict[str, dict[str, Any]]:
        """What the search of every tuned arm did, by the arm's key, with the settings that were the same for all."""
        how = self.how
        settings = {
            "pruner": how.pruner, "wanted": how.trials, "may_widen": how.widen, "may_finish": how.finish,
            "confirm_seeds": list(how.confirm_seeds), "objectives": list(how.objectives),
        }  # fmt: skip
        return {
            key: {"arm": self.label(state.arm), **state.search.facts(), **settings}
            for key, state in self.states.items()
            if state.search is not None
        }

    # -- inside

    def _next(self, state: _ArmState) -> Run | None:
        while not state.ready and self._open(state):
            assert state.search is not None
            trial = state.search.next()
            if trial is None:
                break
            self._start(state, trial)
        if not state.ready:
            self._advance(state)
        return self._take(state)

    def _take(self, state: _ArmState) -> Run | None:
        """The next run of an arm that waits, and that no other command trains or has trained by now."""
        while state.ready:
            run = state.ready.popleft()
            if run.search.get("purpose") == "trial" or self._mine(run):  # a search signs its trials
                return run
        return None

    def _left(self, run_id: str) -> bool:
        """Whether a run is still to be trained to its end, as far as the disk says."""
        known = self.known.get(run_id)
        if known is not None and known.status == "pruned":
            del self.known[run_id]  # another command may have finished it
        found = self.find(run_id)
        return found is None or found.status == "pruned"

    def _mine(self, run: Run) -> bool:
        """Claims a run that is no trial of a search."""
        if not self.claims.take(run.run_id):
            self.others.add(run.run_id)
            return False
        if self.find(run.run_id) is None or (run.search.get("purpose") == "finish" and self._left(run.run_id)):
            return True
        self.claims.give_back(run.run_id)
        return False

    def _start(self, state: _ArmState, trial: "Trial") -> None:
        """Queues the replicates of a trial; those that have a record already count as they are."""
        assert state.search is not None
        try:
            specs = [state.arm.make(trial.params, seed) for seed in state.arm.seeds]
        except SweeperError as error:  # values that go with others, not with one another
            state.search.refuse(trial)
            self.notify(Remark(message=f"{self.label(state.arm)}: {point(trial.params)} cannot be tried: {error}"))
            return
        for seed, spec in zip(state.arm.seeds, specs, strict=True):
            trial.runs[spec.run_id] = seed
            found = self.find(spec.run_id)
            if found is not None:
                trial.records[spec.run_id] = found
            elif spec.run_id not in state.trials:
                state.ready.append(self._run(state, spec, self._trial(trial.number)))
            state.trials[spec.run_id] = trial
        self._tell_if_over(state, trial)

    def _trial(self, number: int) -> dict[str, Any]:
        """What a trial's record says of it; `confirmed` that another run stands for its arm, on a fresh seed."""
        return {"trial": number, "purpose": "trial", **({"confirmed": True} if self.how.confirm_seeds else {})}

    def _open(self, state: _ArmState) -> bool:
        """Whether another trial of an arm may start."""
        if state.search is None or not state.search.open:
            return False
        if self.how.max_seconds is not None and time.monotonic() - self.began > self.how.max_seconds:
            return False
        return self.how.max_tokens is None or state.tokens < self.how.max_tokens

    def _waiting_for_itself(self, state: _ArmState) -> bool:
        """Whether what is running of an arm may be followed by more of it."""
        if state.search is None or not any(run.arm == state.arm.key for run in self.running.values()):
            return False
        later = self.how.confirm_seeds or self.how.widen or (self.how.finish and self.how.pruner != "none")
        return self._open(state) or bool(later)

    def _advance(self, state: _ArmState) -> None:
        """Past the last trial: some beside the best were pruned, it lies at an end, or is to be confirmed."""
        search = state.search
        if search is None or state.ready or search.running or search.elsewhere or self._open(state):
            return
        if self._finishing(state) or self._finish(state):
            return
        best = search.best()
        if best is None:
            return
        label = self.label(state.arm)
        if best.edges and f"edge{search.widened}" not in state.told:
            state.told.add(f"edge{search.widened}")
            where = ", ".join(f"{key}={best.params[key]:.3g} ({end} end)" for key, end in best.edges.items())
            self.notify(Remark(message=f"{label}: the best trial lies at the edge of its range: {where}"))
            told = search.widen()
            if told is not None:
                self.notify(Remark(message=f"{label}: range widened to {told}"))
                return
        if self.how.confirm_seeds and not state.confirmed:
            state.confirmed = True
            for seed in self.how.confirm_seeds:
                spec = state.arm.make(best.params, seed)
                if self.find(spec.run_id) is None:
                    about = {"widened": search.widened, "edges": best.edges}
                    state.ready.append(self._run(state, spec, {"trial": best.number, "purpose": "confirm", **about}))

    def _finishing(self, state: _ArmState) -> bool:
        """Whether this command or another is at work on pruned trials of an arm."""
        here = any(run_id in self.running for run_id in state.finishing)
        return here or any(self._left(run_id) for run_id in state.finishing & self.others)

    def _finish(self, state: _ArmState) -> bool:
        """Queues pruned trials beside the best one to be trained to their end; whether there are any."""
        assert state.search is not None
        told = []
        for number, params in state.search.to_finish():
            waiting = len(state.ready)
            for seed in state.arm.seeds:
                spec = state.arm.make(params, seed)
                former = self.find(spec.run_id)
                if spec.run_id in state.finishing or (former is not None and former.status != "pruned"):
                    continue
                state.finishing.add(spec.run_id)
                about = {"trial": number, "purpose": "finish", "pruned_at": None if former is None else former.steps}
                state.ready.append(self._run(state, spec, about))
            if len(state.ready) > waiting:
                told.append(point(params))
        if told:
            what = "a pruned trial" if len(told) == 1 else "pruned trials"
            message = f"{self.label(state.arm)}: finishing {what} beside the best one: {'; '.join(told)}"
            self.notify(Remark(message=message))
        return bool(state.ready)

    def label(self, arm: Arm) -> str:
        """A short name of an arm, with what tells it from the others."""
        return self._labels[arm.key]

    @cached_property
    def _labels(self) -> dict[str, str]:
        return labels([state.arm for state in self.states.values()])

    def _run(self, state: _ArmState, spec: RunSpec, search: dict[str, Any] | None = None) -> Run:
        tuned = [dimension.key for dimension in state.arm.space]
        about = {} if search is None else {"arm": state.arm.key, "tuned": tuned, **search}
        return Run.of(spec, self.settings.folder, arm=state.arm.key, search=about)

    def _hand_out(self, run: Run) -> None:
        self.running[run.run_id] = run
        self.notify(RunQueued(run_id=run.run_id, spec=run.spec, arm=run.arm))

    def _evaluated(self, event: Evaluated) -> None:
        run = self.running.get(event.run_id)
        state = None if run is None else self.states[run.arm]
        trial = None if state is None else state.trials.get(event.run_id)
        if state is None or state.search is None or trial is None or event.run_id in self.prune:
            return
        value = event.score.value(self.how.objectives[0].removeprefix("validation."))
        if value is None or math.isnan(value):
            return
        if state.search.report(trial, trial.runs[event.run_id], int(event.phase), value):
            self.prune |= {run_id for run_id in trial.runs if run_id in self.running}
            # replicates that have not begun need not begin
            for waiting in [one for one in state.ready if one.run_id in trial.runs]:
                state.ready.remove(waiting)
                trial.runs.pop(waiting.run_id)
                state.trials.pop(waiting.run_id)

    def _again(self, ended: Record) -> bool:
        """Whether a failed run is tried once more in this command."""
        run = self.running.get(ended.run_id)
        error = (ended.error or {}).get("class", "")
        tried = self.tries.get(ended.run_id, 0)
        if ended.status != "failed" or run is None or error in LASTING or tried >= self.settings.retries:
            return False
        self.tries[ended.run_id] = tried + 1
        self.notify(Remark(message=f"{ended.run_id}: {error}: {(ended.error or {}).get('message', '')}; tried again"))
        del self.running[ended.run_id]
        self.states[run.arm].ready.append(run)
        return True

    def _ended(self, ended: Record) -> None:
        for state in self.states.values():
            trial = state.trials.get(ended.run_id)
            if trial is not None:
                trial.records[ended.run_id] = lean(ended)
                state.tokens += ended.efficiency.train_tokens
                self._tell_if_over(state, trial)

    def _release(self, former: Record) -> None:
        """Runs that waited for one that has ended can begin now, or have failed where it left nothing."""
        for run in self.waiting.take(former.run_id):
            if former.status == "completed":
                self.states[run.arm].ready.append(run)
            elif self._mine(run):
                self._hand_out(run)
                said = f"the run that it begins from, {former.run_id}, {predecessor.ended(former.status)}"
                self.abandon(run.run_id, said, kind="SpecError")

    def _release_by_others(self) -> None:
        """The same for runs that another command trained in the meantime."""
        for run_id in [one for one in self.waiting.after if one in self.others and not self._left(one)]:
            found = self.find(run_id)
            assert found is not None
            self._release(found)

    def _tell_if_over(self, state: _ArmState, trial: "Trial") -> None:
        if set(trial.records) < set(trial.runs):
            return
        assert state.search is not None
        for run_id in trial.runs:
            state.trials.pop(run_id, None)
        told = state.search.tell(trial)
        best = state.search.best()
        self.notify(
            TrialEnded(
                arm=state.arm.key, number=trial.number, state=told.state, params=trial.params, value=told.value,
                best=None if best is None else best.value, best_params={} if best is None else best.params,
                ended=state.search.asked - len(state.search.running), wanted=state.search.wanted,
            )
        )  # fmt: skip

    def _tokens_so_far(self, state: _ArmState) -> int:
        assert state.search is not None
        if self.how.max_tokens is None:
            return 0
        found = (self.find(run_id) for run_id in state.search.run_ids())
        return sum(one.efficiency.train_tokens for one in found if one is not None)

    def _failure(self, run: Run, kind: str, message: str) -> Record:
        failed = Record(
            run_id=run.run_id, study=self.settings.study, status="failed", spec=to_mapping(run.spec),
            error={"class": kind, "message": message}, search=run.search,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        run.folder.mkdir(parents=True, exist_ok=True)
        record.write_record(run.folder, failed)
        return failed


def lean(found: Record) -> Record:
    """A record without what only its reader on disk needs: of thousands of runs that is most of what would be held."""
    return replace(found, modules=(), data={}, environment={}, sharing={}, conflict={})


def run(scheduler: Scheduler, *, train: TrainRuns | None = None) -> Outcome:
    """Trains what a scheduler has, in this process. Ctrl-C once ends after the current step, twice at once.

    Raises:
        ContextLost: the process can use its GPU no more, and there is more to train.
    """
    engine = train or _engine()
    with stop_on_signal() as stop:
        try:
            engine(scheduler, scheduler.settings, should_stop=stop.is_set)
        except ContextLost:
            if not stop.is_set() and (scheduler.running or scheduler.pending()):
                raise
        finally:
            scheduler.close()
    return Outcome(records=scheduler.records, interrupted=stop.is_set())


def _engine() -> TrainRuns:
    from sweeper import training

    train: TrainRuns = training.train_runs
    return train


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event; the second one raises KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
