"""The search inside one arm: an Optuna study that is asked for trials and told what became of them.

Only the scheduler uses this. A trial is one point of the arm's space; its runs are the replicates of it, and its value
is their mean. Studies lie in a journal file in the study folder, or behind a storage URL that several drivers share.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from sweeper.arms import Arm, Dimension, Params, Space, number_of_points, short_hash
from sweeper.record import COMPLETED, Record
from sweeper.study.samplers import NumberSeeded, distributions, make_pruner, pointless
from sweeper.study.search_settings import SearchSettings
from sweeper.study.storage import alive, being_signed, this_driver

SIGN_SECONDS = 60.0  # between signs of life of a trial
STALE_SECONDS = 1.0  # between looks at what other drivers did
MOST_POINTS = 10_000  # of a space whose points are still enumerated
REFUSED = "refused"  # outcome of a trial that would not be another one if it were tried again
MOST_REPEATS = 50  # suggestions in a row that were made before, until a space counts as used up

_DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}


@dataclass(kw_only=True)
class Trial:
    """One point of an arm's space while it is worked on. `values` maps step -> seed -> the pruner's objective."""

    arm: Arm
    number: int
    params: dict[str, Any]
    optuna_trial: optuna.Trial
    runs: dict[str, int]
    values: dict[int, dict[int, float]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    signed: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Told:
    """How a trial ended and its value (of the first objective).

    The states are "completed", "pruned", "diverged", "failed", and "taken over" where another driver gave this one up
    for dead (a machine that slept) and tries the point again: it finds the records of these runs.
    """

    state: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best trial of an arm: its point, value, and which dimensions it won at an end of."""

    number: int
    params: dict[str, Any]
    value: float
    edges: dict[str, str]


