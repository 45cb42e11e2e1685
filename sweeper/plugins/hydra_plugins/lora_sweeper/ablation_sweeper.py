"""The default sweeper: grid axes, fields tuned inside every arm, replicates. Thin: Hydra imports it at every start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class AblationSweeperConf:
    """`params` are axes as on the command line, for overlays; the command line wins. The rest is `SearchSettings`.

    `params` has no type, or Hydra would refuse it empty and could not merge a mapping into one that is absent.
    """

    _target_: str = "hydra_plugins.lora_sweeper.ablation_sweeper.AblationSweeper"
    _recursive_: bool = False
    params: Any = None
    n_trials: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None
    sampler: str = "tpe"
    sampler_options: Any = None
    pruner: str = "none"
    pruner_options: Any = None
    objectives: Any = None
    direction: Any = None
    parallel: int | None = None
    seed: int = 0
    storage: str | None = None
    confirm_seeds: Any = None
    widen: int = 0
    finish: int = 4


ConfigStore.instance().store(group="hydra/sweeper", name="ablation", node=AblationSweeperConf, provider="lora-atlas")


class AblationSweeper(Sweeper):
    """Expands and checks the whole command, then hands it to our launchers at once, or to any other a run a job."""

    def __init__(self, params: Mapping[str, Any] | str | None = None, **search: Any) -> None:
        self.params, self.search = params, search
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from sweeper.study import launch

        arms, settings, search, workers = self.command(arguments)
        return launch.train(arms, settings, search, workers=workers)

    def command(self, arguments: list[str]) -> tuple[Any, Any, Any, Any]:
        """Arms, settings, search and workers, as `sweeper.study.launch.carry_out` takes them."""
        from sweeper import config
        from sweeper.study import launch

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        composer = config.Composer(
            loader=self.hydra_context.config_loader,
            config_name=self.config.hydra.job.config_name,
            hydra_overrides=config.as_typed(self.config.hydra.overrides.hydra),
        )
        lines: Sequence[str] = [*config.axes_of(self.params), *arguments]
        found, search = config.expand(lines, composer, typed=arguments), config.search_settings(self.search)
        # told by its name: Hydra imports plugins twice, so a class may not be the class of the same name
        ours = str(self.config.hydra.launcher._target_).startswith(f"{__package__}.")
        launcher: Any = self.launcher
        workers = launcher.our_workers() if ours else launch.as_jobs(launcher)
        return found.arms, found.settings, search, workers
