"""One command from arms to table: plan, dry run or training, summary, and how it ended."""

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sweeper import cache, installation, record, register, shell
from sweeper.arms import Arm, look_up, number_of_points, single
from sweeper.errors import Interrupted, RunsFailed, SpecError, SweeperError, gist
from sweeper.record import Record
from sweeper.reporting import summary, table, text, tracking
from sweeper.reporting.console import make_console
from sweeper.reporting.display import make_display
from sweeper.reporting.table import Column
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings, to_mapping
from sweeper.study import chain, forecast, scheduler
from sweeper.study import plan as planning
from sweeper.study.plan import Plan
from sweeper.study.scheduler import Outcome, Scheduler, TrainRuns
from sweeper.study.search_check import resolved
from sweeper.study.search_settings import SearchSettings
from sweeper.training.events import Event, Remark, RunFinished

MENDABLE = ("SpecError", "DataError", "ModelError")  # whose message says it all


Workers = Callable[[Scheduler], Outcome]
"""Who trains what a scheduler has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a command came to.

    Attributes:
        runs: those that stand for an arm, in grid order, then others that failed, as trials do.
        records: of those that stand for an arm, by run id.
        failures: a line for each that did not complete; None where all did.
    """

    study: Path
    runs: tuple[Run, ...]
    records: dict[str, Record]
    failures: RunsFailed | None = None


def train(
    arms: Sequence[Arm], settings: Settings, search: SearchSettings | None = None, *,
    workers: Workers | None = None, engine: TrainRuns | None = None,
) -> dict[str, Record]:  # fmt: skip
    """As `carry_out`; returns the records of all runs that stand for an arm.

    Raises:
        RunsFailed: every run was tried and some failed.
    """
    found = carry_out(arms, settings, search, workers=workers, engine=engine)
    if found.failures is not None:
        raise found.failures
    return found.records


def on_ray(**ray_settings: Any) -> Workers:
    """Workers over Ray; `ray_settings` are the fields of `sweeper.study.ray_workers.RaySettings`."""
    if importlib.util.find_spec("ray") is None:
        raise SpecError(f"hydra/launcher=ray needs the package ray: {installation.install('ray')}")
    from sweeper.study import ray_workers

    chosen = ray_workers.RaySettings(**ray_settings)
    return lambda work: ray_workers.run(work, chosen)


def as_jobs(launcher: Any) -> Workers:
    """A job of a Hydra launcher for each run."""
    return lambda work: _as_jobs(work, launcher)


def train_one(spec: RunSpec, settings: Settings, *, engine: TrainRuns | None = None) -> float | None:
    """Trains one run, or finds it done; returns its validation NLL after training, None where it has none."""
    found = train([single(spec)], settings, engine=engine)
    return objective(next(iter(found.values()), None))


def _as_jobs(work: Scheduler, launcher: Any) -> Outcome:
    """Batches of runs as Hydra jobs; a batch ends before the next is asked for, and nothing is pruned midway."""
    by_key = {state.arm.key: state.arm for state in work.states.values()}  # as they are in this study
    given = ",".join(map(json.dumps, work.settings.plugins))
    plugins = [f"plugins=[{given}]"] if given else []
    begun = 0
    try:
        while groups := work.pending():
            pulled = work.pull(sum(group.most for group in groups), [group.key for group in groups])
            if not pulled.runs:
                break
            typed = [[*_typed(by_key[one.arm], to_mapping(one.spec)), *plugins] for one in pulled.runs]
            former = [_stamp(run) for run in pulled.runs]
            for run in pulled.runs:
                work.claims.give_back(run.run_id)  # the job is a command of its own and claims it
                if run.search.get("purpose") == "finish":  # and a record would be its end
                    (run.folder / record.RECORD).unlink(missing_ok=True)
            broken: Exception | None = None
            try:
                errors = _errors_of(launcher.launch(typed, initial_job_idx=begun), len(typed))
            except SweeperError:
                raise
            except Exception as error:  # the launcher's own: a job's comes back with what the job returned
                broken, errors = error, [error] * len(typed)
            begun += len(typed)
            left = [_stamp(run) != stamp for run, stamp in zip(pulled.runs, former, strict=True)]
            if broken is not None and not any(left):
                raise _no_jobs(launcher, broken) from broken
            for run, job_error, new in zip(pulled.runs, errors, left, strict=True):
                _take(work, run, job_error, new)
    finally:
        work.close()
    return Outcome(records=work.records)


