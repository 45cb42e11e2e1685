"""`hydra/launcher=forked`: a launcher as Hydra's own are, whose jobs train in processes of their own.

Each is a fork of the driver, so that a worker that is killed costs no import of libraries.
"""

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

WORKERS = 2
MODULE = "hydra_plugins.faults"  # Hydra makes plugins of no other package
_present: list["Forked"] = []


@dataclass
class ForkedConf:
    _target_: str = f"{MODULE}.Forked"


class Forked(Launcher):
    """Runs jobs on two processes; raises when one of them dies, as joblib does."""

    config: DictConfig
    task_function: TaskFunction
    hydra_context: HydraContext

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        _present[:] = [self]
        with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            return list(pool.map(_job, numbers, map(list, job_overrides)))

    def job(self, number: int, overrides: list[str]) -> Any:
        loader = self.hydra_context.config_loader
        config = loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"{number}", number
        found = run_job(
            hydra_context=self.hydra_context, task_function=self.task_function, config=config,
            job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
        )  # fmt: skip
        found.hydra_cfg = found.cfg = None  # what is left travels back by pickle
        return found


def _job(number: int, overrides: list[str]) -> Any:
    return _present[0].job(number, overrides)


def register() -> None:
    ConfigStore.instance().store(group="hydra/launcher", name="forked", node=ForkedConf, provider="tests")
    sys.modules[MODULE], Forked.__module__ = sys.modules[__name__], MODULE
    Plugins.instance().register(Forked)
