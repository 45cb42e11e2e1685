"""From requests to records: loads base models, forms packs, drives them, and writes what each run leaves."""

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from sweeper import methods, models
from sweeper.device import precision_for
from sweeper.engine import calibrate, compilation, export
from sweeper.engine.ahead import ahead
from sweeper.engine.bank.alone import AloneSpec
from sweeper.engine.bank.forms import Capacity
from sweeper.engine.batches import distinct_lengths
from sweeper.engine.context import Context
from sweeper.engine.drive import Drive, Made
from sweeper.engine.events import Event, Stage
from sweeper.engine.loaded import Loaded
from sweeper.engine.memory import MOST, runs_that_fit
from sweeper.engine.pack import Pack, verified_head
from sweeper.engine.progress import Prepared, Progress
from sweeper.engine.requests import Kind, RunRequest, Source
from sweeper.engine.run_queue import RunQueue, pack_key_of
from sweeper.engine.sharing import model_key
from sweeper.errors import SweeperError
from sweeper.models import BaseModel
from sweeper.models.architecture import number_of_layers
from sweeper.spec import RunSpec, Settings

REFUSED_AT_ONCE = 64
IDLE_SECONDS = 0.2  # between questions for work, while others have all there is
AHEAD = 10_000  # events that may wait to be seen to; a step of a pack of 64 makes 64


def in_background(device: torch.device) -> bool:
    """Whether training has a thread of its own: on a CPU it would only compete with those that see to its events."""
    return device.type == "cuda"


def most_at_once(kinds: Sequence[Kind], strays: Sequence[Prepared]) -> int:
    """Runs of these kinds that may come to train here at the same time."""
    share = min((kind.share for kind in kinds), default=0)
    return int(min(sum(kind.most for kind in kinds), share)) + len(strays)


