"""From requests to records: loads base models, forms packs, drives them, and writes what each run leaves."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sweeper import identity, lost, methods, models
from sweeper.device import precision_for, precision_name
from sweeper.errors import first_line, gist
from sweeper.lora.forms import Capacity
from sweeper.lora.trainee import UnpackedSpec
from sweeper.lost import ContextLost
from sweeper.models import BaseModel
from sweeper.models.architecture import number_of_layers
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings
from sweeper.training import calibrate, compilation, export, suspects
from sweeper.training.ahead import ahead
from sweeper.training.batches import distinct_lengths
from sweeper.training.context import Context
from sweeper.training.drive import Drive, Made, halved
from sweeper.training.events import Event, Stage
from sweeper.training.failure import MEMORY, Failure
from sweeper.training.loaded import Loaded
from sweeper.training.memory import MOST, runs_that_fit
from sweeper.training.pack import Pack
from sweeper.training.progress import Prepared, Progress
from sweeper.training.run_queue import RunQueue, pack_key_of
from sweeper.training.sharing import model_key
from sweeper.training.source import PendingGroup, Source

REFUSED_AT_ONCE = 64
IDLE_SECONDS = 0.2  # between questions for work, while others have all there is
AHEAD = 10_000  # events that may wait to be seen to; a step of a pack of 64 makes 64


def in_background(device: torch.device) -> bool:
    """Whether training has a thread of its own: on a CPU it would only compete with those that see to its events."""
    return device.type == "cuda"


def most_at_once(kinds: Sequence[PendingGroup], strays: Sequence[Prepared]) -> int:
    """Runs of these kinds that may come to train here at the same time."""
    share = min((kind.share for kind in kinds), default=0)
    return int(min(sum(kind.most for kind in kinds), share)) + len(strays)


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A pack that broke.

    Attributes:
        runs: those that were in it, back at their last good state; none where the only one has failed.
        until: run id -> the steps after which it has come further than it was.
        size: how many there were room for.
    """

    failure: Failure
    memory: bool = False
    runs: Sequence[Prepared] = ()
    until: Mapping[str, int] = dataclasses.field(default_factory=dict)
    size: int = 1


