"""What a command would train: its runs less those done, checked before any weight is loaded."""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sweeper import record
from sweeper.arms import Arm
from sweeper.errors import Problems, SpecError, SweeperError
from sweeper.spec import RunSpec, SearchSettings, Settings, to_mapping

if TYPE_CHECKING:
    from sweeper.placement import Target

Section = TypeVar("Section")

DONE: tuple[record.Status, ...] = ("completed", "pruned", "diverged")
LATEST = 20  # records that the pace is taken from


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run of the command; `status` is that of its record, None where there is none."""

    run_id: str
    spec: RunSpec
    folder: Path
    status: record.Status | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All runs of a command, in grid order; of arms that are tuned, the trials with the default hyperparameters."""

    study: Path
    runs: tuple[PlannedRun, ...]
    arms: tuple[Arm, ...]
    retry_failed: bool = True

    @property
    def tuned(self) -> bool:
        return any(arm.space for arm in self.arms)

    @property
    def fields(self) -> list[str]:
        """What tells the runs of the command apart, besides placement and rank."""
        from sweeper import naming

        varying = naming.varying([to_mapping(run.spec) for run in self.runs])
        tuned = [dimension.key for arm in self.arms[:1] for dimension in arm.space]
        return list(dict.fromkeys([*varying, *(key for key in tuned if key not in ("rank", *naming.GROUPS))]))

    @property
    def todo(self) -> tuple[PlannedRun, ...]:
        if self.tuned:  # the search knows what it has left
            return ()
        done = DONE if self.retry_failed else (*DONE, "failed")
        return tuple(run for run in self.runs if run.status not in done)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a run adapts and is expected to cost, alone. FLOPs are floating-point operations, memory is bytes."""

    modules: int
    parameters: int
    total_parameters: int
    flops: float
    memory: int
    base_memory: int


def make(arms: Sequence[Arm], settings: Settings, search: SearchSettings | None = None) -> Plan:
    """The plan of a command, with everything that will be trained checked.

    Raises:
        Problems: what is wrong, one line each. Nothing has been written.
    """
    runs = []
    for spec in (spec for arm in arms for spec in arm.defaults):
        run_id = spec.run_id
        folder = settings.folder / run_id
        runs.append(PlannedRun(run_id=run_id, spec=spec, folder=folder, status=record.status(folder)))
    plan = Plan(study=settings.folder, runs=tuple(runs), arms=tuple(arms), retry_failed=settings.retry_failed)
    check_search(plan, search or SearchSettings())
    check([run.spec for run in (plan.runs if settings.dry_run or plan.tuned else plan.todo)], settings)
    return plan


def check_search(plan: Plan, search: SearchSettings) -> None:
    """Raises `Problems` for a search that cannot do what it is asked."""
    problems: list[str] = []
    if not plan.tuned:
        asked = {"n_trials": search.n_trials, "max_tokens": search.max_tokens, "max_seconds": search.max_seconds,
                 "confirm_seeds": search.confirm_seeds or None}  # fmt: skip
        problems += [
            f"hydra.sweeper.{name}={value}: no field is tuned. Tune one: 'optim.lr=tag(log,interval(1e-5,1e-2))'"
            for name, value in asked.items() if value is not None
        ]  # fmt: skip
    else:
        if importlib.util.find_spec("optuna") is None:
            raise SpecError("a search needs the package optuna: pip install '.[search]', or give lists, no ranges")
        from sweeper.search import make_pruner, make_sampler, open_storage

        first = plan.arms[0]
        for make_one in (
            lambda: make_sampler(search, 0), lambda: make_pruner(search, first),
            lambda: None if search.storage is None else open_storage(search, plan.study),
        ):  # fmt: skip
            try:
                make_one()
            except SweeperError as error:
                problems.extend(error.lines)
        spec = first.default
        if search.pruner != "none" and not 0 < spec.evaluation.every_steps < spec.trainer.max_steps:
            problems.append(
                f"hydra.sweeper.pruner={search.pruner} looks at scores while a run trains: give "
                f"evaluation.every_steps, from 1 to {spec.trainer.max_steps - 1}"
            )
        used = sorted(set(search.confirm_seeds) & {seed for arm in plan.arms for seed in arm.seeds})
        if used:
            problems.append(
                f"hydra.sweeper.confirm_seeds={list(search.confirm_seeds)}: trials are chosen on seed {used[0]}; "
                "confirm on fresh ones"
            )
    if problems:
        raise Problems(problems)


def check(specs: Sequence[RunSpec], settings: Settings) -> None:
    """Raises `Problems` with a line for everything that would stop one of these runs."""
    if not specs:
        return
    from sweeper import device, methods, models, tasks, tracking

    problems: list[str] = []

    def attempt(one: Callable[[], object]) -> bool:
        try:
            one()
        except SweeperError as error:
            problems.extend(error.lines)
            return False
        return True

    attempt(lambda: tracking.check(settings))
    attempt(lambda: _check_writable(settings.folder))
    if settings.device.startswith("cuda"):
        attempt(lambda: device.device_for(settings.device))
    for dataset in _distinct(spec.dataset for spec in specs):
        attempt(partial(tasks.check, dataset))
    for dataset, evaluation in _distinct((spec.dataset, spec.evaluation) for spec in specs):
        attempt(partial(tasks.check_evaluation, dataset, evaluation))
    sound = {text for text, spec in _by_method(specs) if attempt(partial(methods.check, spec))}
    found = _distinct(spec.model for spec in specs)
    loadable = {repr(model) for model in found if attempt(partial(models.check, model))}
    for spec in _distinct_targets(specs):
        if repr(spec.model) in loadable and _method_text(spec) in sound:
            attempt(partial(targets, spec))
    if problems:
        raise Problems(problems)


def targets(spec: RunSpec) -> "tuple[Target, ...]":
    """The modules a run adapts, from the model's structure alone.

    Raises:
        SweeperError: the placement does not fit the model, or the rank does not fit a module.
    """
    from sweeper import allocation, methods, models, placement

    every = models.skeleton(spec.model)
    chosen = placement.resolve(every, spec.placement, layers=placement.number_of_layers(every))
    if spec.allocation.name == "uniform":
        placement.check_rank(chosen, spec.rank, highest=methods.find(spec.method.name).highest)
    allocation.ranks(spec, chosen, every)
    return chosen


def costs(specs: Iterable[RunSpec], settings: Settings) -> list[Cost]:
    """The cost of each run; runs that differ only in what does not matter for it are reckoned once."""
    known: dict[str, Cost] = {}
    found = []
    for spec in specs:
        key = repr(
            (spec.model, spec.method, spec.placement, spec.allocation, spec.rank, spec.dataset.max_length, spec.trainer)
        )
        if key not in known:
            known[key] = cost(spec, settings)
        found.append(known[key])
    return found


def cost(spec: RunSpec, settings: Settings) -> Cost:
    """What a run adapts and, at most, costs: every example is taken to be `dataset.max_length` tokens long."""
    from sweeper import allocation, budget, device, methods, models

    every = models.skeleton(spec.model)
    ranks = allocation.ranks(spec, targets(spec), every)
    found = methods.placed(spec.method, tuple(ranks), every, tied=models.is_tied(spec.model))
    ranks = ranks if found == tuple(ranks) else budget.uniform(found, spec.rank)
    total = models.total_parameters(spec.model)
    trainable = methods.trainable(spec.method, ranks, total=total)
    dtype = device.precision_for(device.device_for(settings.device), spec.trainer.precision)
    length, batch = spec.dataset.max_length, spec.trainer.batch_size
    tokens = spec.trainer.max_steps * batch * spec.trainer.accumulation * length
    memory = budget.memory(
        every,
        ranks,
        base_parameters=total,
        bytes_per_value=dtype.itemsize,
        batch_size=batch,
        length=length,
        checkpointing=spec.trainer.activation_checkpointing,
        values=methods.held(spec, ranks, total=total),
        base_bytes=methods.base_bytes(spec, every, ranks, total=total, bytes_per_value=dtype.itemsize),
    )
    return Cost(
        modules=len(ranks),
        parameters=trainable,
        total_parameters=total,
        flops=methods.train_flops(spec.method, every, ranks, length=length, tokens=tokens),
        memory=memory.total,
        base_memory=memory.base,
    )


def notes(specs: Sequence[RunSpec], costs: Sequence[Cost]) -> list[str]:
    """What the costs of a plan cannot say yet: ranks that a probe will allocate."""
    from sweeper import importance

    found = {}
    for spec, cost in zip(specs, costs, strict=True):
        asked = importance.probing(spec)
        if asked is not None:
            looked = "the weights" if asked.score == "weight" else f"{asked.batches} training batches"
            found[asked.score, asked.batches, spec.placement.name, cost.parameters] = (
                f"allocation=importance, {spec.placement.name}: a probe ({asked.score}, {looked}) decides each "
                f"module's rank before training; {cost.parameters:,} parameters in all, to within 1%"
            )
    return list(found.values())


def estimate(plan: Plan, search: SearchSettings, settings: Settings, costs: Sequence[Cost]) -> list[str]:
    """How many runs and packs there will be, and how long they take at the pace of former runs on this machine."""
    from sweeper import device
    from sweeper.display import clock_time
    from sweeper.engine import environment
    from sweeper.engine.memory import MARGIN, MOST

    where = device.device_for(settings.device)
    if plan.tuned:
        if search.trials is None:
            return ["how many runs there will be depends on the budget"]
        first = dict(zip((run.run_id for run in plan.runs), costs, strict=True))
        each = [len(arm.seeds) * search.trials + len(search.confirm_seeds) for arm in plan.arms]
        runs = sum(each)
        flops = sum(count * first[arm.default.run_id].flops for count, arm in zip(each, plan.arms, strict=True))
    else:
        left = {run.run_id for run in plan.todo}
        runs = len(left)
        flops = sum(cost.flops for run, cost in zip(plan.runs, costs, strict=True) if run.run_id in left)
    if not runs:
        return []
    largest = max(cost.memory - cost.base_memory for cost in costs)
    room = MARGIN * (device.free_bytes(where) - costs[0].base_memory)
    slots = max(1, min(settings.max_pack or MOST, runs, int(room / max(largest, 1))))
    lines = [f"{runs} run{'s' if runs > 1 else ''}, at most {slots} at a time in a pack on {where}"]
    bases = {run.spec.model.name for run in plan.runs}
    pace = _pace(settings, environment.describe(where, None)["device"], bases)
    if pace is None:
        return [
            *lines,
            f"no run of {', '.join(sorted(bases))} on this device is recorded in {settings.output_root}: there is no "
            "estimate of time",
        ]
    return [*lines, f"training takes about {clock_time(flops / pace)} at most, at the pace of the latest runs recorded"]


def _pace(settings: Settings, where: str, bases: Collection[str]) -> float | None:
    """FLOP/s, a run's share of its pack counted, of the latest runs of this device under the output folder.

    Of the models `bases` only: a tiny model's steps are all overhead, and say nothing of a large one's.
    """
    paths = sorted(Path(settings.output_root).glob(f"**/{record.RECORD}"), key=lambda path: -path.stat().st_mtime)
    found: list[float] = []
    for path in paths[:LATEST]:
        try:
            run = record.read_record(path.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        cost = run.efficiency
        of_these = run.environment.get("device") == where and run.spec["model"]["name"] in bases
        if of_these and cost.train_seconds_amortised and cost.train_flops:
            found.append(cost.train_flops / cost.train_seconds_amortised)
    return statistics.median(found) if found else None


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise SpecError(
            f"study folder {folder} cannot be written ({nearest}: {error.strerror}): choose another study=... "
            "or output_root=..."
        ) from None


def _distinct(specs: Iterable[Section]) -> list[Section]:
    """Equal specs once; by their text, since specs with mappings inside have no hash."""
    sections = {id(spec): spec for spec in specs}  # the runs of a grid share most of their sections
    return list({repr(spec): spec for spec in sections.values()}.values())


def _method_text(spec: RunSpec) -> str:
    """All that a method's check looks at."""
    return repr((spec.method, spec.placement, spec.allocation, spec.optim, spec.trainer, spec.evaluation.every_steps))


def _by_method(specs: Iterable[RunSpec]) -> list[tuple[str, RunSpec]]:
    return list({_method_text(spec): spec for spec in specs}.items())


def _distinct_targets(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """One run for each model, method, placement, allocation and rank: what decides whether modules can be found."""
    texts: dict[int, str] = {}

    def text(section: object) -> str:
        return texts.get(id(section)) or texts.setdefault(id(section), repr(section))

    return list(
        {
            (text(spec.model), text(spec.method), text(spec.placement), text(spec.allocation), spec.rank): spec
            for spec in specs
        }.values()
    )