def _errors_of(returned: Any, jobs: int) -> Sequence[BaseException | None]:
    """The error that each job ended with, which Hydra's launchers hold back in what a job returned."""
    if not isinstance(returned, Sequence) or len(returned) != jobs:
        return [None] * jobs
    values = [getattr(one, "_return_value", None) for one in returned]  # `return_value` raises what it holds
    return [value if isinstance(value, BaseException) else None for value in values]


def _take(work: Scheduler, run: Run, error: BaseException | None, new: bool) -> None:
    """Reports what became of a run that was a job: `new` says whether the job left a record."""
    if not new:
        reason = "the job left no record" if error is None else gist(error)
        work.abandon(run.run_id, reason, kind="WorkerDied" if error is None else type(error).__name__)
        return
    found = record.read_record(run.folder)
    if found.search != run.search:  # a job knows nothing of the search it is part of
        found = dataclasses.replace(found, search=run.search)
        record.write_record(run.folder, found)
    if error is not None and found.status != "failed":
        what = f"{type(error).__name__}: {gist(error)}"
        work.notify(Remark(message=f"{run.run_id}: its record is whole, but its job ended with {what}"))
    work.report(RunFinished(record=found))


def _stamp(run: Run) -> tuple[int, int] | None:
    """Changes when a run's record is written; None where there is none that can be read."""
    if record.status(run.folder) is None:
        return None
    found = (run.folder / record.RECORD).stat()
    return found.st_mtime_ns, found.st_ino


def _no_jobs(launcher: Any, error: Exception) -> SpecError:
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return SpecError(
            "hydra.sweep.subdir gives folder names that are too long for the file system: "
            "'hydra.sweep.subdir=${hydra.job.num}'"
        )
    return SpecError(
        f"hydra/launcher: {type(launcher).__name__} ran no job ({type(error).__name__}: {gist(error)}); without "
        "hydra/launcher=... the runs train in this process"
    )


def carry_out(
    arms: Sequence[Arm], settings: Settings, search: SearchSettings | None = None, *,
    workers: Workers | None = None, engine: TrainRuns | None = None, typed: str | None = None,
) -> Finished:  # fmt: skip
    """Trains what is missing, prints and saves the table: where the command line and the Python API meet.

    Args:
        workers: who trains; None is this process. engine: what it trains with.
        typed: the command as the study is to note it; None is that of this process.

    Raises:
        Problems: bad input; nothing was trained and nothing written.
        Interrupted: stopped by Ctrl-C.
        ContextLost: this process can use its GPU no more; the same again in a fresh one goes on from what is saved.
    """
    search = resolved(search or SearchSettings(), arms)
    cache.limit_bytes()  # one that is no size is told before work starts
    register.load(settings.plugins)
    console = make_console()
    # for seconds: what plans imports what trains
    with console.status("checking the runs") if console.is_terminal else contextlib.nullcontext():
        plan = planning.make(arms, settings, search)
    settings = _with_plugins(settings, plan, elsewhere=workers is not None)
    for line in (*_left_out(plan), *plan.notes):
        console.print(line, markup=False)
    if settings.dry_run:
        show_plan(plan, settings, search, console)
        return Finished(study=plan.study, runs=plan.runs, records={})
    early: list[Event] = []
    todo, planned = ([run.run_id for run in runs] for runs in (plan.todo, plan.runs))
    work = Scheduler(plan.arms, todo, settings, search, observers=[early.append], planned=planned)
    left = bool(work.pending())
    announce(plan, search, console, left=left)
    if left and plan.tuned and any(so_far := work.taken_up()):
        console.print(_so_far(*so_far), markup=False)
    outcome = Outcome(records={})
    if left:
        record.note_command(plan.study, typed or shell.noted())
        say = functools.partial(console.print, style="yellow", markup=False, soft_wrap=True)
        display = make_display(plan, console, trials=search.trials, costs=forecast.step_costs(plan, settings))
        tracker = tracking.make(plan.fields, settings, say)
        work.observers = [display] if tracker is None else [display, tracker]
        try:
            with display:
                for event in early:
                    display(event)
                outcome = scheduler.run(work, train=engine) if workers is None else workers(work)
        finally:
            if tracker is not None:
                tracker.close()
    return conclude(plan, work, console, outcome, typed=typed)


