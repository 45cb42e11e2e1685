"""Where curves and summaries go besides the study folder: nowhere, or to one of `sweeper.reporting.trackers`."""

import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sweeper import installation, naming
from sweeper.errors import SpecError, SweeperError, gist, unknown
from sweeper.record import Record
from sweeper.reporting.trackers import TRACKERS
from sweeper.reporting.trackers.log import Begun, OpenLog, RunLog
from sweeper.spec import Settings, to_mapping
from sweeper.training.events import Evaluated, Event, RunFinished, RunQueued, RunStarted, Step

MOST_LOST = 3  # runs in a row
MOST_WAITING = 100_000  # events; a service that is slower than training loses steps from there on
PATIENCE = 60.0  # seconds that a tracker may take at the end over a single event

_HEARD = (RunQueued, RunStarted, Step, Evaluated, RunFinished)


class Tracker:
    """Feeds events to one log a run; several are open at once where runs are packed.

    A thread of its own does so: what a service takes its time over, or does not answer, is no time of training. A run
    whose log raises is not logged any more, and after `MOST_LOST` of them in a row none is begun: no tracker ends a
    sweep.

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
        self.waiting: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.done = 0  # events
        self.behind = False
        self.thread: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        if not isinstance(event, _HEARD):
            return
        if isinstance(event, Step) and self.waiting.qsize() >= MOST_WAITING:
            if not self.behind:
                self.say("tracking: is slower than training, so some steps are not logged")
            self.behind = True
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)
            self.thread.start()
        self.waiting.put(event)

    def close(self) -> None:
        """Waits until all is logged, and ends the logs of runs that were stopped."""
        if self.thread is None:
            return
        self.waiting.put(None)
        done = -1
        while self.thread.is_alive() and done != self.done:
            done = self.done
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.say(f"tracking: no answer in {PATIENCE:g} s; what was not logged by now is in the study folder alone")

    def _work(self) -> None:
        while (event := self.waiting.get()) is not None:
            self._hear(event)
            self.done += 1
        for run_id, log in list(self.logs.items()):
            self._tell(run_id, lambda log=log: log.close({}, failed=True))  # type: ignore[misc]
            self.logs.pop(run_id, None)
            self.done += 1

    def _hear(self, event: Event) -> None:
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
            label, arm = (naming.label(config, self.fields, but) for but in ((), ("seed",)))
            self.logs[run_id] = self.open_log(Begun(run_id=run_id, label=label, arm=arm, config=config))
        return self.logs[run_id]


def make(fields: Sequence[str], settings: Settings, say: Callable[[str], None] = print) -> Tracker | None:
    """The tracker that the settings ask for, of runs told apart by `fields`; None for tracking=none.

    Raises:
        SpecError: its package is there and cannot be used.
    """
    if settings.tracking == "none":
        return None
    options = dict(settings.tracking_options)
    try:
        opener = TRACKERS[settings.tracking].open(settings, options)
    except Exception as error:
        raise SpecError(f"tracking={settings.tracking} cannot be used here: {gist(error)}") from error
    return Tracker(fields, opener, every_steps=options.get("every_steps", 1), say=say)


def check(settings: Settings) -> None:
    """Raises SpecError for a tracker that is unknown, not installed or told something it does not know."""
    if settings.tracking == "none":
        return
    if settings.tracking not in TRACKERS:
        raise SpecError(unknown("tracking", settings.tracking, ["none", *TRACKERS]))
    kind = TRACKERS[settings.tracking]
    package, known = kind.package, (*kind.fields, "every_steps")
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
    kind.check(settings.tracking_options)


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
