"""The default launcher: all runs in this process, packed on one base model. Thin: Hydra imports it at every start."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PackedLauncherConf:
    _target_: str = "hydra_plugins.lora_sweeper.packed_launcher.PackedLauncher"
    _recursive_: bool = False


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="lora-atlas")


class PackedLauncher(Launcher):
    """Our sweeper asks for `our_workers`; `launch` has the jobs of any other sweeper trained by them."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def our_workers(self) -> Any:
        """Who trains; None is this process."""
        return None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from sweeper import config
        from sweeper.arms import grouped
        from sweeper.errors import SpecError
        from sweeper.identity import Identities
        from sweeper.study import launch

        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        jobs = [
            config.from_config(loader.load_sweep_config(self.config, list(overrides)), loader)
            for overrides in job_overrides
        ]
        if any(settings != jobs[0][1] for _, settings in jobs):
            raise SpecError(config.differing([settings for _, settings in jobs]))
        specs = list(map(Identities(jobs[0][1].folder), (spec for spec, _ in jobs)))
        found = launch.train(grouped(specs), jobs[0][1], workers=self.our_workers())
        values = [launch.objective(found.get(spec.run_id)) for spec in specs]
        return [
            JobReturn(overrides=list(overrides), _return_value=value, status=JobStatus.COMPLETED)
            for overrides, value in zip(job_overrides, values, strict=True)
        ]
