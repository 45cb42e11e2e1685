"""Searches that cannot do what they are asked, found before work starts. Optuna is imported only where one is tuned."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sweeper import installation
from sweeper.arms import Arm
from sweeper.errors import Problems, SpecError, SweeperError
from sweeper.spec import RunSpec
from sweeper.study.search_settings import MEASURED, SearchSettings

NLL = ("nll", "perplexity")  # scores of every dataset


def check(arms: Sequence[Arm], search: SearchSettings, *, calibrate: bool = True) -> None:
    """Checks how the arms of a command are searched; writes nothing. `calibrate`: whether runs are measured alone.

    Raises:
        Problems: what is wrong, one line each.
        SpecError: Optuna is needed and not installed.
    """
    problems = [*(_tuned(arms, search, calibrate) if any(arm.space for arm in arms) else _plain(search))]
    if problems:
        raise Problems(problems)


def resolved(search: SearchSettings, arms: Sequence[Arm]) -> SearchSettings:
    """The settings with what trials are judged by, where a command does not say: what their objective is.

    Raises:
        SpecError: tuned arms are judged by different scores.
    """
    if search.objectives:
        return search
    from sweeper import objectives

    tuned = {arm.default.objective.name: arm.default.objective for arm in arms if arm.space}
    scores = {name: objectives.score_of(spec) for name, spec in tuned.items()}
    if len(set(scores.values())) > 1:
        listed = ", ".join(f"{name} by validation.{score}" for name, score in scores.items())
        raise SpecError(
            f"hydra.sweeper.objectives: tuned arms of several objectives are judged by different scores ({listed}): "
            "give one, such as hydra.sweeper.objectives=validation.nll"
        )
    return replace(search, objectives=(f"validation.{next(iter(scores.values()), 'nll')}",))


def _plain(search: SearchSettings) -> Iterator[str]:
    asked = {"n_trials": search.n_trials, "max_tokens": search.max_tokens, "max_seconds": search.max_seconds,
             "confirm_seeds": search.confirm_seeds or None}  # fmt: skip
    for name, value in asked.items():
        if value is not None:
            shown = list(value) if isinstance(value, tuple) else value
            yield (
                f"hydra.sweeper.{name}={shown}: no field is tuned. Tune one: 'optim.lr=tag(log,interval(1e-5,1e-2))', "
                f"or give hydra.sweeper.{name}=null"
            )
    if search.pruner != "none":
        yield (
            f"hydra.sweeper.pruner={search.pruner}: no field is tuned, so there are no trials to end early. Tune one: "
            "'optim.lr=tag(log,interval(1e-5,1e-2))', or give hydra.sweeper.pruner=none"
        )


def _tuned(arms: Sequence[Arm], search: SearchSettings, calibrate: bool) -> Iterator[str]:
    if importlib.util.find_spec("optuna") is None:
        raise SpecError(
            f"a search needs the package optuna: {installation.install('search')}, or give lists, no ranges"
        )
    from sweeper.study.samplers import make_pruner, try_sampler
    from sweeper.study.storage import reach

    for make_one in (
        lambda: try_sampler(search, next(arm.space for arm in arms if arm.space)), lambda: make_pruner(search, arms[0]),
        lambda: None if search.storage is None else reach(search.storage),
    ):  # fmt: skip
        try:
            make_one()
        except SweeperError as error:
            yield from error.lines
    for arm in arms:
        yield from _unpruned(arm.default, search)
        yield from _unscored(arm.default, search, calibrate)
    used = sorted(set(search.confirm_seeds) & {seed for arm in arms for seed in arm.seeds})
    if used:
        yield (
            f"hydra.sweeper.confirm_seeds={list(search.confirm_seeds)}: trials are chosen on seed {used[0]}; "
            "confirm on fresh ones"
        )


def _unpruned(spec: RunSpec, search: SearchSettings) -> Iterator[str]:
    """A line where the pruner would see no score of an arm's runs before their end."""
    from sweeper.tasks.metrics import PREFERENCES, TEACHER_FORCED

    if search.pruner == "none":
        return
    start = f"hydra.sweeper.pruner={search.pruner} looks at scores while a run trains"
    if spec.trainer.max_steps < 2:
        yield f"{start}, and trainer.max_steps={spec.trainer.max_steps} is over before one: hydra.sweeper.pruner=none"
    elif not 0 < spec.evaluation.every_steps < spec.trainer.max_steps:
        yield f"{start}: give evaluation.every_steps, from 1 to {spec.trainer.max_steps - 1}"
    if search.objectives[0].removeprefix("validation.") not in (*NLL, *TEACHER_FORCED, *PREFERENCES):
        yield f"{start}, and {search.objectives[0]} is scored at its end: prune on validation.nll"


def _unscored(spec: RunSpec, search: SearchSettings, calibrate: bool) -> Iterator[str]:
    """A line for each objective that no run of an arm would have a score for."""
    from sweeper.tasks.metrics import GENERATED

    for objective in search.objectives:
        start, name = f"hydra.sweeper.objectives={objective}", objective.removeprefix("validation.")
        if objective in MEASURED and not calibrate:
            yield f"{start} is measured on a run alone: give sweep.calibrate=true"
        if name == objective:
            continue  # a cost
        if "validation" not in spec.evaluation.splits:
            yield f"{start}: evaluation.splits has no validation, so trials would have no score"
        elif name not in (every := (*NLL, *spec.dataset.metrics, *_preferences(spec))):
            known = ", ".join(f"validation.{metric}" for metric in every)
            yield f"{start}: dataset={spec.dataset.name} has no such metric. Choose from {known}."
        elif name in GENERATED and not spec.evaluation.generate:
            yield f"{start} is a score of generated text: give evaluation.generate=true"


def _preferences(spec: RunSpec) -> tuple[str, ...]:
    """The scores that a run has because its dataset is of preferences."""
    from sweeper import tasks
    from sweeper.tasks import preference
    from sweeper.tasks.metrics import PREFERENCES

    try:
        kinds = [tasks.kind(part) for part in spec.dataset.parts or (spec.dataset,)]
    except SweeperError:  # which the check of the data tells
        return PREFERENCES
    return () if preference.PLAIN in kinds else PREFERENCES
