"""Weights & Biases: files in `outputs/STUDY/wandb`, sent as they come or by `wandb sync`."""

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeper.errors import SpecError, first_line
from sweeper.record import WANDB_ID, write_json
from sweeper.redaction import without_credentials
from sweeper.reporting.trackers.log import Begun, Kind, OpenLog, RunLog
from sweeper.spec import Settings

MODES = ("offline", "online", "shared", "disabled")


class _Log:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=int(failed))


def _open(settings: Settings, options: Mapping[str, Any]) -> OpenLog:
    import wandb

    folder = settings.folder.absolute()

    def open_log(run: Begun) -> RunLog:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            opened = wandb.init(
                id=run_id_of(folder / run.run_id),
                resume="allow",  # a run that was cut off goes on where it is shown already
                allow_val_change=True,
                project=options.get("project"),
                entity=options.get("entity"),
                mode=options.get("mode"),
                dir=str(folder),
                group=folder.name,
                name=run.label,
                config={"run_id": run.run_id, **run.config},
                reinit="create_new",  # a pack has several runs in one process
                # what wandb notes of a process has its command in it
                settings=wandb.Settings(silent=True, x_disable_meta=_has_secrets(sys.argv)),
            )
        except wandb.errors.Error as error:
            reason = first_line(error)
            raise SpecError(
                f"tracking=wandb cannot begin a run: {reason}. WANDB_MODE=offline needs no network."
            ) from error
        return _Log(opened)

    return open_log


def _check(options: Mapping[str, Any]) -> None:
    mode = options.get("mode", "offline")
    if mode not in MODES:
        raise SpecError(f"tracking.mode={mode}: no such mode of wandb. Choose from {', '.join(MODES)}.")
    if mode == "online":
        import wandb

        try:
            known = wandb.login(prompt=False)
        except wandb.errors.Error:
            known = False
        if not known:
            raise SpecError("tracking.mode=online: wandb knows no account here: wandb login, or WANDB_MODE=offline")


def _has_secrets(arguments: Sequence[str]) -> bool:
    typed = " ".join(arguments)
    return without_credentials(typed, typed=True) != typed


def run_id_of(folder: Path) -> str:
    """The id of a run in Weights & Biases, kept in the run's folder from its first start on."""
    path = folder / WANDB_ID
    try:
        found = json.loads(path.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if isinstance(found, str) and found:
        return found
    chosen = secrets.token_hex(4)
    write_json(path, {"id": chosen})
    return chosen


KIND = Kind(package="wandb", fields=("mode", "project", "entity"), open=_open, check=_check)