class ArmSearch:
    """The Optuna study of one arm.

    Args:
        find: run id -> its record, if it has one.
        usable: whether runs can train with a point, asked of one that lies outside the space.
    """

    def __init__(
        self, arm: Arm, settings: SearchSettings, storage: BaseStorage, find: Callable[[str], Record | None],
        usable: Callable[[Params], bool] = lambda params: True,
    ) -> None:  # fmt: skip
        self.arm, self.settings, self.storage, self.find, self.usable = arm, settings, storage, find, usable
        self.space: Space = arm.space
        self.sides: list[dict[str, str]] = []
        self.running: dict[int, Trial] = {}
        self.used_up = False
        self._seen: tuple[float, list[FrozenTrial]] | None = None
        self._open()
        known = optuna.get_all_study_names(storage) if settings.widen else []
        while self.widened < settings.widen and (wider := self._widened_before(known)) is not None:
            self._go_wider(wider)

    @property
    def widened(self) -> int:
        """How often the space was widened."""
        return len(self.sides)

    @property
    def name(self) -> str:
        """Name of the Optuna study."""
        return self._name(self.space)

    def _name(self, space: Space) -> str:
        """Made of what is searched, so that a changed space or objective starts another study."""
        arm = self.arm.default
        content = [repr(space), self.settings.objectives, self.settings.directions]
        label = f"{arm.model.name} {arm.dataset.name} {arm.method.name} {arm.placement.name} r{arm.rank}"
        return f"{label} {self.arm.key} {short_hash(content)}"

    def _open(self) -> None:
        settings, self._seen = self.settings, None
        self.study = optuna.create_study(
            storage=self.storage, study_name=self.name, load_if_exists=True,
            directions=[_DIRECTIONS[one] for one in settings.directions],
            sampler=NumberSeeded(settings, f"{self.arm.key}/{settings.seed}"), pruner=make_pruner(settings, self.arm),
        )  # fmt: skip
        if "space" not in self.study.user_attrs:
            self.study.set_user_attr("arm", self.arm.key)
            default = replace(self.arm, space=self.space).default_params
            if default is not None and not self.widened:
                self.study.enqueue_trial(default, skip_if_exists=True)
            # last: a driver that is killed before it leaves all of this to the next one
            self.study.set_user_attr("space", [str(dimension) for dimension in self.space])

    # -- what there is

    @property
    def asked(self) -> int:
        return len(self._trials())

    @property
    def elsewhere(self) -> int:
        """Trials that another driver is working on."""
        return sum(t.state == TrialState.RUNNING and t.number not in self.running for t in self._trials())

    def counts(self) -> dict[str, int]:
        """How trials ended or stand: completed, pruned, failed, running."""
        names = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        found: dict[str, int] = {}
        for trial in self._trials():
            name = names.get(trial.state, "running")
            found[name] = found.get(name, 0) + 1
        return found

    def best(self) -> Best | None:
        """Of trials trained to their end, the one with the best mean objective; None with several objectives."""
        if len(self.settings.objectives) > 1:
            return None
        sign = 1 if self.settings.directions[0] == "minimize" else -1
        found: tuple[float, FrozenTrial] | None = None
        for trial in self._trials():
            if not self._whole(trial):
                continue
            value = self._value(trial)
            if math.isfinite(value) and (found is None or sign * value < sign * found[0]):
                found = (value, trial)
        if found is None:
            return None
        value, trial = found
        edges: dict[str, str] = {d.key: end for d in self.space if (end := d.edge(trial.params[d.key])) is not None}
        return Best(number=trial.number, params=dict(trial.params), value=value, edges=edges)

    def chosen(self) -> list[dict[str, Any]]:
        """The point of the best trial; with several objectives, the points that no other is better than in all."""
        if len(self.settings.objectives) == 1:
            best = self.best()
            return [] if best is None else [best.params]
        counted = {trial.number for trial in self._trials()}
        front = [trial.params for trial in self.study.best_trials if trial.number in counted]
        return [{d.key: _plain(params[d.key]) for d in self.space} for params in front]

    @property
    def finished(self) -> int:
        """Pruned trials that were trained to their end after all."""
        return sum(trial.state == TrialState.PRUNED and self._whole(trial) for trial in self._trials())

    def pruned_beside_best(self) -> list[tuple[int, dict[str, Any]]]:
        """Pruned trials next to the best one, which may have beaten it at their end: number and point.

        Next to it are the trials on both sides of it along the only tuned number, or with D tuned fields the 2 D
        nearest.
        """
        best = self.best()
        if best is None:
            return []
        ended = [t for t in self._trials() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        others = [t for t in ended if t.number != best.number]
        others.sort(key=lambda t: sum(d.distance(t.params[d.key], best.params[d.key]) ** 2 for d in self.space))
        only = self.space[0]
        if len(self.space) == 1 and (only.kind != "choice" or only.ladder):
            at = best.params[only.key]
            below = [t for t in others if t.params[only.key] < at]
            beside = [*below[:1], *[t for t in others if t.params[only.key] > at][:1]]
        else:
            beside = others[: 2 * len(self.space)]
        return [(t.number, self._point(t)) for t in beside if not self._whole(t)]

    def to_finish(self) -> list[tuple[int, dict[str, Any]]]:
        """Trials of `pruned_beside_best` that the budget still allows to finish."""
        left = self.settings.finish - self.finished
        return self.pruned_beside_best()[:left] if left > 0 else []

    def facts(self) -> dict[str, Any]:
        """What the search of the arm did, as plain data for `searches.json`."""
        best, counts = self.best(), self.counts()
        return {
            "space": [str(dimension) for dimension in self.arm.space],
            "searched": [str(dimension) for dimension in self.space],
            "trials": sum(counts.values()), **{f"trials_{name}": count for name, count in counts.items()},
            "finished": self.finished, "pruned_beside_best": len(self.pruned_beside_best()),
            "widened": self.widened, "sides": self.sides, "edges": {} if best is None else best.edges,
            "best": None if best is None else best.params,
        }  # fmt: skip

    # -- work

    def next(self) -> Trial | None:
        """Asks for a trial, if the arm has one left and room for it; None otherwise."""
        if not self.open or len(self.running) >= self.parallel:
            return None
        for repeat in range(MOST_REPEATS):
            if repeat and not self._enqueue_unused(repeat):
                break
            asked = self.study.ask(distributions(self.space))
            self._seen = None
            try:
                self._sign(asked)
            except UpdateFinishedTrialError:
                continue
            params = {d.key: _plain(asked.params[d.key]) for d in self.space}
            if self.wanted is not None and self._place(asked.number) >= self.wanted:
                self._void(asked, "more than were wanted")  # another driver took the last one meanwhile
                return None
            if self._made_before(asked.number, asked.params):
                self._void(asked, "repeats another")
                continue
            trial = Trial(arm=self.arm, number=asked.number, params=params, optuna_trial=asked, runs={})
            self.running[asked.number] = trial
            return trial
        self.used_up = True
        return None

    def _enqueue_unused(self, repeat: int) -> bool:
        """Where suggestions repeat in a space of few points, chooses one that is left; False where none is."""
        points = number_of_points(self.space)
        if points > MOST_POINTS:
            return True
        values = [d.choices or range(int(d.low), int(d.high) + 1) for d in self.space]
        used = {tuple(t.params[d.key] for d in self.space) for t in self._trials()}
        left = [point for point in itertools.product(*values) if point not in used]
        if left:
            point = left[int(short_hash([self.name, len(used), repeat]), 16) % len(left)]
            self.study.enqueue_trial({d.key: value for d, value in zip(self.space, point, strict=True)})
        return bool(left)

    @property
    def parallel(self) -> int:
        """Most trials at once."""
        if self.settings.parallel is not None:
            return self.settings.parallel
        return max(1, -(-(self.settings.trials or 16) // 4))

    @property
    def wanted(self) -> int | None:
        """How many trials there shall be; None where only other budgets end the search."""
        trials, points = self.settings.trials, number_of_points(self.space)
        if trials is None:
            return None if math.isinf(points) else int(points)
        return int(min(trials + self.widened * max(1, trials // 2), points))

    @property
    def open(self) -> bool:
        """Whether another trial is wanted."""
        return not self.used_up and (self.wanted is None or self.asked < self.wanted)

    def report(self, trial: Trial, seed: int, step: int, value: float) -> bool:
        """Notes an intermediate value of one replicate; returns whether the trial is to be pruned."""
        values = trial.values.setdefault(step, {})
        values[seed] = value
        try:
            if time.monotonic() - trial.signed > SIGN_SECONDS:
                trial.signed = time.monotonic()
                self._sign(trial.optuna_trial)
            if self.settings.pruner == "none" or len(values) < len(trial.runs):
                return False
            trial.optuna_trial.report(_mean(values.values()), step)
        except UpdateFinishedTrialError:
            return False
        return bool(trial.optuna_trial.should_prune())

    def tell(self, trial: Trial) -> Told:
        """Ends a trial, all of whose runs have ended."""
        self.running.pop(trial.number, None)
        self._seen = None
        try:
            return self._tell(trial)
        except UpdateFinishedTrialError:
            return Told(state="taken over")

    def _tell(self, trial: Trial) -> Told:
        statuses = {record.status for record in trial.records.values()}
        trial.optuna_trial.set_user_attr("runs", list(trial.runs))
        if "failed" in statuses:
            return self._fail(trial)
        if "pruned" in statuses:
            self.study.tell(trial.optuna_trial, state=TrialState.PRUNED)
            return Told(state="pruned")
        values = self._values(list(trial.records.values()))
        if any(map(math.isnan, values)):  # a cost that was not measured
            return self._fail(trial)
        self.study.tell(trial.optuna_trial, values=values)
        state = "diverged" if "diverged" in statuses else "completed"
        return Told(state=state, value=values[0] if math.isfinite(values[0]) else None)

    def refuse(self, trial: Trial) -> None:
        """Ends a trial whose values no run can use together."""
        self.running.pop(trial.number, None)
        self._seen = None
        self._fail(trial, REFUSED)

    def _fail(self, trial: Trial, outcome: str = "failed") -> Told:
        trial.optuna_trial.set_user_attr("outcome", outcome)
        self.study.tell(trial.optuna_trial, state=TrialState.FAIL)
        return Told(state="failed")

    def run_ids(self) -> list[str]:
        """Ids of the runs of all trials that have ended."""
        return [run_id for trial in self._trials() for run_id in trial.user_attrs.get("runs", ())]

    def give_up(self, trial: Trial) -> None:
        """Leaves a trial to the next command, which takes it up again with the same point."""
        self._seen = None
        self.running.pop(trial.number, None)
        # in this order: a full disk, or a kill, between the two leaves the point to be taken up
        self.study.enqueue_trial(dict(trial.optuna_trial.params), user_attrs={"repeats": trial.number})
        self._void(trial.optuna_trial, "stopped")

    def widen(self) -> str | None:
        """Widens the range at whose end the best trial lies, if that is asked for; says what it did."""
        wider = None if self.widened >= self.settings.widen else self._wider()
        if wider is None:
            return None
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        former = [t for t in self._trials() if t.state in ended]
        told = ", ".join(str(new) for new, old in zip(wider, self.space, strict=True) if new != old)
        self.study.set_user_attr("wider", [[d.low, d.high, list(d.choices)] for d in wider])
        self._go_wider(wider)
        if not self.asked:
            for trial in former:
                self.study.add_trial(
                    optuna.trial.create_trial(
                        state=trial.state, params=trial.params, distributions=distributions(wider),
                        values=trial.values, intermediate_values=trial.intermediate_values,
                        user_attrs={"runs": trial.user_attrs.get("runs", [])},
                    )
                )  # fmt: skip
        return told

    def _go_wider(self, wider: Space) -> None:
        moved: dict[str, str] = {}
        for new, old in zip(wider, self.space, strict=True):
            if new != old:
                lower = new.low < old.low or new.ladder[:1] < old.ladder[:1]
                moved[new.key] = "low" if lower else "high"
        self.sides.append(moved)
        self.space, self.used_up = wider, False
        self._open()

    def _widened_before(self, known: Sequence[str]) -> Space | None:
        """What an earlier command widened the space to; of an earlier version, what its best trial leads to."""
        noted = self.study.user_attrs.get("wider")
        if noted is None:
            wider = self._wider()
        else:
            wider = tuple(
                replace(d, low=low, high=high, choices=tuple(choices))
                for d, (low, high, choices) in zip(self.space, noted, strict=True)
            )
        return wider if wider is not None and self._name(wider) in known else None

    def _wider(self) -> Space | None:
        best = self.best()
        if best is None or not best.edges:
            return None
        wider = tuple(self._widened(d, best) for d in self.space)
        return None if wider == self.space else wider

    def _widened(self, dimension: Dimension, best: Best) -> Dimension:
        """The dimension, wider at the end where the best trial lies, unless no run can use what lies there."""
        end: Any = best.edges.get(dimension.key)
        if end is None:
            return dimension
        wider = dimension.widened(end)
        low, *_, high = wider.ladder or (wider.low, wider.high)
        value = low if end == "low" else high
        return wider if self.usable({**best.params, dimension.key: value}) else dimension

    # -- resuming

    def recover(self, *, retry_failed: bool) -> int:
        """Fails the trials of drivers that are gone and enqueues their points again; returns how many.

        With `retry_failed`, so are trials that failed. The point is the same, so its runs go on from their checkpoints.
        """
        again = 0
        # one look serves both questions: a trial asked for between two looks would seem to have no driver
        while any(map(being_signed, found := self._trials(fresh=True))):
            time.sleep(0.1)
        for trial in found:
            outcome = trial.user_attrs.get("outcome")
            if trial.state == TrialState.RUNNING and trial.number not in self.running and not alive(trial):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            elif trial.state != TrialState.FAIL or outcome == REFUSED or (outcome is not None and not retry_failed):
                continue
            params = dict(trial.params or trial.system_attrs.get("fixed_params", {}))
            if params:
                self.study.enqueue_trial(params, user_attrs={"repeats": trial.number})
                again += 1
        self._seen = None
        return again

    def unfinished(self) -> list[tuple[int, dict[str, Any]]]:
        """Completed trials of which a replicate has no record, as when seeds were added: number and point."""
        return [
            (trial.number, self._point(trial))
            for trial in self._trials()
            if trial.state == TrialState.COMPLETE and None in self._records(trial)
        ]

    # -- inside

    def _trials(self, *, fresh: bool = False) -> list[FrozenTrial]:
        """Trials that count: not those that were made void or taken up again, nor those only enqueued.

        What another driver did may be `STALE_SECONDS` old, unless a `fresh` look is asked for.
        """
        if self._seen is not None and not fresh and time.monotonic() - self._seen[0] < STALE_SECONDS:
            return self._seen[1]
        found = self.study.get_trials(deepcopy=False)
        repeated = {t.user_attrs.get("repeats") for t in found}
        counted = [
            t for t in found
            if t.state != TrialState.WAITING and "void" not in t.user_attrs and t.number not in repeated
            and not pointless(t)
        ]  # fmt: skip
        self._seen = (time.monotonic(), counted)
        return counted

    def _point(self, trial: FrozenTrial) -> dict[str, Any]:
        return {d.key: _plain(trial.params[d.key]) for d in self.space}

    def _records(self, trial: FrozenTrial) -> list[Record | None]:
        """The record of each replicate, where there is one."""
        point = self._point(trial)
        return [self.find(self.arm.make(point, seed).run_id) for seed in self.arm.seeds]

    def _whole(self, trial: FrozenTrial) -> bool:
        """Whether it trained to its end, which one that was pruned may have done since."""
        if trial.state != TrialState.PRUNED:
            return trial.state == TrialState.COMPLETE
        return all(record is not None and record.status in COMPLETED for record in self._records(trial))

    def _place(self, number: int) -> int:
        return sum(t.number < number for t in self._trials(fresh=True))

    def _made_before(self, number: int, params: Mapping[str, Any]) -> bool:
        def counts(t: FrozenTrial) -> bool:
            return t.state != TrialState.FAIL or t.user_attrs.get("outcome") == REFUSED

        return any(t.number < number and t.params == params and counts(t) for t in self._trials())

    def _void(self, trial: optuna.Trial, why: str) -> None:
        self._seen = None
        trial.set_user_attr("void", why)
        self.study.tell(trial, state=TrialState.FAIL)

    def _values(self, records: Sequence[Record]) -> list[float]:
        signs = [1 if direction == "minimize" else -1 for direction in self.settings.directions]
        return [
            _mean(objective(record, name, worst=sign * math.inf) for record in records)
            for name, sign in zip(self.settings.objectives, signs, strict=True)
        ]

    def _value(self, trial: FrozenTrial) -> float:
        """The mean over all replicates there are now, which may be more than when the trial ended."""
        records = self._records(trial)
        known = [record for record in records if record is not None and record.status in COMPLETED]
        return self._values(known)[0] if len(known) == len(records) else trial.values[0]

    def _sign(self, trial: optuna.Trial) -> None:
        trial.set_user_attr("driver", {**this_driver(), "seen": time.time()})


def objective(record: Record, name: str, *, worst: float = math.nan) -> float:
    """The value of an objective in a record; `worst` where the run diverged or has no such score."""
    if not name.startswith("validation."):
        value = getattr(record, name, None) if name == "trainable_parameters" else getattr(record.efficiency, name)
        return math.nan if value is None else float(value)
    score = record.scores.get("validation", {}).get("after")
    if record.status == "diverged" or score is None:
        return worst
    found = score.value(name.removeprefix("validation."))
    return worst if found is None or math.isnan(found) else float(found)


def _mean(values: Any) -> float:
    listed = list(values)
    return math.inf if math.inf in listed else -math.inf if -math.inf in listed else math.fsum(listed) / len(listed)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
