"""What all that trains for one command shares: its settings and device, when to stop, where the time went."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sweeper import lost
from sweeper.device import device_for
from sweeper.engine import environment
from sweeper.engine.events import RunFinished
from sweeper.engine.failure import Failure
from sweeper.engine.pack import Pack
from sweeper.engine.progress import Progress
from sweeper.engine.timeline import Timeline
from sweeper.lost import ContextLost
from sweeper.models.files import cache_folder
from sweeper.spec import Settings


class Context:
    """Settings, device, cache and clock of one command on one device."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        self.settings, self.should_stop = settings, should_stop
        self.device = device_for(settings.device)
        self.cache = cache_folder()
        self.timeline = Timeline()
        self.bare = environment.describe(self.device, None)  # now: a GPU that is lost says nothing of itself

    def environment(self, pack: Pack | None) -> dict[str, Any]:
        """What runs of a pack are made with, for their records."""
        if pack is None:
            return self.bare
        described = environment.describe(self.device, next(pack.model.parameters()).dtype)
        return described | {"compiled": pack.compiled}

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
            return True
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except Exception:
            return True
        return False
