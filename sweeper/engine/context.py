"""What all that trains for one command shares: its settings and device, when to stop, where the time went."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sweeper.device import device_for, fix_precision, precision_for, precision_name
from sweeper.engine import environment
from sweeper.engine.events import RunFinished
from sweeper.engine.pack import Pack
from sweeper.engine.progress import Progress
from sweeper.engine.timeline import Timeline
from sweeper.models.files import cache_folder
from sweeper.spec import RunSpec, Settings

if TYPE_CHECKING:
    import torch


class Context:
    """Settings, device, cache and clock of one command on one device."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        self.settings, self.should_stop = settings, should_stop
        self.device = device_for(settings.device)
        self.cache = cache_folder()
        self.timeline = Timeline()

    def dtype(self, spec: RunSpec) -> "torch.dtype":
        """What a run computes in: of those in a study that leave it to us, what the first one had.

        Raises:
            SpecError: this device cannot compute in it.
        """
        return precision_for(self.device, spec.trainer.precision, study=self.settings.folder)

    def fixed_dtype(self, spec: RunSpec, dtype: "torch.dtype") -> "torch.dtype":
        """As `dtype`, which is fixed for the study from now on; another driver may have fixed it meanwhile."""
        if spec.trainer.precision != "auto":
            return dtype
        fix_precision(self.settings.folder, precision_name(dtype))
        return self.dtype(spec)

    def environment(self, pack: Pack | None) -> dict[str, Any]:
        """What runs of a pack are made with, for their records."""
        described = environment.describe(self.device, None if pack is None else next(pack.model.parameters()).dtype)
        if pack is None:
            return described
        attention = getattr(pack.base.model.config, "_attn_implementation", None)
        return described | {"compiled": pack.compiled, "attention": attention}

    def failed(self, progress: Progress, error: BaseException) -> RunFinished:
        """Records that a run failed."""
        return RunFinished(record=progress.write_failure(self.settings, error, self.environment(None)))
