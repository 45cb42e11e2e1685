"""What all that trains for one command shares: its settings and device, when to stop, where the time went."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sweeper import lost
from sweeper.cache import cache_folder
from sweeper.device import device_for, fix_precision, precision_for, precision_name
from sweeper.lost import ContextLost
from sweeper.spec import RunSpec, Settings
from sweeper.training import environment
from sweeper.training.events import RunFinished
from sweeper.training.failure import Failure
from sweeper.training.pack import Pack
from sweeper.training.progress import Progress
from sweeper.training.timeline import Timeline


class Context:
    """Settings, device, cache and clock of one command on one device."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        self.settings, self.should_stop = settings, should_stop
        self.device = device_for(settings.device)
        self.cache = cache_folder()
        self.timeline = Timeline()
        self.bare = environment.describe(self.device, None)  # now: a GPU that is lost says nothing of itself

    def dtype(self, spec: RunSpec) -> torch.dtype:
        """What a run computes in: of those in a study that leave it to us, what the first one had.

        Raises:
            SpecError: this device cannot compute in it.
        """
        return precision_for(self.device, spec.trainer.precision, study=self.settings.folder)

    def fixed_dtype(self, spec: RunSpec, dtype: torch.dtype) -> torch.dtype:
        """As `dtype`, which is fixed for the study from now on; another driver may have fixed it meanwhile."""
        if spec.trainer.precision != "auto":
            return dtype
        fix_precision(self.settings.folder, precision_name(dtype))
        return self.dtype(spec)

    def environment(self, pack: Pack | None) -> dict[str, Any]:
        """What runs of a pack are made with, for their records."""
        if pack is None:
            return self.bare
        described = environment.describe(self.device, next(pack.model.parameters()).dtype)
        attention = getattr(pack.base.model.config, "_attn_implementation", None)
        return described | {"compiled": pack.compiled, "attention": attention}

    def failed(self, progress: Progress, failure: Failure) -> RunFinished:
        """Records that a run failed."""
        return RunFinished(record=progress.write_failure(self.settings, failure, self.environment(None)))

    def failure(self, error: BaseException) -> Failure:
        """What a run raised; of the class `ContextLost` where the device went with it."""
        found = Failure.of(error)
        return dataclasses.replace(found, kind=ContextLost.__name__) if self.lost(error) else found

    def lost(self, error: BaseException) -> bool:
        """Whether the device can be used no more by this process."""
        if lost.is_sign(error):
            lost.hold(error)
            return True
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except Exception:
            lost.hold(error)
            return True
        return False
