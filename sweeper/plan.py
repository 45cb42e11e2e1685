"""What a command would train: its runs less those done, checked before any weight is loaded."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sweeper import record
from sweeper.errors import Problems, SpecError, SweeperError
from sweeper.spec import RunSpec, Settings

if TYPE_CHECKING:
    from sweeper.placement import Target

Section = TypeVar("Section")

DONE: tuple[record.Status, ...] = ("completed", "pruned", "diverged")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run of the command; `status` is that of its record, None where there is none."""

    run_id: str
    spec: RunSpec
    folder: Path
    status: record.Status | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All runs of a command, in grid order."""

    study: Path
    runs: tuple[PlannedRun, ...]
    retry_failed: bool = True

    @property
    def todo(self) -> tuple[PlannedRun, ...]:
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


def make(specs: Sequence[RunSpec], settings: Settings) -> Plan:
    """The plan of a command, with everything that will be trained checked.

    Raises:
        Problems: what is wrong, one line each. Nothing has been written.
    """
    runs = []
    for spec in specs:
        run_id = spec.run_id
        folder = settings.folder / run_id
        runs.append(PlannedRun(run_id=run_id, spec=spec, folder=folder, status=record.status(folder)))
    plan = Plan(study=settings.folder, runs=tuple(runs), retry_failed=settings.retry_failed)
    check([run.spec for run in (plan.runs if settings.dry_run else plan.todo)], settings)
    return plan


def check(specs: Sequence[RunSpec], settings: Settings) -> None:
    """Raises `Problems` with a line for everything that would stop one of these runs."""
    if not specs:
        return
    from sweeper import device, models, tasks, tracking

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
    found = _distinct(spec.model for spec in specs)
    loadable = {repr(model) for model in found if attempt(partial(models.check, model))}
    for spec in _distinct_targets(specs):
        if repr(spec.model) in loadable:
            attempt(partial(targets, spec))
    if problems:
        raise Problems(problems)


def targets(spec: RunSpec) -> "tuple[Target, ...]":
    """The modules a run adapts, from the model's structure alone.

    Raises:
        SweeperError: the placement does not fit the model, or the rank does not fit a module.
    """
    from sweeper import models, placement

    every = models.skeleton(spec.model)
    chosen = placement.resolve(every, spec.placement, layers=placement.number_of_layers(every))
    placement.check_rank(chosen, spec.rank)
    return chosen


def costs(specs: Iterable[RunSpec], settings: Settings) -> list[Cost]:
    """The cost of each run; runs that differ only in what does not matter for it are reckoned once."""
    known: dict[str, Cost] = {}
    found = []
    for spec in specs:
        key = repr((spec.model, spec.placement, spec.allocation, spec.rank, spec.dataset.max_length, spec.trainer))
        if key not in known:
            known[key] = cost(spec, settings)
        found.append(known[key])
    return found


def cost(spec: RunSpec, settings: Settings) -> Cost:
    """What a run adapts and, at most, costs: every example is taken to be `dataset.max_length` tokens long."""
    from sweeper import budget, device, models

    every = models.skeleton(spec.model)
    ranks = budget.uniform(targets(spec), spec.rank)
    total = models.total_parameters(spec.model)
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
    )
    return Cost(
        modules=len(ranks),
        parameters=budget.lora_parameters(ranks),
        total_parameters=total,
        flops=budget.train_flops(every, ranks, length=length, tokens=tokens),
        memory=memory.total,
    )


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


def _distinct_targets(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """One run for each model, placement and rank: nothing else decides whether modules can be found."""
    texts: dict[int, str] = {}

    def text(section: object) -> str:
        return texts.get(id(section)) or texts.setdefault(id(section), repr(section))

    return list({(text(spec.model), text(spec.placement), spec.rank): spec for spec in specs}.values())
