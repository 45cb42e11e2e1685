"""Where curves and summaries go besides the study folder: nowhere, Weights & Biases, TensorBoard."""

import functools
import importlib.util
import json
import math
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sweeper import installation, naming
from sweeper.errors import SpecError, SweeperError, first_line, gist, unknown
from sweeper.record import TENSORBOARD, WANDB_ID, Record, write_json
from sweeper.redaction import without_credentials
from sweeper.spec import Settings, to_mapping
from sweeper.training.events import Evaluated, Event, RunFinished, RunQueued, RunStarted, Step


class RunLog(Protocol):
    """One run in a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None: ...


WANDB_MODES = ("offline", "online", "shared", "disabled")

MOST_LOST = 3  # runs in a row

OpenLog = Callable[[str, str, Mapping[str, Any]], RunLog]
"""(run id, label, configuration) -> log"""


class Tracker:
    """Feeds events to one log a run; several are open at once where runs are packed.

    A run whose log raises is not logged any more, and after `MOST_LOST` of them in a row none is begun: no tracker
    ends a sweep.

    Args:
        fields: what runs are named by, besides placement and rank.
        say: is told, a line each, what is not logged.
    """

    def __init__(
        self, fields: Sequence[str], open_log: OpenLog, *, every_steps: int = 1, say: Callable[[str], None] = print
    ) -> None:
        self.fields, self.say = fields, say
        self.lost: set[str] = set()
        self.in_a_row = 0
        self.configs: dict[str, Mapping[str, Any]] = {}
        self.open_log, self.every_steps = open_log, every_steps
        self.logs: dict[str, RunLog] = {}
        self.steps: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case RunQueued(run_id=run_id, spec=spec):
                self.configs[run_id] = to_mapping(spec)
            case RunStarted(run_id=run_id):
                self._tell(run_id, lambda: None)
            case Step(run_id=run_id, step=step):
                self.steps[run_id] = step
                if step % self.every_steps == 0 or step == 1:
                    values = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}
                    if event.seconds > 0:
                        values["tokens_per_second"] = event.tokens / event.seconds
                        values["answer_tokens_per_second"] = event.answer_tokens / event.seconds
                    named = {f"train/{key}": value for key, value in values.items()}
                    self._tell(run_id, lambda: self._log(run_id).log(named, step))
            case Evaluated(run_id=run_id, split=split, score=score):
                values = {"nll": score.nll, "perplexity": score.perplexity, **score.metrics}
                named = {f"{split}/{key}": value for key, value in values.items()}
                self._tell(run_id, lambda: self._log(run_id).log(named, self.steps.get(run_id, 0)))
            case RunFinished(record=record):
                failed = record.status == "failed"
                self._tell(record.run_id, lambda: self._log(record.run_id).close(summary(record), failed=failed))
                if self.logs.pop(record.run_id, None) is not None:
                    self.in_a_row = 0
            case _:
                pass

    def close(self) -> None:
        """Ends the logs of runs that were stopped."""
        for run_id, log in list(self.logs.items()):
            self._tell(run_id, functools.partial(log.close, {}, failed=True))
            self.logs.pop(run_id, None)

    def _tell(self, run_id: str, what: Callable[[], None]) -> None:
        """Has something logged, if the run still is."""
        if run_id in self.lost or (run_id not in self.logs and self.in_a_row >= MOST_LOST):
            return
        try:
            self._log(run_id)
            what()
        except Exception as error:
            self.lost.add(run_id)
            self.logs.pop(run_id, None)
            self.in_a_row += 1
            more = "; nor are runs that begin later" if self.in_a_row >= MOST_LOST else ""
            kind = "" if isinstance(error, SweeperError) else f"{type(error).__name__}: "
            self.say(f"tracking: {run_id} is not logged from here on ({kind}{gist(error)}){more}")

    def _log(self, run_id: str) -> RunLog:
        if run_id not in self.logs:
            config = self.configs[run_id]
            self.logs[run_id] = self.open_log(run_id, naming.label(config, self.fields), config)
        return self.logs[run_id]


def make(fields: Sequence[str], settings: Settings, say: Callable[[str], None] = print) -> Tracker | None:
    """The tracker that the settings ask for, of runs told apart by `fields`; None for tracking=none.

    Raises:
        SpecError: its package is there and cannot be used.
    """
    if settings.tracking == "none":
        return None
    _, _, open_log = TRACKERS[settings.tracking]
    options = dict(settings.tracking_options)
    try:
        opener = open_log(settings.folder, options)
    except Exception as error:
        raise SpecError(f"tracking={settings.tracking} cannot be used here: {gist(error)}") from error
    return Tracker(fields, opener, every_steps=options.get("every_steps", 1), say=say)


def check(settings: Settings) -> None:
    """Raises SpecError for a tracker that is unknown, not installed or told something it does not know."""
    if settings.tracking == "none":
        return
    if settings.tracking not in TRACKERS:
        raise SpecError(unknown("tracking", settings.tracking, ["none", *TRACKERS]))
    package, known, _ = TRACKERS[settings.tracking]
    if importlib.util.find_spec(package) is None:
        raise SpecError(
            f"tracking={settings.tracking} needs the package {package}: {installation.install(settings.tracking)}, "
            "or tracking=none"
        )
    for name in settings.tracking_options:
        if name not in known:
            raise SpecError(f"tracking.{name}: no such field. Choose from {', '.join(known)}.")
    every = settings.tracking_options.get("every_steps", 1)
    if not isinstance(every, int) or every < 1:
        raise SpecError(f"tracking.every_steps must be a whole number of at least 1, got {every}")
    if settings.tracking == "wandb":
        _check_wandb(settings.tracking_options.get("mode", "offline"))


def _check_wandb(mode: Any) -> None:
    if mode not in WANDB_MODES:
        raise SpecError(f"tracking.mode={mode}: no such mode of wandb. Choose from {', '.join(WANDB_MODES)}.")
    if mode == "online":
        import wandb

        try:
            known = wandb.login(prompt=False)
        except wandb.errors.Error:
            known = False
        if not known:
            raise SpecError("tracking.mode=online: wandb knows no account here: wandb login, or WANDB_MODE=offline")


def summary(record: Record) -> dict[str, float]:
    """The numbers of a record that a tracker lists runs by."""
    cost = record.efficiency
    values: dict[str, float | None] = {
        "trainable_parameters": record.trainable_parameters,
        "steps": record.steps,
        "train_seconds": cost.train_seconds_amortised,
        "train_flops": cost.train_flops,
        "adapter_bytes": cost.adapter_bytes,
        "peak_memory_bytes": cost.peak_memory_solo_bytes or cost.pack_peak_memory_bytes,
    }
    for split, phases in record.scores.items():
        for phase, score in phases.items():
            for name, value in {"nll": score.nll, "perplexity": score.perplexity, **score.metrics}.items():
                values[f"{split}/{name}_{phase}"] = value
    return {key: value for key, value in values.items() if value is not None}


def _wandb(study: Path, options: Mapping[str, Any]) -> OpenLog:
    import wandb

    folder = study.absolute()

    class Log:
        def __init__(self, run: Any) -> None:
            self.run = run

        def log(self, values: Mapping[str, float], step: int) -> None:
            self.run.log(dict(values), step=step)

        def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
            self.run.summary.update(dict(summary))
            self.run.finish(exit_code=int(failed))

    def open_log(run_id: str, label: str, config: Mapping[str, Any]) -> RunLog:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                id=_wandb_id(folder / run_id),
                resume="allow",  # a run that was cut off goes on where it is shown already
                allow_val_change=True,
                project=options.get("project"),
                entity=options.get("entity"),
                mode=options.get("mode"),
                dir=str(folder),
                group=study.name,
                name=label,
                config={"run_id": run_id, **config},
                reinit="create_new",  # a pack has several runs in one process
                # what wandb notes of a process has its command in it
                settings=wandb.Settings(silent=True, x_disable_meta=_has_secrets(sys.argv)),
            )
        except wandb.errors.Error as error:
            reason = first_line(error)
            raise SpecError(
                f"tracking=wandb cannot begin a run: {reason}. WANDB_MODE=offline needs no network."
            ) from error
        return Log(run)

    return open_log


def _has_secrets(arguments: Sequence[str]) -> bool:
    typed = " ".join(arguments)
    return without_credentials(typed, typed=True) != typed


def _wandb_id(folder: Path) -> str:
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


def _tensorboard(study: Path, options: Mapping[str, Any]) -> OpenLog:
    from torch.utils.tensorboard import SummaryWriter

    class Log:
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

    def open_log(run_id: str, label: str, config: Mapping[str, Any]) -> RunLog:
        name = re.sub(r"[^\w.=+-]+", "_", label)
        writer = SummaryWriter(str(study / TENSORBOARD / f"{name}-{run_id}"))
        writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")
        return Log(writer)

    return open_log


TRACKERS: Mapping[str, tuple[str, tuple[str, ...], Callable[[Path, Mapping[str, Any]], OpenLog]]] = {
    "tensorboard": ("tensorboard", ("every_steps",), _tensorboard),
    "wandb": ("wandb", ("mode", "project", "entity", "every_steps"), _wandb),
}
"""name -> package, known options, opener"""
