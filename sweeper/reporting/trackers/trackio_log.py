"""trackio: an SQLite file a study in `outputs/trackio`, or a Space of the hub.

trackio reads its folder, `TRACKIO_DIR`, once a process, so studies share one; `trackio show` lists them as projects.
"""

import contextvars
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeper.record import ADAPTER, TRACKIO
from sweeper.reporting.trackers.log import Begun, Kind, Onward, OpenLog, RunLog
from sweeper.spec import Settings


class TrackioFailed(Exception):
    """What trackio only warns of: values that it could not keep."""


class _Log:
    def __init__(self, run: Any, new: Onward, failures: deque[str]) -> None:
        self.run, self.new, self.failures = run, new, failures

    def log(self, values: Mapping[str, float], step: int) -> None:
        if fresh := self.new(values, step):
            self.run.log(fresh, step=step)
        self._check()

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        if summary:
            self.run.log({f"summary/{name}": value for name, value in summary.items()})
        self.run.finish()
        self._check()

    def _check(self) -> None:
        if self.failures:
            raise TrackioFailed(self.failures.popleft())


def _open(settings: Settings, options: Mapping[str, Any]) -> OpenLog:
    os.environ.setdefault("TRACKIO_DIR", str(Path(settings.output_root).absolute() / TRACKIO))
    import trackio

    study, failures = settings.folder.absolute(), _hushed(trackio)
    project = options.get("project") or settings.study.replace("/", "-")

    def open_log(run: Begun) -> RunLog:
        name = f"{run.label} {run.run_id}"  # trackio finds a run again by its name
        last = _last_steps(project, name)
        known = {"run_id": run.run_id, "study": settings.study, "arm": run.arm}
        # trackio ends the current run where another begins; a context of its own has none
        opened = contextvars.Context().run(
            trackio.init, project, name=name, group=run.arm, space_id=options.get("space"), resume="allow",
            config={**known, ADAPTER: str(study / run.run_id / ADAPTER), **run.config}, embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        return _Log(opened, Onward(last), failures)

    return open_log


def _last_steps(project: str, name: str) -> dict[str, int]:
    """Metric -> the last step at which the run of this name has a value in trackio's file."""
    from trackio.sqlite_storage import SQLiteStorage

    last: dict[str, int] = {}
    for row in SQLiteStorage.get_logs(project, name):
        for key in row.keys() - {"step", "timestamp"}:
            last[key] = max(int(row["step"]), last.get(key, -1))
    return last


def _hushed(trackio: Any) -> deque[str]:
    """Keeps trackio from printing over the live view; returns where its warnings of lost values gather."""
    from trackio import run, utils

    failures: deque[str] = deque(maxlen=1)
    for module in (trackio, run, utils):
        vars(module)["print"] = lambda *_, **__: None
    for module in (trackio, run):
        vars(module)["_emit_nonfatal_warning"] = lambda message, *_, **__: failures.append(message)
    return failures


KIND = Kind(package="trackio", fields=("project", "space"), open=_open)
