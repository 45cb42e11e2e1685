"""What a command would train: its runs less those done, checked before any weight is loaded."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper import lost, naming, record
from sweeper.arms import Arm, Params, merged
from sweeper.errors import Problems, SpecError, SweeperError
from sweeper.identity import Identities
from sweeper.run import Run
from sweeper.spec import DatasetSpec, ModelSpec, RunSpec, Settings, to_mapping, unique
from sweeper.study import chain
from sweeper.study import search_check as checking
from sweeper.study.search_settings import SearchSettings

if TYPE_CHECKING:
    from sweeper.methods.method import Ranks

DONE: tuple[record.Status, ...] = ("completed", "pruned", "diverged")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a command, in grid order; of arms that are tuned, the trials with the default hyperparameters.

    Attributes:
        statuses: run id -> status of its record; None where there is none.
        left_out: arms that are not among them, as they would train what another one does.
        notes: lines on what may not be meant, and on runs that train anew as their data or model may have changed.
    """

    study: Path
    runs: tuple[Run, ...]
    arms: tuple[Arm, ...]
    statuses: Mapping[str, record.Status | None]
    retry_failed: bool = True
    left_out: tuple[Arm, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tuned(self) -> bool:
        return any(arm.space for arm in self.arms)

    @cached_property
    def fields(self) -> list[str]:
        """What tells the runs of the command apart, besides placement and rank."""
        varying = naming.varying([to_mapping(run.spec) for run in self.runs])
        tuned = [dimension.key for arm in self.arms[:1] for dimension in arm.space]
        return list(dict.fromkeys([*varying, *(key for key in tuned if key not in ("rank", *naming.GROUPS))]))

    @property
    def done(self) -> tuple[record.Status, ...]:
        """Statuses of runs that the command does not train again."""
        return DONE if self.retry_failed else (*DONE, "failed")

    @property
    def todo(self) -> tuple[Run, ...]:
        if self.tuned:  # the search knows what it has left
            return ()
        tried = lost.former().failed  # by a process of this command
        return tuple(run for run in self.runs if self.statuses[run.run_id] not in self.done and run.run_id not in tried)


def make(arms: Sequence[Arm], settings: Settings, search: SearchSettings | None = None) -> Plan:
    """The plan of a command, with everything that will be trained checked.

    Raises:
        Problems: what is wrong, one line each. Nothing has been written.
    """
    identities = Identities(settings.folder)
    arms = identities.arms(merged(arms))
    runs = tuple(Run.of(spec, settings.folder, arm=arm.key) for arm in arms for spec in arm.defaults)
    plan = Plan(
        study=settings.folder, runs=runs, arms=tuple(arms), retry_failed=settings.retry_failed,
        statuses={run.run_id: record.status(run.folder) for run in runs}, notes=tuple(identities.notes),
    )  # fmt: skip
    checking.check(arms, search or SearchSettings(), calibrate=settings.calibrate)
    specs = [run.spec for run in (plan.runs if settings.dry_run or plan.tuned else plan.todo)]
    ends = [arm.make(params, arm.seeds[0]) for arm in arms for _, params in arm.ends()]
    check([*specs, *ends], settings)
    _check_chain(plan, [*specs, *ends])
    finished = [run for run in plan.runs if plan.statuses[run.run_id] in plan.done]
    notes = *plan.notes, *_unreadable(plan), *_warnings(specs), *chain.changed(finished, plan.study)
    plan = replace(plan, notes=notes)
    if left := plan.runs if plan.tuned else plan.todo:
        plan = replace(plan, notes=(*plan.notes, *identities.changed([run.spec for run in left])))
    return _without_likes(plan)


def _unreadable(plan: Plan) -> Iterator[str]:
    """A line on the runs that train again because their records are not what was written."""
    for run in plan.runs:
        if plan.statuses[run.run_id] is None and (run.folder / record.RECORD).exists():
            try:
                record.read_record(run.folder)
            except (OSError, ValueError) as error:
                yield f"{run.run_id} trains again; its record is kept beside the new one: {error}"


def _check_chain(plan: Plan, specs: Sequence[RunSpec]) -> None:
    """Raises `Problems` for runs that cannot begin from the one that they name."""
    tuned = {spec.run_id for arm in plan.arms if arm.space for spec in arm.defaults}
    # what failed in a former process of this command fails those that wait for it, when it is their turn
    done = {run_id for run_id, status in plan.statuses.items() if status in plan.done} - set(lost.former().failed)
    chain.check(specs, {run.run_id: run for run in plan.runs}, done, tuned, plan.study)


def _warnings(specs: Sequence[RunSpec]) -> Iterator[str]:
    """Lines on what can be trained and may not be meant."""
    if not specs:
        return
    from sweeper import models

    for model, dataset in unique((spec.model, spec.dataset) for spec in specs):
        most = models.trained_positions(model)
        if most is not None and dataset.max_length > most:
            yield (
                f"dataset.max_length={dataset.max_length}: model={model.name} was made for texts of {most} tokens; the "
                "positions beyond are new to it"
            )


def _without_likes(plan: Plan) -> Plan:
    """Leaves one arm of those that would train the same: one that has a record already, if any has."""
    from sweeper import methods

    groups: dict[str, list[Arm]] = {}
    for arm in plan.arms:
        same = tuple(map(methods.effective, arm.defaults))
        alone = same == arm.defaults and not arm.known_as
        groups.setdefault((arm if alone else replace(arm, defaults=same, known_as="")).key, []).append(arm)
    if len(groups) == len(plan.arms):
        return plan
    begun = {run.run_id for run in plan.runs if plan.statuses[run.run_id] is not None}
    chosen = (
        next((arm for arm in alike if any(spec.run_id in begun for spec in arm.defaults)), alike[0])
        for alike in groups.values()
    )
    kept = {arm.key: arm for arm in chosen}
    wanted = {spec.run_id for arm in kept.values() for spec in arm.defaults}
    runs = tuple(run for run in plan.runs if run.run_id in wanted)
    left_out = tuple(arm for arm in plan.arms if arm.key not in kept)
    return replace(plan, runs=runs, arms=tuple(kept.values()), left_out=left_out)


def usable(arm: Arm, params: Params, settings: Settings) -> bool:
    """Whether runs of an arm can train with these values of its tuned fields."""
    try:
        check([arm.make(params, arm.seeds[0])], settings)
    except SweeperError:
        return False
    return True


def check(specs: Sequence[RunSpec], settings: Settings) -> None:
    """Raises `Problems` with a line for everything that would stop one of these runs."""
    if not specs:
        return
    from sweeper import device, methods, models, objectives, tasks
    from sweeper.reporting import tracking

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
    readable = {repr(one) for one in unique(spec.dataset for spec in specs) if attempt(partial(tasks.check, one))}
    known = {repr(one) for one in unique(spec.objective for spec in specs) if attempt(partial(objectives.check, one))}
    for objective, dataset in unique((spec.objective, spec.dataset) for spec in specs):
        if repr(objective) in known and repr(dataset) in readable:
            attempt(partial(objectives.check_data, objective, dataset))
    for dataset, evaluation in unique((spec.dataset, spec.evaluation) for spec in specs):
        attempt(partial(tasks.check_evaluation, dataset, evaluation))
    sound = {text for text, spec in _by_method(specs) if attempt(partial(methods.check, spec))}
    found = unique(spec.model for spec in specs)
    loadable = {repr(model) for model in found if attempt(partial(models.check, model))}
    for model, dataset in unique((spec.model, spec.dataset) for spec in specs):
        if repr(model) in loadable:
            attempt(partial(models.check_length, model, dataset.max_length))
            for part in dataset.parts or (dataset,):
                attempt(partial(_check_template, model, part))
    for spec in _distinct_targets(specs):
        if repr(spec.model) in loadable and _method_text(spec) in sound:
            attempt(partial(module_ranks, spec))
    if problems:
        raise Problems(problems)


def module_ranks(spec: RunSpec) -> "Ranks":
    """The modules a run adapts and their ranks, from the model's structure alone.

    Raises:
        SweeperError: the placement does not fit the model, or the rank does not fit a module.
    """
    from sweeper import methods, models

    if spec.allocation.options and spec.allocation.name != "importance":
        raise SpecError(f"allocation.options: allocation={spec.allocation.name} has none, importance has")
    ranks = methods.module_ranks(spec, models.skeleton(spec.model), tied=models.is_tied(spec.model))
    methods.check_places(spec, tuple(ranks))
    methods.blocks(spec, ranks)
    return ranks


def _check_template(model: ModelSpec, dataset: DatasetSpec) -> None:
    """Raises DataError where the model's chat template refuses the turns of a dataset that uses it."""
    from sweeper import models, tasks

    if model.source != "random" and dataset.template == "chat" and models.tokenizer_at_hand(model):
        tasks.check_template(dataset, models.tokenizer_of(model), model=model.name)


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


def _method_text(spec: RunSpec) -> str:
    """All that a method's check looks at."""
    shared = (spec.sharing, spec.dataset.family, [part.name for part in spec.dataset.parts])
    trained = (spec.method, spec.placement, spec.allocation, spec.optim, spec.trainer, spec.evaluation.every_steps)
    return repr((*trained, *shared))


def _by_method(specs: Iterable[RunSpec]) -> list[tuple[str, RunSpec]]:
    return list({_method_text(spec): spec for spec in specs}.items())


def _distinct_targets(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """One run for each model, method, placement, allocation, sharing and rank: what its modules depend on."""
    texts: dict[int, str] = {}

    def text(section: object) -> str:
        return texts.get(id(section)) or texts.setdefault(id(section), repr(section))

    return list(
        {
            (
                text(spec.model),
                text(spec.method),
                text(spec.placement),
                text(spec.allocation),
                spec.rank,
                text(spec.sharing),
                len(spec.dataset.parts),
            ): spec
            for spec in specs
        }.values()
    )
