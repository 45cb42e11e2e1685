"""What all that trains for one command shares: its settings and device, when to stop, where the time went."""

from collections.abc import Callable
from typing import Any

from sweeper.device import device_for
from sweeper.engine import environment
from sweeper.engine.events import RunFinished
from sweeper.engine.pack import Pack
from sweeper.engine.progress import Progress
from sweeper.engine.timeline import Timeline
from sweeper.models.files import cache_folder
from sweeper.spec import Settings


class Context:
    """Settings, device, cache and clock of one command on one device."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        self.settings, self.should_stop = settings, should_stop
        self.device = device_for(settings.device)
        self.cache = cache_folder()
        self.timeline = Timeline()

    def environment(self, pack: Pack | None) -> dict[str, Any]:
        """What runs of a pack are made with, for their records."""
        described = environment.describe(self.device, None if pack is None else next(pack.model.parameters()).dtype)
        return described if pack is None else described | {"compiled": pack.compiled}

    def failed(self, progress: Progress, error: BaseException) -> RunFinished:
        """Records that a run failed."""
        return RunFinished(record=progress.write_failure(self.settings, error, self.environment(None)))
