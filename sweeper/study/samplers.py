"""The Optuna samplers and pruners that a search names, and the distributions they draw from."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from sweeper.arms import Arm, Dimension, Space, short_hash
from sweeper.errors import SpecError, first_line
from sweeper.study.cmaes import PlainCmaEs
from sweeper.study.search_settings import SearchSettings


def pointless(trial: FrozenTrial) -> bool:
    """Whether a driver was killed between asking for a trial and noting its point: it stands for nothing."""
    return trial.state == TrialState.FAIL and not (trial.params or "fixed_params" in trial.system_attrs)


class NumberSeeded(BaseSampler):
    """Seeds the sampler anew for every trial, from the arm and the trial's place among those that were not repeated.

    So a suggestion depends on what is known and on its place, not on how often the command was interrupted, and an
    extended study does not repeat itself.
    """

    def __init__(self, settings: SearchSettings, salt: str) -> None:
        self.settings, self.salt = settings, salt
        self._inner: dict[int, BaseSampler] = {}

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._inner:
            earlier = study.get_trials(deepcopy=False)
            place = sum(t.number < trial.number and "repeats" not in t.user_attrs and not pointless(t) for t in earlier)
            salt = self.salt if self.settings.sampler == "qmc" else f"{self.salt}/{place}"  # one sequence for all
            self._inner = {trial.number: make_sampler(self.settings, int(short_hash(salt), 16) % 2**31)}
        return self._inner[trial.number]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(study, trial).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(study, trial).after_trial(study, trial, state, values)


def make_sampler(settings: SearchSettings, seed: int) -> BaseSampler:
    """The Optuna sampler of a name.

    Raises:
        SpecError: an option that the sampler does not have, or a package that it needs and is not there.
    """
    samplers = optuna.samplers
    trials = settings.trials or 16
    startup = {"n_startup_trials": min(10, max(2, trials // 3))}  # ten of ten random trials would be no search
    kinds: dict[str, tuple[Callable[..., BaseSampler], dict[str, Any]]] = {
        "tpe": (samplers.TPESampler, startup),
        "gp": (samplers.GPSampler, startup | {"warn_independent_sampling": False}),
        "cmaes": (PlainCmaEs, {"warn_independent_sampling": False}),
        "random": (samplers.RandomSampler, {}),
        "qmc": (samplers.QMCSampler, {"scramble": True, "warn_independent_sampling": False}),
        "nsga2": (samplers.NSGAIISampler, {"population_size": max(2, min(50, trials // 2))}),
    }
    kind, defaults = kinds[settings.sampler]
    made: BaseSampler = _made("sampler", kind, {**defaults, **settings.sampler_options, "seed": seed})
    return made


def try_sampler(settings: SearchSettings, space: Space) -> None:
    """Draws two points of a space and forgets them, for Optuna looks at some options only when it draws.

    Raises:
        SpecError: as `make_sampler`, or an option whose value the sampler cannot use.
    """
    values = [0.0] * len(settings.objectives)
    directions = [optuna.study.StudyDirection.MINIMIZE] * len(values)
    study = optuna.create_study(sampler=make_sampler(settings, 0), directions=directions)
    try:
        for _ in range(2 if settings.sampler_options else 0):
            study.tell(study.ask(distributions(space)), values)
    except (TypeError, ValueError, AttributeError) as error:
        raise SpecError(f"hydra.sweeper.sampler_options: {first_line(error)}") from None


def make_pruner(settings: SearchSettings, arm: Arm) -> optuna.pruners.BasePruner:
    """The Optuna pruner of a name, with the arm's evaluation interval as its smallest resource.

    Raises:
        SpecError: an option that the pruner does not have.
    """
    pruners, trials = optuna.pruners, settings.trials or 16
    every, steps = max(1, arm.default.evaluation.every_steps), max(1, arm.default.trainer.max_steps)
    kinds: dict[str, tuple[Callable[..., optuna.pruners.BasePruner], dict[str, Any]]] = {
        "none": (pruners.NopPruner, {}),
        "median": (pruners.MedianPruner, {"n_startup_trials": min(5, max(2, trials // 4))}),
        "asha": (pruners.SuccessiveHalvingPruner, {"min_resource": every, "reduction_factor": 2}),
        "hyperband": (pruners.HyperbandPruner, {"min_resource": every, "max_resource": steps}),
        "patient": (pruners.PatientPruner, {"wrapped_pruner": None, "patience": 2}),
    }
    kind, defaults = kinds[settings.pruner]
    made: optuna.pruners.BasePruner = _made("pruner", kind, {**defaults, **settings.pruner_options})
    return made


def _made(what: str, kind: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return kind(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise SpecError(f"hydra.sweeper.{what}_options: {first_line(error)}") from None


def distributions(space: Space) -> dict[str, BaseDistribution]:
    return {dimension.key: _distribution(dimension) for dimension in space}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "float":
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    if dimension.kind == "int":
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return CategoricalDistribution(dimension.choices)
