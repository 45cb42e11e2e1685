"""What all that trains for one command shares: its settings and device, who listens, when to stop, where time went."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from sweeper import lost
from sweeper.cache import cache_folder
from sweeper.device import device_for, fix_precision, precision_for, precision_name, trim
from sweeper.lost import ContextLost
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings
from sweeper.training import environment
from sweeper.training.events import Event, RunFinished
from sweeper.training.failure import Failure
from sweeper.training.pack import Pack
from sweeper.training.results import write_failure
from sweeper.training.run_state import RunState, now
from sweeper.training.timeline import Timeline
from sweeper.training.writer import Writer

TRIM_SECONDS = 10.0  # at least, between two times that freed memory goes back to the system: each takes about 50 ms


class Context:
    """Settings, device, cache, clock and writer of one command on one device."""

    def __init__(
        self, settings: Settings, listen: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> None:  # fmt: skip
        self.settings, self.should_stop = settings, should_stop
        self.device = device_for(settings.device)
        self.cache = cache_folder()
        self.timeline = Timeline()
        self.writer = Writer(listen, background=self.device.type == "cuda")
        self.trimmed = time.monotonic()
        self.bare = environment.describe(self.device, None)  # now: a GPU that is lost says nothing of itself

    def trim(self) -> None:
        """Gives freed memory of a CPU's training back to the system, where that was not done for some time."""
        now = time.monotonic()
        if self.device.type == "cpu" and now - self.trimmed > TRIM_SECONDS:
            trim()
            self.trimmed = now

    def emit(self, event: Event) -> None:
        """Has an event heard by all that listen."""
        self.writer.emit(event)

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

    def environment(self, pack: Pack) -> dict[str, Any]:
        """What runs of a pack are made with, for their records."""
        described = environment.describe(self.device, next(pack.model.parameters()).dtype)
        attention = getattr(pack.base.model.config, "_attn_implementation", None)
        return described | {"compiled": pack.compiled, "attention": attention, "fused": pack.decoder is not None}

    def failed(self, run: Run, failure: Failure, *, steps: int, started: str) -> RunFinished:
        """Records that a run failed."""
        return RunFinished(record=write_failure(run, failure, self.settings, self.bare, steps=steps, started=started))

    def fail(self, run: Run, failure: Failure, state: RunState | None = None) -> None:
        """Has it recorded that a run failed, after what there is of its steps."""
        steps, started = (0, now()) if state is None else (state.done, state.started)
        self.writer.write(functools.partial(self.failed, run, failure, steps=steps, started=started))

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