def _with_plugins(settings: Settings, plan: Plan, *, elsewhere: bool) -> Settings:
    """The settings with all plugins that runs need; other processes (`elsewhere`) can have code from nowhere else."""
    found = register.plugins_of(run.spec for run in plan.runs)
    if elsewhere and "" in found:
        raise SpecError(f"code of your own for workers in other processes: {register.how_to_give('')}")
    plugins = dict.fromkeys([*settings.plugins, *filter(None, found)])
    return dataclasses.replace(settings, plugins=tuple(plugins))


def objective(found: Record | None) -> float | None:
    """What a search minimises unless told otherwise."""
    score = None if found is None else found.scores.get("validation", {}).get("after")
    return None if score is None else score.nll


def announce(plan: Plan, search: SearchSettings, console: Console, *, left: bool) -> None:
    if plan.tuned:
        line = _search_line(plan, search) if left else "every trial that the budget allows is done; nothing to train"
        console.print(line, markup=False)
        return
    runs, todo = len(plan.runs), len(plan.todo)
    done = f"{runs - todo} of {runs} runs {'is' if runs == 1 else 'are'} done already"
    if not todo:
        console.print(f"{done}; nothing to train", markup=False)
    elif todo < runs:
        console.print(f"{done}; training the other {todo}", markup=False)
    else:
        console.print(f"{runs} run{'s' if runs > 1 else ''} to train in {plan.study}", markup=False)


def _so_far(ended: int, cut_off: int) -> str:
    """What former commands have done of a search."""
    lines = [f"{ended} trial{' has' if ended == 1 else 's have'} ended already"] if ended else []
    if cut_off:
        lines.append(f"{cut_off} cut off or failed before go{'es' if cut_off == 1 else ''} on")
    return "; ".join(lines)


def _left_out(plan: Plan) -> list[str]:
    """A line for each method that has arms which would train the same."""
    from sweeper import methods

    groups = Counter((arm.default.method.name, *methods.lacks(arm.default.method)) for arm in plan.left_out)
    return [
        f"method={name} has no {' and no '.join(lacking)}: {number} arm{'' if number == 1 else 's'} left out, "
        "which would train the same as another"
        for (name, *lacking), number in groups.items()
    ]


def _search_line(plan: Plan, search: SearchSettings) -> str:
    arms = [arm for arm in plan.arms if arm.space]
    counts = {int(min(search.trials, number_of_points(arm.space))) for arm in arms if search.trials}
    number = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(max(counts, default=0))
    trials = f"{number} trials" if counts else "trials until the budget is used up"
    seeds = len(arms[0].seeds)
    repeated = f" x {seeds} seeds" if seeds > 1 else ""
    tuned = dict.fromkeys(str(dimension) for arm in arms for dimension in arm.space)
    fields = "; ".join(dimension + _where(dimension, arms) for dimension in tuned)
    widen = f", widened at most {_times(search.widen)}" if search.widen else ""
    confirm = f", then the best on {len(search.confirm_seeds)} fresh seeds" if search.confirm_seeds else ""
    arm_word = "arm" if len(arms) == 1 else "arms"
    return f"{len(arms)} {arm_word}, {trials}{repeated} each{widen}{confirm}, in {plan.study}. Tuned: {fields}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _where(dimension: str, arms: Sequence[Arm]) -> str:
    """Which methods tune a dimension, where not every arm does: some have ranges of their own."""
    tuning = [arm for arm in arms if dimension in map(str, arm.space)]
    methods = dict.fromkeys(arm.default.method.name for arm in tuning)
    return f" (method={','.join(methods)})" if len(tuning) < len(arms) else ""


