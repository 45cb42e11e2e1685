"""Event files in `outputs/STUDY/tensorboard`, a folder a run."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sweeper.record import TENSORBOARD
from sweeper.reporting.trackers.log import Begun, Kind, OpenLog, RunLog
from sweeper.spec import Settings


class _Log:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        for key, value in summary.items():
            if math.isfinite(value):
                self.writer.add_scalar(f"summary/{key}", value)
        self.writer.close()


def _open(settings: Settings, options: Mapping[str, Any]) -> OpenLog:
    from torch.utils.tensorboard import SummaryWriter

    def open_log(run: Begun) -> RunLog:
        name = re.sub(r"[^\w.=+-]+", "_", run.label)
        writer = SummaryWriter(str(settings.folder / TENSORBOARD / f"{name}-{run.run_id}"))
        writer.add_text("config", f"```json\n{json.dumps(run.config, indent=1)}\n```")
        return _Log(writer)

    return open_log


KIND = Kind(package="tensorboard", open=_open)