class Session:
    """What one device trains for one command. `train` is the whole interface."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        self.context = Context(settings, should_stop)
        self.loaded: Loaded | None = None
        self.strays: list[RunRequest] = []  # handed out for a pack they could not join: a tuned batch size, say

    def train(self, source: Source) -> Iterator[Event]:
        """Trains what a source has, model by model, pack by pack; says at the end where the time went.

        On a GPU it goes on training meanwhile, so that the device need not wait while records are written and trials
        judged.
        """
        made = self._train(source)
        for item in ahead(made, AHEAD) if in_background(self.context.device) else made:
            event = item() if callable(item) else item
            if event is not None:
                yield event
        yield Stage(message=f"time: {self.context.timeline}")

    def _train(self, source: Source) -> Iterator[Made]:
        if in_background(self.context.device):
            gc.freeze()  # or the many objects of the imports are looked through in the middle of training
            yield export.get_ready
        more = True
        while more and not self.context.should_stop():
            more = yield from self._turn(source)

    def _turn(self, source: Source) -> Generator[Made, None, bool]:
        """Trains runs of one model that can share a pack; returns False where there are none left."""
        kinds = list(source.outlook())
        # strays first: what is yet to come may wait for them
        specs = [request.spec for request in self.strays] or [kind.spec for kind in kinds]
        wanted = sorted({model_key(spec) for spec in specs})
        if not wanted:
            return False
        key = self.loaded.key if self.loaded is not None and self.loaded.key in wanted else wanted[0]
        kinds = [kind for kind in kinds if model_key(kind.spec) == key]
        strays = [request for request in self.strays if model_key(request.spec) == key]
        loaded = yield from self._load(key, (kinds or strays)[0].spec)
        if isinstance(loaded, Exception):
            yield from self._refuse(source, kinds, strays, loaded)
            return True
        groups = yield from self._alike(loaded, source, kinds, strays)
        while loaded.remarks:
            yield loaded.remarks.pop(0)
        if groups:
            moved = yield from self._train_alike(loaded, source, *groups[0])
            if not moved:
                time.sleep(IDLE_SECONDS)
        return True

    def _load(self, key: str, spec: RunSpec) -> Generator[Made, None, Loaded | Exception]:
        """The base model of a key, in place of the former one; or why it cannot be had."""
        if self.loaded is not None and self.loaded.key == key:
            return self.loaded
        yield Stage(message=models.loading_message(spec.model))
        try:
            dtype = precision_for(self.context.device, spec.trainer.precision)
            self.loaded = None  # its memory is free before the next one is read
            with self.context.timeline.span("load"):
                base = methods.load_base(spec, dtype=dtype, device=self.context.device)
                verified_head(base)
        except (SweeperError, OSError, torch.OutOfMemoryError) as error:
            return error.with_traceback(None)
        self.loaded = Loaded(base, key, self.context)
        return self.loaded

    def _refuse(
        self, source: Source, kinds: Sequence[Kind], strays: Sequence[RunRequest], error: Exception
    ) -> Iterator[Made]:
        """Records every run of some kinds as failed."""
        keys = {kind.key for kind in kinds}
        self.strays = [request for request in self.strays if request not in strays]
        found = list(strays)
        while found or (found := list(source.pull(REFUSED_AT_ONCE, keys).requests)):
            for request in found:
                yield self.context.failed(Progress(request), error)
            found = []

    def _alike(
        self, loaded: Loaded, source: Source, kinds: Sequence[Kind], strays: Sequence[RunRequest]
    ) -> Generator[Made, None, list[tuple[dict[str, Any], list[Kind], list[Prepared], list[Prepared]]]]:
        """What can share a pack: its options, kinds, a run prepared of each, and prepared strays; those first."""
        groups: dict[tuple[Any, ...], tuple[list[Kind], list[Prepared], list[Prepared]]] = {}
        for kind in kinds:
            sample = RunRequest(run_id=kind.spec.run_id, spec=kind.spec, folder=self.context.settings.folder / "-")
            if loaded.unprobed(kind.spec):
                yield Stage(message=f"probing which modules matter on {kind.spec.dataset.name}")
            try:
                run = loaded.prepare(sample)
            except (SweeperError, ValueError) as error:
                yield from self._refuse(source, [kind], [], error)
                continue
            members = groups.setdefault(pack_key_of(run), ([], [], []))
            members[0].append(kind)
            members[1].append(run)
            for spec in kind.others:
                with contextlib.suppress(SweeperError, ValueError):
                    members[1].append(loaded.prepare(dataclasses.replace(sample, run_id=spec.run_id, spec=spec)))
        for request in strays:
            try:
                run = loaded.prepare(request)
            except (SweeperError, ValueError) as error:
                yield from self._refuse(source, [], [request], error)
                continue
            groups.setdefault(pack_key_of(run), ([], [], []))[2].append(run)
        return [(dict(key), *groups[key]) for key in sorted(groups, key=lambda key: (not groups[key][2], key))]

    def _train_alike(
        self, loaded: Loaded, source: Source, options: dict[str, Any], kinds: list[Kind], probes: list[Prepared],
        strays: list[Prepared],
    ) -> Generator[Made, None, bool]:  # fmt: skip
        """Trains runs that can share a pack, in as many packs as memory asks for; returns whether there were any."""
        base, key = loaded.base, tuple(options.items())
        alone = bool(options["alone"])
        options = {name: value for name, value in options.items() if name not in ("length", "alone")}
        samples = [*strays, *probes]
        options["lengths_vary"] = distinct_lengths([len(e.input_ids) for run in samples for e in run.job.examples]) > 1
        queue = RunQueue(loaded, source, kinds, key, strays)
        taken = {run.request.run_id for run in strays}
        self.strays = [request for request in self.strays if request.run_id not in taken]
        at_once = 1 if alone else most_at_once(kinds, strays)
        options |= self._compilation(base, kinds, strays, samples, options["lengths_vary"])
        solo: dict[str, calibrate.Solo] = {}
        if self.context.settings.calibrate and queue.want(1):
            yield from self._calibrate(base, samples, options, solo)
        measured = [(run, solo.get(run.shape)) for run in samples]
        limit = runs_that_fit(base, measured, self.context.settings, self.context.device, at_once=at_once)
        moved = False
        while queue.want(max(limit, 1)) and not self.context.should_stop():
            moved = True
            overfull = yield from self._train_pack(loaded, queue, limit, options, solo, probes)
            if overfull:
                limit = overfull // 2
        yield from queue.problems()
        self.strays += queue.aside
        return moved

    def _compilation(
        self, base: BaseModel, kinds: Sequence[Kind], strays: Sequence[Prepared], samples: Sequence[Prepared],
        lengths_vary: bool,
    ) -> dict[str, bool]:  # fmt: skip
        """Whether layers are compiled and steps captured, on CUDA. A run alone is measured uncompiled in any case."""
        chosen = self.context.settings.compile
        if self.context.device.type != "cuda" or chosen == "off":
            return {"compiled": False, "captured": False}
        passes = sum(kind.left * kind.spec.trainer.max_steps * kind.spec.trainer.accumulation for kind in kinds)
        passes += sum(run.job.steps * run.request.spec.trainer.accumulation for run in strays)
        together = max(1, min(self.context.settings.max_pack or MOST, most_at_once(kinds, strays)))
        lengths = [len(example.input_ids) for run in samples for example in run.job.examples[:1000]]
        pays = compilation.pays(
            passes / together, layers=number_of_layers(base.targets),
            width=base.model.config.get_text_config().hidden_size,
            tokens=together * samples[0].request.spec.trainer.batch_size * sum(lengths) / len(lengths),
            lengths_vary=lengths_vary,
        )  # fmt: skip
        return {"compiled": chosen == "on" or (chosen == "auto" and pays), "captured": True}

    def _calibrate(self, base, queue, options, solo) -> Iterator[Made]:
        for run in queue:
            if run.shape in solo or run.job.steps == 0 or self.context.should_stop():
                continue
            spec = run.request.spec
            method = "" if spec.method.name == "lora" else f", {spec.method.name},"
            yield Stage(message=f"measuring {spec.placement.name} rank {spec.rank}{method} alone")
            try:
                with self.context.timeline.span("measure alone"):
                    solo[run.shape] = calibrate.measure(
                        base, run.job, options | {"compiled": False}, self.context.cache / "calibrations"
                    )
            except (RuntimeError, SweeperError):  # out of memory is one; training meets it again and records it
                continue

    def _train_pack(
        self, loaded: Loaded, queue: RunQueue, limit: int, options, solo, probes: Sequence[Prepared]
    ) -> Generator[Made, None, int]:
        """Trains one pack until nothing is left for it. Returns 0, or the number of runs that did not fit together.

        A `limit` of 0 asks for a slot that holds the first run and nothing larger.
        """
        waiting = queue.waiting
        first = waiting[0].job.adapter
        exact = limit == 0 or isinstance(first, AloneSpec) or (len(waiting) <= limit and not queue.more)
        capacities: list[Capacity] | AloneSpec
        if isinstance(first, AloneSpec):
            slots, capacities = 1, first
        elif exact:
            slots = min(max(limit, 1), len(waiting))
            capacities = [run.capacity for run in itertools.islice(waiting, slots)]
        else:  # a slot changes hands: it must hold whichever run comes next
            slots = limit
            capacities = [Capacity.union(run.capacity for run in (*waiting, *probes))] * slots
        running: dict[str, Progress] = {}
        try:
            with self.context.timeline.span("set up"):
                pack = Pack(loaded.base, capacities, **options)
            drive = Drive(loaded, pack, queue, solo)
            running = drive.running
            with pack, loaded.packed():
                try:
                    yield from drive.fill()
                    yield from drive.go()
                except torch.OutOfMemoryError:  # what failed moved nothing: every run goes on from where it is
                    for result in pack.drain():
                        yield running[result.job.run_id].note_step(result, 0.0)
                    yield from drive.checkpoint()
                    raise
            return 0
        except (RuntimeError, SweeperError) as error:
            problem = error.with_traceback(None)  # its frames would keep the pack's memory
        self._free_memory()
        if not running and exact and slots == 1:
            run = waiting.popleft()
            yield self.context.failed(Progress(run.request, run), problem)
            return 0
        return (yield from self._recover(queue, running, problem, slots))

    def _recover(
        self, queue: RunQueue, running: dict[str, Progress], error: Exception, slots: int
    ) -> Generator[Made, None, int]:
        """Runs of a pack that broke go back to the queue from their last good step; a run alone has failed."""
        if len(running) == 1:
            (alone,) = running.values()
            yield self.context.failed(alone, error)
            return 0
        for progress in reversed(running.values()):
            progress.prepared.rewind()
            queue.waiting.appendleft(progress.prepared)
        size = len(running) or slots
        what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}"
        yield Stage(message=f"{what} with {size} runs together; going on with {max(1, size // 2)}")
        return size

    def _free_memory(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