def conclude(
    plan: Plan, work: Scheduler, console: Console, outcome: Outcome, *, typed: str | None = None
) -> Finished:  # fmt: skip
    """Prints the command's table, saves the study's and says what to type next; raises where it was stopped."""
    chosen = [run for runs in work.chosen().values() for run in runs]
    found: dict[str, Record] = {}
    for run in chosen:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found[run.run_id] = record.read_record(run.folder)
    several = len(work.how.objectives) > 1
    if plan.tuned:
        summary.show_search(work.table(), console)
        record.write_json(plan.study / record.SEARCHES, _searches(plan.study) | work.searches())
    if found:
        summary.show(list(found.values()), console)
        csv, markdown = summary.write(plan.study, _study_records(plan, found), found)
        console.print(f"saved: {csv}, {markdown}", style="dim", markup=False)
    failed = {run_id: one for run_id, one in {**outcome.records, **found}.items() if one.status == "failed"}
    if outcome.interrupted and (work.running or work.pending()):
        raise Interrupted(_stopped(plan, found), typed or shell.this_command())
    elsewhere = work.elsewhere()
    if elsewhere:
        what = "trials" if plan.tuned else "of these runs"
        console.print(f"another command is still at work on {elsewhere} {what}; the same command later sums up all")
    left = len({run.run_id for run in chosen} - found.keys() - failed.keys())
    lines = [f"{row['arm']}: no trial completed" for row in work.table() if row["best"] is None and not several]
    if failed or (left and not elsewhere):
        lines += _failures(plan, failed, left, len(outcome.records) if plan.tuned else len(chosen))
    if any(one.status == "completed" for one in found.values()):
        console.print("Next, its tables and figures:", style="dim")
        console.print(shell.command("analyse", str(plan.study), "--out", "paper/"), markup=False, soft_wrap=True)
    others = [one for run_id, one in failed.items() if run_id not in {run.run_id for run in chosen}]
    return Finished(
        study=plan.study, runs=(*chosen, *(Run.recorded(one, plan.study) for one in others)), records=found,
        failures=RunsFailed(lines) if lines else None,
    )  # fmt: skip