class Session:
    """What one device trains for one command. `train` is the whole interface."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        lost.check()
        self.context = Context(settings, should_stop)
        self.loaded: Loaded | None = None
        self.queue: RunQueue | None = None
        self.measures = settings.calibrate and lost.former().measure
        self.strays: list[Run] = []  # handed out for a pack they could not join: a tuned batch size, say

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
        try:
            while more and not self.context.should_stop():
                more = yield from self._turn(source)
        except ContextLost as error:
            lost.give_up(error.reason)
            raise
        except Exception as error:
            if not self.context.lost(error):
                raise
            lost.give_up(first_line(error))
            if self.queue is not None:
                yield from self.queue.problems()
            raise ContextLost(first_line(error)) from error

    def _turn(self, source: Source) -> Generator[Made, None, bool]:
        """Trains runs of one model that can share a pack; returns False where there are none left."""
        kinds = list(source.pending())
        # strays first: what is yet to come may wait for them
        specs = [request.spec for request in self.strays] or [kind.spec for kind in kinds]
        wanted = sorted({model_key(spec) for spec in specs})
        if not wanted:
            return False
        key = self.loaded.key if self.loaded is not None and self.loaded.key in wanted else wanted[0]
        kinds = [kind for kind in kinds if model_key(kind.spec) == key]
        strays = [request for request in self.strays if model_key(request.spec) == key]
        loaded = yield from self._load(key, (kinds or strays)[0].spec)
        if isinstance(loaded, Failure):
            yield from self._refuse(source, kinds, strays, loaded)
            if loaded.kind == ContextLost.__name__:
                raise ContextLost(loaded.message)
            return True
        groups = yield from self._alike(loaded, source, kinds, strays)
        while loaded.remarks:
            yield loaded.remarks.pop(0)
        if groups:
            moved = yield from self._train_alike(loaded, source, *groups[0])
            if not moved:
                time.sleep(IDLE_SECONDS)
        return True

    def _load(self, key: str, spec: RunSpec) -> Generator[Made, None, Loaded | Failure]:
        """The base model of a key, in place of the former one; or why it cannot be had."""
        if self.loaded is not None and self.loaded.key == key:
            return self.loaded
        yield Stage(message=models.loading_message(spec.model))
        try:
            content = identity.confirmed(spec.model)
            dtype = self.context.dtype(spec)
            self.loaded = None  # its memory is free before the next one is read
            with self.context.timeline.span("load"):
                base = methods.load_base(spec, dtype=dtype, device=self.context.device)
                if (fixed := self.context.fixed_dtype(spec, dtype)) != dtype:
                    dtype = fixed
                    del base  # its memory is free before it is read once more
                    base = methods.load_base(spec, dtype=dtype, device=self.context.device)
        except Exception as error:
            if self.context.lost(error) and not lost.former().in_a_row:
                raise  # the card may be better in a fresh process; if not, it is the model
            return self.context.failure(error)
        if dtype != precision_for(self.context.device, spec.trainer.precision):
            said = f"trainer.precision=auto is {precision_name(dtype)} in this study, as in its first run"
            yield Stage(message=said)
        self.loaded = Loaded(base, key, self.context, content)
        return self.loaded

    def _refuse(
        self, source: Source, kinds: Sequence[PendingGroup], strays: Sequence[Run], failure: Failure
    ) -> Iterator[Made]:
        """Records every run of some kinds as failed."""
        keys = {kind.key for kind in kinds}
        self.strays = [request for request in self.strays if request not in strays]
        found = list(strays)
        while found or (found := list(source.pull(REFUSED_AT_ONCE, keys).runs)):
            for request in found:
                yield self.context.failed(Progress(request), failure)
            found = []

    def _alike(
        self, loaded: Loaded, source: Source, kinds: Sequence[PendingGroup], strays: Sequence[Run]
    ) -> Generator[Made, None, list[tuple[dict[str, Any], list[PendingGroup], list[Prepared], list[Prepared]]]]:
        """What can share a pack: its options, kinds, a run prepared of each, and prepared strays; those first."""
        groups: dict[tuple[Any, ...], tuple[list[PendingGroup], list[Prepared], list[Prepared]]] = {}
        for kind in kinds:
            sample = Run(run_id=kind.spec.run_id, spec=kind.spec, folder=self.context.settings.folder / "-")
            if loaded.unprobed(kind.spec):
                yield Stage(message=f"probing which modules matter on {kind.spec.dataset.name}")
            try:
                run = loaded.prepare(sample)
                key = pack_key_of(run)
            except Exception as error:
                yield from self._refuse(source, [kind], [], self.context.failure(error))
                if self.context.lost(error):
                    raise
                continue
            members = groups.setdefault(key, ([], [], []))
            members[0].append(kind)
            members[1].append(run)
            for spec in kind.others:
                with contextlib.suppress(Exception):
                    members[1].append(loaded.prepare(dataclasses.replace(sample, run_id=spec.run_id, spec=spec)))
        for request in strays:
            try:
                run = loaded.prepare(request)
                key = pack_key_of(run)
            except Exception as error:
                yield from self._refuse(source, [], [request], self.context.failure(error))
                if self.context.lost(error):
                    raise
                continue
            groups.setdefault(key, ([], [], []))[2].append(run)
        return [(dict(key), *groups[key]) for key in sorted(groups, key=lambda key: (not groups[key][2], key))]

    def _train_alike(
        self, loaded: Loaded, source: Source, options: dict[str, Any], kinds: list[PendingGroup],
        probes: list[Prepared], strays: list[Prepared],
    ) -> Generator[Made, None, bool]:  # fmt: skip
        """Trains runs that can share a pack, in as many packs as memory asks for; returns whether there were any."""
        base, key = loaded.base, tuple(options.items())
        alone = bool(options["alone"])
        options = {name: value for name, value in options.items() if name not in ("length", "alone")}
        samples = [*strays, *probes]
        options["lengths_vary"] = distinct_lengths([len(e.input_ids) for run in samples for e in run.job.examples]) > 1
        self.queue = queue = RunQueue(loaded, source, kinds, key, strays)
        taken = {run.request.run_id for run in strays}
        self.strays = [request for request in self.strays if request.run_id not in taken]
        at_once = 1 if alone else most_at_once(kinds, strays)
        options |= self._compilation(base, kinds, strays, samples, options["lengths_vary"])
        solo: dict[str, calibrate.Solo] = {}
        if self.measures and queue.want(1):
            yield from self._calibrate(base, samples, options, solo)
        measured = [(run, solo.get(run.shape)) for run in samples]
        try:
            limit = runs_that_fit(base, measured, self.context.settings, self.context.device, at_once=at_once)
        except Exception as error:
            yield Stage(message=f"how many runs fit together cannot be told, so one at a time: {gist(error)}")
            limit = 1
        train = functools.partial(self._train_pack, loaded, options=options, solo=solo)
        moved = yield from self._try_suspects(queue, train)
        while queue.want(max(limit, 1)) and not self.context.should_stop():
            moved = True
            broken = yield from train(queue, limit=limit, probes=probes)
            if broken is None or not broken.runs:
                continue
            if broken.memory or broken.size == 1:
                queue.waiting.extendleft(reversed(broken.runs))
            elif (yield from self._bisect(queue, broken, train)):
                continue
            limit = broken.size // 2
            what = "out of memory" if broken.memory else broken.failure.kind
            yield Stage(message=f"{what} with {broken.size} runs together; going on with {max(1, limit)}")
        yield from queue.problems()
        self.strays += queue.aside
        return moved

    def _compilation(
        self, base: BaseModel, kinds: Sequence[PendingGroup], strays: Sequence[Prepared], samples: Sequence[Prepared],
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
            width=models.hidden_size(base.model),
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
            except Exception as error:  # training meets it again and records it
                if self.context.lost(error):
                    raise ContextLost(first_line(error), measuring=True) from error

    def _train_pack(
        self, loaded: Loaded, queue: RunQueue, *, limit: int, options: dict[str, Any],
        solo: Mapping[str, calibrate.Solo], probes: Sequence[Prepared] = (), until: Mapping[str, int] | None = None,
    ) -> Generator[Made, None, Broken | None]:  # fmt: skip
        """Trains one pack until nothing is left for it, or for a trial `until` some steps. Says if and how it broke.

        A `limit` of 0 asks for a slot that holds the first run and nothing larger.
        """
        waiting = queue.waiting
        first = waiting[0].job.adapter
        exact = limit == 0 or isinstance(first, UnpackedSpec) or (len(waiting) <= limit and not queue.more)
        capacities: list[Capacity] | UnpackedSpec
        if isinstance(first, UnpackedSpec):
            slots, capacities = 1, first
        elif exact:
            slots = min(max(limit, 1), len(waiting))
            capacities = [run.capacity for run in itertools.islice(waiting, slots)]
        else:  # a slot changes hands: it must hold whichever run comes next
            slots = limit
            capacities = [Capacity.union(run.capacity for run in (*waiting, *probes))] * slots
        running: dict[str, Progress] = {}
        begun = False
        try:
            with self.context.timeline.span("set up"):
                pack = Pack(loaded.base, capacities, **options)
            drive = Drive(loaded, pack, queue, solo)
            running, begun = drive.running, True
            with pack, loaded.packed():
                try:
                    yield from drive.fill()
                    yield from drive.go(until)
                except Exception as error:
                    if pack.sound and not self.context.lost(error):  # what failed moved nothing
                        yield from self._settled(drive)
                    raise
            waiting.extendleft(reversed([progress.prepared for progress in running.values()]))
            return None
        except Exception as error:
            failure, memory = self.context.failure(error), isinstance(error, MEMORY)
        if failure.kind == ContextLost.__name__:
            yield from self._lose(list(running.values()) or self._first(queue, slots), failure)
        self._free_memory()
        broken = list(running.values()) or self._first(queue, slots)
        if len(broken) == 1 and (begun or exact):
            yield self.context.failed(broken[0], failure)
            return Broken(failure=failure)
        until = {one.request.run_id: one.prepared.job.done + 1 for one in broken}
        for progress in broken:
            progress.prepared.rewind()
        runs = [progress.prepared for progress in broken]
        return Broken(failure=failure, memory=memory, runs=runs, until=until, size=len(runs))

    def _settled(self, drive: Drive) -> Iterator[Made]:
        """Keeps what the runs of a pack that broke have learnt, as far as that can be had."""
        with contextlib.suppress(Exception):
            yield from drive.settle()

    def _first(self, queue: RunQueue, count: int) -> list[Progress]:
        """Takes the first runs out of the queue."""
        taken = [queue.waiting.popleft() for _ in range(min(count, len(queue.waiting)))]
        return [Progress(run.request, run) for run in taken]

    def _bisect(self, queue: RunQueue, broken: Broken, train: "Train") -> Generator[Made, None, bool]:
        """Traces what broke a pack to its runs: each half goes beyond where it was, or is halved, or has failed.

        All that did not fail are back in the queue. Returns whether any did.
        """
        kind, size = broken.failure.kind, broken.size
        yield Stage(message=f"{kind} with {size} runs together; looking for the run that it comes from")
        parts = deque(halved(broken.runs))
        until, failed = dict(broken.until), False
        sound: list[Prepared] = []
        while parts and not self.context.should_stop():
            trial = queue.alone(parts.popleft())
            again = yield from train(trial, limit=len(trial.waiting), until=until)
            sound += trial.waiting
            if again is not None:
                failed = failed or not again.runs
                until |= again.until
                parts.extendleft(reversed(halved(again.runs)))
        queue.waiting.extendleft(reversed([*sound, *(run for part in parts for run in part)]))
        return failed

    def _try_suspects(self, queue: RunQueue, train: "Train") -> Generator[Made, None, bool]:
        """Lets the runs that may have lost an earlier process its GPU go beyond where they were, part by part."""
        parts = queue.take_suspects()
        for part in parts:
            yield Stage(message=f"the GPU was lost with {len(part)} of these runs: trying them first")
            trial = queue.alone(part)
            until = {run.request.run_id: run.suspect.until for run in part if run.suspect is not None}
            broken = yield from train(trial, limit=len(part), until=until)
            if self.context.should_stop():
                break
            for run in part:
                suspects.clear(run.request.folder)
                run.suspect = None
            queue.waiting.extend(trial.waiting)
            if broken is not None and broken.runs:
                yield from self._bisect(queue, broken, train)
        return bool(parts)

    def _lose(self, members: Sequence[Progress], failure: Failure) -> Iterator[Made]:
        """The device is lost to this process: notes which runs it may be for, or that the only one has failed.

        Raises:
            ContextLost: always.
        """
        if len(members) == 1:
            yield self.context.failed(members[0], failure)
        else:
            for half in halved(members):
                begun = [(one.request.folder, one.prepared.job.done + 1) for one in half]
                suspects.mark(begun, failure.message)
        raise ContextLost(failure.message)

    def _free_memory(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()


Train = Callable[..., Generator[Made, None, Broken | None]]
