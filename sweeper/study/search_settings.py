"""How the tuned fields of every arm are searched: what `hydra.sweeper` sets. Nothing here imports Optuna."""

from dataclasses import dataclass, field
from typing import Any

from sweeper.errors import SpecError

SAMPLERS = ("tpe", "gp", "cmaes", "random", "qmc", "nsga2")
PRUNERS = ("none", "median", "asha", "hyperband", "patient")
MEASURED = ("train_seconds_solo", "peak_memory_solo_bytes")
COSTS = ("trainable_parameters", "train_flops", *MEASURED)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How the tuned fields of every arm are searched (`hydra.sweeper` on the command line).

    Attributes:
        n_trials: trials of each arm; null leaves it to the other budgets, and is 10 where there is none.
        max_tokens: no trial starts once the arm's trials have trained on this many tokens, equal for every arm.
        max_seconds: no trial starts this long after the command did.
        sampler: what proposes trials: tpe, gp, cmaes, random, qmc or nsga2.
        sampler_options: arguments of Optuna's class, given whole.
        pruner: what ends hopeless trials: none, median, asha, hyperband or patient. Needs evaluation.every_steps.
        pruner_options: arguments of Optuna's class, given whole.
        objectives: `validation.nll`, `validation.<metric>` or a cost (`trainable_parameters`, ...). None: what the
            objective of the runs is judged by (`search_check.resolved`).
        direction: minimize or maximize, one for each objective, to say what each is anyhow: metrics up, NLL and costs
            down.
        parallel: most trials of an arm at once; null is a quarter of its trials, so that each quarter knows the last.
        seed: of the sampler.
        storage: an Optuna storage URL; null is a journal file in the study folder.
        confirm_seeds: seeds on which every arm's best trial trains again.
        widen: how often a range whose end won may be widened, with another `n_trials` / 2 trials each time, and a grid
            of numbers, with one more of them each time.
        finish: most pruned trials of each arm that are trained to their end, while one lies beside the best; 0 is none.
    """

    n_trials: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None
    sampler: str = "tpe"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    pruner: str = "none"
    pruner_options: dict[str, Any] = field(default_factory=dict)
    objectives: tuple[str, ...] = ("validation.nll",)
    direction: tuple[str, ...] = ()
    parallel: int | None = None
    seed: int = 0
    storage: str | None = None
    confirm_seeds: tuple[int, ...] = ()
    widen: int = 0
    finish: int = 4

    def __post_init__(self) -> None:
        def refuse(name: str, value: object, why: str) -> None:
            raise SpecError(f"hydra.sweeper.{name}={value}: {why}")

        for name, least in (("n_trials", 1), ("max_tokens", 1), ("max_seconds", 0), ("parallel", 1), ("widen", 0),
                            ("finish", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:  # nan is neither, and no clock passes it
                refuse(name, value, f"must be at least {least}")
        for name, choices in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, name) not in choices:
                refuse(name, getattr(self, name), f"no such {name}. Choose from {', '.join(choices)}.")
        for objective in self.objectives:
            if not objective.startswith("validation.") and objective not in COSTS:
                refuse("objectives", objective, f"choose from validation.nll, validation.<metric>, {', '.join(COSTS)}.")
        for one in self.direction:
            if one not in ("minimize", "maximize"):
                refuse("direction", one, "choose minimize or maximize")
        if self.direction and self.objectives and len(self.direction) != len(self.objectives):
            refuse("direction", list(self.direction), f"give one for each objective ({len(self.objectives)})")
        for one, objective in zip(self.direction, self.objectives, strict=False):
            if one != _better(objective):
                worse = "better the lower it is" if one == "maximize" else "better the higher it is"
                refuse("direction", one, f"{objective} is {worse}; leave direction out")
        if self.pruner != "none" and len(self.objectives) > 1:
            refuse("pruner", self.pruner, "pruning needs a single objective")
        if self.pruner != "none" and self.objectives and not self.objectives[0].startswith("validation."):
            refuse("pruner", self.pruner, f"{self.objectives[0]} does not change while a run trains")
        if len(set(self.confirm_seeds)) < len(self.confirm_seeds):
            refuse("confirm_seeds", list(self.confirm_seeds), "give each once")
        if not all(0 <= seed < 2**31 for seed in self.confirm_seeds):
            refuse("confirm_seeds", list(self.confirm_seeds), "seeds are in [0, 2**31)")
        if self.confirm_seeds and len(self.objectives) > 1:
            refuse("confirm_seeds", list(self.confirm_seeds), "several objectives have no single best trial to confirm")

    @property
    def trials(self) -> int | None:
        """Trials of each arm; None where another budget decides."""
        if self.n_trials is None and self.max_tokens is None and self.max_seconds is None:
            return 10
        return self.n_trials

    @property
    def directions(self) -> tuple[str, ...]:
        return tuple(map(_better, self.objectives))


def _better(objective: str) -> str:
    """Which way an objective is better: losses and costs are to be low, metrics high."""
    return (
        "minimize" if objective in (*COSTS, "validation.nll", "validation.perplexity", "validation.kl") else "maximize"
    )