def _searches(study: Path) -> dict[str, Any]:
    """What earlier commands left of the searches of a study's arms; nothing where the file cannot be read."""
    try:
        found = json.loads((study / record.SEARCHES).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stopped(plan: Plan, found: Mapping[str, Record]) -> str:
    if plan.tuned:
        return "stopped before every trial was done; the same command goes on from here"
    done = sum(one.status in plan.done for one in found.values())
    left = len(plan.runs) - done
    return f"stopped with {done} of {len(plan.runs)} runs done; the same command trains the other {left}"


def show_plan(plan: Plan, settings: Settings, search: SearchSettings, console: Console) -> None:
    """The dry run: every run (of a tuned arm, the default trial) with what it adapts and costs."""
    from sweeper import methods, naming

    flat = [naming.flat(to_mapping(run.spec)) for run in plan.runs]
    fields, tuned = naming.varying_rows(flat), plan.tuned
    lacking = [methods.lacks(run.spec.method) for run in plan.runs]
    costs = forecast.costs([run.spec for run in plan.runs], settings)
    shown = {
        "placement": [
            "all" if "placement" in own else one["placement"] for one, own in zip(flat, lacking, strict=True)
        ],
        "rank": ["-" if "rank" in own else str(one["rank"]) for one, own in zip(flat, lacking, strict=True)],
        **{name: [str(one.get(name)) for one in flat] for name in fields},
    }
    table.print_fitted(
        [
            Column(title="run", cells=[run.run_id for run in plan.runs]),
            *(Column(title=name, cells=cells, wraps=True) for name, cells in shown.items()),
            Column(title="modules", cells=[f"{cost.modules:,}" for cost in costs], spare=4),
            Column(title="trainable", cells=[f"{cost.parameters:,}" for cost in costs], spare=1),
            Column(
                title="%", cells=[f"{100 * cost.parameters / cost.total_parameters:.3f}" for cost in costs], spare=5
            ),
            Column(title="train FLOPs", cells=[text.amount(cost.flops) for cost in costs], spare=3),
            Column(title="est. memory", cells=[text.size(cost.memory) for cost in costs], spare=2),
            Column(
                title="status",
                cells=[
                    plan.statuses[run.run_id] or ("default trial" if tuned else _to_train(plan, run))
                    for run in plan.runs
                ],
                wraps=True,
            ),
        ],
        console,
    )
    console.print("FLOPs and memory are those of a run alone; memory with its longest examples.", style="dim")
    for line in forecast.notes([run.spec for run in plan.runs], costs, settings):
        console.print(line, markup=False)
    if plan.tuned:
        console.print(_search_line(plan, search), markup=False)
    for line in forecast.estimate(plan, search, settings, costs):
        console.print(line, markup=False)
    runs = f"{len(plan.runs)} run{'' if len(plan.runs) == 1 else 's'}, {len(plan.todo)} to train; "
    console.print(f"{'' if plan.tuned else runs}this was a dry run, nothing was trained")


def _to_train(plan: Plan, run: Run) -> str:
    """What is to be done with a run, in a dry run: it may begin from another one, which may be still to train."""
    former = chain.former_of(run.spec, plan.study)
    if run.spec.trainer.init_from is None:
        return "to train"
    left = former is not None and former in {one.run_id for one in plan.todo}
    return f"to train {'after' if left else 'from'} {former or run.spec.trainer.init_from}"


def _study_records(plan: Plan, found: dict[str, Record]) -> list[Record]:
    """The command's records, then those of former commands in the same study; unreadable ones are left out."""
    others = []
    for path in sorted(plan.study.glob(f"*/{record.RECORD}")):
        if path.parent.name not in found:
            try:
                others.append(record.read_record(path.parent))
            except (ValueError, KeyError, TypeError):
                continue
    return [*found.values(), *others]


def _failures(plan: Plan, failed: dict[str, Record], left: int, runs: int) -> list[str]:
    bad = len(failed) + left
    lines = [f"{bad} of {max(runs, bad)} runs failed; the same command trains just these again"]
    for run_id, one in failed.items():
        error = one.error or {}
        trace = plan.study / run_id / error.get("traceback", record.TRACEBACK)
        where = f" ({trace})" if error.get("class") not in MENDABLE and trace.exists() else ""
        lines.append(f"{run_id}: {error.get('class', 'error')}: {error.get('message', 'no message')}{where}")
        repeat = _repeat(plan, one)
        if repeat:
            lines.append(f"  alone: {repeat}")
    if left:
        lines.append(f"{left} left no record")
    return lines


def _repeat(plan: Plan, failed: Record) -> str | None:
    """The command that trains one run of a plan alone, if it is known how the run was typed."""
    for arm in plan.arms:
        mine = failed.search.get("arm") == arm.key or any(spec.run_id == failed.run_id for spec in arm.defaults)
        if mine and arm.overrides:
            one = ["hydra.mode=RUN"] if arm.space else []  # of an overlay that makes a search of it, such as search=lr
            return shell.command("train", *_typed(arm, failed.spec), *one)
    return None


def _typed(arm: Arm, spec: Mapping[str, Any]) -> list[str]:
    """The overrides that compose a run of an arm alone, from the plain data of its spec."""
    return list(arm.typed({dimension.key: look_up(spec, dimension.key) for dimension in arm.space}, spec["seed"]))
