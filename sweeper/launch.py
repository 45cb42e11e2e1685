"""One command from specs to table: plan, dry run or training, summary, and how it ended."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from sweeper import plan as planning
from sweeper import record, scheduler, summary, tracking
from sweeper.display import make_console, make_display
from sweeper.errors import Interrupted, RunsFailed
from sweeper.plan import Plan
from sweeper.record import Record
from sweeper.scheduler import Outcome, TrainRuns
from sweeper.spec import RunSpec, Settings


def train(specs: Sequence[RunSpec], settings: Settings, *, engine: TrainRuns | None = None) -> dict[str, Record]:
    """Trains what is missing, prints and saves the table; returns the records of all runs of the command.

    Raises:
        Problems: bad input; nothing was trained and nothing written.
        RunsFailed: every run was tried and some failed.
        Interrupted: stopped by Ctrl-C.
    """
    plan, console = planning.make(specs, settings), make_console()
    if settings.dry_run:
        show_plan(plan, settings, console)
        return {}
    announce(plan, console)
    outcome = Outcome(records={})
    if plan.todo:
        display, tracker = make_display(plan, console), tracking.make(plan, settings)
        observers: list[scheduler.Observer] = [display] if tracker is None else [display, tracker]
        try:
            with display:
                outcome = scheduler.run(plan, settings, observers, train=engine)
        finally:
            if tracker is not None:
                tracker.close()
    return conclude(plan, console, interrupted=outcome.interrupted)


def train_one(spec: RunSpec, settings: Settings, *, engine: TrainRuns | None = None) -> float | None:
    """Trains one run, or finds it done; returns its validation NLL after training, None where it has none."""
    return objective(train([spec], settings, engine=engine).get(spec.run_id))


def sweep(composition: Any, launcher: Any) -> Any:
    """Hands a `sweeper.compose.Composition` to a Hydra launcher: ours gets all runs at once, others a run a job."""
    if hasattr(launcher, "run_all"):
        return launcher.run_all(composition)
    settings, console = composition.settings, make_console()
    plan = planning.make(composition.specs, settings)
    if settings.dry_run:
        show_plan(plan, settings, console)
        return {}
    announce(plan, console)
    typed = dict(zip((spec.run_id for spec in composition.specs), composition.overrides, strict=True))
    if plan.todo:
        launcher.launch([list(typed[run.run_id]) for run in plan.todo], initial_job_idx=0)
    return conclude(plan, console)


def objective(found: Record | None) -> float | None:
    """What a search minimises."""
    score = None if found is None else found.scores.get("validation", {}).get("after")
    return None if score is None else score.nll


def announce(plan: Plan, console: Console) -> None:
    runs, left = len(plan.runs), len(plan.todo)
    done = f"{runs - left} of {runs} runs {'is' if runs == 1 else 'are'} done already"
    if not left:
        console.print(f"{done}; nothing to train", markup=False)
    elif left < runs:
        console.print(f"{done}; training the other {left}", markup=False)
    else:
        console.print(f"{runs} run{'s' if runs > 1 else ''} to train in {plan.study}", markup=False, soft_wrap=True)


def conclude(plan: Plan, console: Console, *, interrupted: bool = False) -> dict[str, Record]:
    """Prints the command's table, saves the study's, and raises where not every run completed."""
    found: dict[str, Record] = {}
    for run in plan.runs:
        if record.status(run.folder) is not None:
            found[run.run_id] = record.read_record(run.folder)
    if found:
        summary.show(list(found.values()), console)
        csv, markdown = summary.write(plan.study, _study_records(plan, found))
        console.print(f"saved: {csv}, {markdown}", style="dim", soft_wrap=True)
    left = len(plan.runs) - len(found)
    if interrupted and left:
        raise Interrupted(
            f"stopped with {len(found)} of {len(plan.runs)} runs done; the same command trains the other {left}"
        )
    failed = {run_id: one for run_id, one in found.items() if one.status == "failed"}
    if failed or left:
        raise RunsFailed(_failures(plan, failed, left))
    return found


def show_plan(plan: Plan, settings: Settings, console: Console) -> None:
    """The dry run: every run with what it adapts and costs."""
    from sweeper import naming
    from sweeper.spec import to_mapping

    specs = [to_mapping(run.spec) for run in plan.runs]
    fields = naming.varying(specs)
    header = ["run", "placement", "rank", *fields, "modules", "trainable", "%", "train FLOPs", "est. memory", "status"]
    costs = planning.costs([run.spec for run in plan.runs], settings)
    cells = []
    for run, spec, cost in zip(plan.runs, specs, costs, strict=True):
        flat = naming.flat(spec)
        cells.append(
            [
                run.run_id,
                str(flat["placement"]),
                str(run.spec.rank),
                *(str(flat.get(name)) for name in fields),
                f"{cost.modules:,}",
                f"{cost.parameters:,}",
                f"{100 * cost.parameters / cost.total_parameters:.3f}",
                summary.amount(cost.flops),
                summary.size(cost.memory),
                run.status or "to train",
            ]
        )
    console.out(summary.aligned(header, cells), highlight=False)
    console.print("FLOPs and memory: of a run alone, at most (examples of dataset.max_length tokens).", style="dim")
    runs = f"{len(plan.runs)} run{'' if len(plan.runs) == 1 else 's'}"
    console.print(f"{runs}, {len(plan.todo)} to train; this was a dry run, nothing was trained", soft_wrap=True)


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


def _failures(plan: Plan, failed: dict[str, Record], left: int) -> str:
    parts = [f"{len(failed) + left} of {len(plan.runs)} runs failed"]
    for run_id, one in failed.items():
        error = one.error or {}
        parts.append(f"{run_id} ({error.get('class', 'error')}: {error.get('message', 'no message')})")
    if left:
        parts.append(f"{left} left no record")
    return "; ".join(parts) + ". The same command trains just these again."
