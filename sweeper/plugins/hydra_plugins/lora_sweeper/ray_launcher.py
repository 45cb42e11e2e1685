"""hydra/launcher=ray: runs packed on one worker a GPU, over Ray. Thin: Hydra imports it at every start."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra_plugins.lora_sweeper.packed_launcher import PackedLauncher


@dataclass
class RayLauncherConf:
    """See `sweeper.study.ray_workers.RaySettings`."""

    _target_: str = "hydra_plugins.lora_sweeper.ray_launcher.RayLauncher"
    _recursive_: bool = False
    address: str | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="ray", node=RayLauncherConf, provider="lora-atlas")


class RayLauncher(PackedLauncher):
    """As the packed launcher, on many devices."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def our_workers(self) -> Any:
        from sweeper.study import launch

        return launch.on_ray(**self.settings)
