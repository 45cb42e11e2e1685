"""From requests to records: loads base models, forms packs, drives them, and writes what each run leaves."""

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

from sweeper import allocation, budget, importance, methods, models, placement, tasks, weights
from sweeper.architecture import Target, number_of_layers
from sweeper.device import device_for, precision_for
from sweeper.engine import calibrate, checkpoint, compilation, environment, probe
from sweeper.engine.ahead import ahead
from sweeper.engine.alone import AloneSpec, Learnt
from sweeper.engine.batches import DataOrder, distinct_lengths
from sweeper.engine.evaluate import EvaluatedSplit, evaluate
from sweeper.engine.events import Evaluated, Event, RunFinished, RunStarted, Stage, Step
from sweeper.engine.forms import Capacity
from sweeper.engine.memory import MOST, runs_that_fit
from sweeper.engine.pack import Job, Pack, StepResult, verified_head
from sweeper.engine.progress import Prepared, Progress
from sweeper.engine.requests import Kind, RunRequest, Source
from sweeper.engine.timeline import Timeline
from sweeper.errors import SweeperError
from sweeper.models import BaseModel, is_tied
from sweeper.record import Score
from sweeper.spec import RunSpec, Settings

REFUSED_AT_ONCE = 64
DRAIN_SECONDS = 0.5  # how often results are fetched from a CUDA device, which must not wait for the host


IDLE_SECONDS = 0.2  # between questions for work, while others have all there is
Made = Event | Callable[[], Event | None]  # an event, or what the reader of events does (and perhaps makes one of)

AHEAD = 10_000  # events that may wait to be seen to; a step of a pack of 64 makes 64
ASK_SECONDS = 0.5  # between questions for work for a slot that is empty while others train


def in_background(device: torch.device) -> bool:
    """Whether training has a thread of its own: on a CPU it would only compete with those that see to its events."""
    return device.type == "cuda"


class Session:
    """What one device trains for one command. `train` is the whole interface."""

    def __init__(self, settings: Settings, should_stop: Callable[[], bool]) -> None:
        self.settings, self.should_stop = settings, should_stop
        self.device = device_for(settings.device)
        self.cache = weights.cache_folder()
        self.timeline = Timeline()
        self.base: BaseModel | None = None
        self.model_key = ""
        self.strays: list[RunRequest] = []
        self.encoded: dict[str, dict[str, tasks.EncodedSplit]] = {}
        self.base_scores: dict[str, dict[str, EvaluatedSplit]] = {}
        self.probes: dict[str, probe.Probe] = {}
        self.packing = False

    def train(self, source: Source) -> Iterator[Event]:
        """Trains what a source has, model by model, pack by pack; says at the end where the time went.

        On a GPU it goes on training meanwhile, so that the device need not wait while records are written and trials
        judged.
        """
        made = self._train(source)
        for item in ahead(made, AHEAD) if in_background(self.device) else made:
            event = item() if callable(item) else item
            if event is not None:
                yield event
        yield Stage(message=f"time: {self.timeline}")

    def _train(self, source: Source) -> Iterator[Made]:
        while not self.should_stop():
            kinds = list(source.outlook())
            specs = [*(kind.spec for kind in kinds), *(request.spec for request in self.strays)]
            wanted = sorted({_model_key(spec) for spec in specs})
            if not wanted:
                return
            key = self.model_key if self.model_key in wanted else wanted[0]
            kinds = [kind for kind in kinds if _model_key(kind.spec) == key]
            if key != self.model_key:
                problem = yield from self._load(key, kinds[0].spec if kinds else self._strays(key)[0].spec)
                if problem is not None:
                    yield from self._refuse(source, kinds, self._strays(key), problem)
                    continue
            groups = yield from self._alike(source, kinds, self._strays(key))
            if groups:
                moved = yield from self._train_alike(source, *groups[0])
                if not moved:
                    time.sleep(IDLE_SECONDS)

    def _load(self, key: str, spec: RunSpec) -> Generator[Made, None, Exception | None]:
        yield Stage(message=models.loading_message(spec.model))
        try:
            dtype = precision_for(self.device, spec.trainer.precision)
            self.base, self.model_key = None, ""  # the former model's memory is free before the next one is read
            with self.timeline.span("load"):
                base = methods.load_base(spec, dtype=dtype, device=self.device)
                verified_head(base)
        except (SweeperError, OSError, torch.OutOfMemoryError) as error:
            return error.with_traceback(None)
        self.base, self.model_key = base, key
        self.encoded, self.base_scores, self.probes = {}, {}, {}
        return None

    def _refuse(
        self, source: Source, kinds: Sequence[Kind], strays: Sequence[RunRequest], error: Exception
    ) -> Iterator[Made]:
        """Records every run of some kinds as failed."""
        keys = {kind.key for kind in kinds}
        self.strays = [request for request in self.strays if request not in strays]
        found = list(strays)
        while found or (found := list(source.pull(REFUSED_AT_ONCE, keys).requests)):
            for request in found:
                yield self._failed(Progress(request), error)
            found = []

    def _strays(self, model_key: str) -> list[RunRequest]:
        """Runs that were handed out for a pack they could not join: a tuned batch size, say."""
        return [request for request in self.strays if _model_key(request.spec) == model_key]

    def _alike(
        self, source: Source, kinds: Sequence[Kind], strays: Sequence[RunRequest]
    ) -> Generator[Made, None, list[tuple[dict[str, Any], list[Kind], list[Prepared], list[Prepared]]]]:
        """What can share a pack: options of the pack, kinds, a run prepared of each, and prepared strays."""
        groups: dict[tuple[Any, ...], tuple[list[Kind], list[Prepared], list[Prepared]]] = {}
        for kind in kinds:
            sample = RunRequest(run_id=kind.spec.run_id, spec=kind.spec, folder=self.settings.folder / "-")
            if self._unprobed(kind.spec):
                yield Stage(message=f"probing which modules matter on {kind.spec.dataset.name}")
            try:
                run = self._prepare(sample)
            except (SweeperError, ValueError) as error:
                yield from self._refuse(source, [kind], [], error)
                continue
            members = groups.setdefault(self._pack_key(run), ([], [], []))
            members[0].append(kind)
            members[1].append(run)
            for spec in kind.others:
                with contextlib.suppress(SweeperError, ValueError):
                    members[1].append(self._prepare(dataclasses.replace(sample, run_id=spec.run_id, spec=spec)))
        for request in strays:
            try:
                run = self._prepare(request)
            except (SweeperError, ValueError) as error:
                yield from self._refuse(source, [], [request], error)
                continue
            groups.setdefault(self._pack_key(run), ([], [], []))[2].append(run)
        return [(dict(key), *groups[key]) for key in sorted(groups)]

    def _prepare(self, request: RunRequest) -> Prepared:
        base, spec = self.base, request.spec
        assert base is not None
        targets = placement.resolve(base.targets, spec.placement, layers=number_of_layers(base.targets))
        splits = self._splits(base, spec)
        probed = self._probe(base, spec, targets, splits)
        ranks = allocation.ranks(spec, targets, base.targets, None if probed is None else probed.scores)
        if (found := methods.placed(spec.method, targets, base.targets, tied=is_tied(base.model))) != targets:
            ranks = budget.uniform(found, spec.rank)
        examples = splits["train"].examples
        lengths = [len(example.input_ids) for example in examples]
        job = Job(
            run_id=request.run_id, adapter=methods.adapter(spec, ranks), optim=spec.optim,
            steps=spec.trainer.max_steps, seed=spec.seed, examples=examples,
            order=DataOrder(lengths, spec.trainer.batch_size, spec.seed),
        )  # fmt: skip
        return Prepared(request=request, job=job, ranks=ranks, splits=splits, probe=probed)

    def _probe(
        self, base: BaseModel, spec: RunSpec, targets: Sequence[Target], splits: dict[str, tasks.EncodedSplit]
    ) -> probe.Probe | None:
        """What allocates a run's ranks by importance; None where nothing has to be probed."""
        asked = importance.probing(spec)
        if asked is None:
            return None
        key = _probe_key(spec)
        if key not in self.probes:
            assert not self.packing  # the base must be bare
            question = probe.Question(
                asked=asked, targets=probe.probed(base, targets), examples=splits["train"].examples,
                batch_size=spec.trainer.batch_size, seed=spec.seed if asked.seed is None else asked.seed,
            )  # fmt: skip
            with self.timeline.span("probe"):
                self.probes[key] = probe.find(base, question, self.cache / "probes")
        return self.probes[key]

    def must_wait(self, spec: RunSpec) -> bool:
        """Whether a run needs a probe of the bare base model while a pack is on it."""
        return self.packing and self._unprobed(spec)

    def _unprobed(self, spec: RunSpec) -> bool:
        return spec.allocation.name == importance.NAME and _probe_key(spec) not in self.probes

    def _splits(self, base: BaseModel, spec: RunSpec) -> dict[str, tasks.EncodedSplit]:
        key = repr(spec.dataset)
        if key not in self.encoded:
            model_key = f"{spec.model.source}:{spec.model.location}@{spec.model.revision}"
            self.encoded[key] = tasks.encode(
                spec.dataset, base.tokenizer, model_key=model_key, cache=self.cache / "tokens"
            )
        return self.encoded[key]

    @staticmethod
    def _pack_key(run: Prepared) -> tuple[tuple[str, Any], ...]:
        return pack_key(run.request.spec, [len(e.input_ids) for e in run.job.examples])

    def _train_alike(
        self, source: Source, options: dict[str, Any], kinds: list[Kind], probes: list[Prepared], strays: list[Prepared]
    ) -> Generator[Made, None, bool]:
        """Trains runs that can share a pack, in as many packs as memory asks for; returns whether there were any."""
        base = self.base
        assert base is not None
        key = tuple(options.items())
        alone = bool(options["alone"])
        options = {name: value for name, value in options.items() if name not in ("length", "alone")}
        samples = [*strays, *probes]
        options["lengths_vary"] = distinct_lengths([len(e.input_ids) for run in samples for e in run.job.examples]) > 1
        queue = _Queue(self, source, kinds, key, strays)
        at_once = 1 if alone else sum(kind.most for kind in kinds) + len(strays)
        options |= self._compilation(kinds, strays, samples, options["lengths_vary"])
        solo: dict[str, calibrate.Solo] = {}
        if self.settings.calibrate and queue.want(1):
            yield from self._calibrate(base, samples, options, solo)
        limit = runs_that_fit(
            base, [(run, solo.get(run.shape)) for run in samples], self.settings, self.device, at_once=at_once
        )
        moved = False
        while queue.want(max(limit, 1)) and not self.should_stop():
            moved = True
            overfull = yield from self._train_pack(base, queue, limit, options, solo, probes)
            if overfull:
                limit = overfull // 2
        yield from queue.problems()
        return moved

    def _compilation(
        self, kinds: Sequence[Kind], strays: Sequence[Prepared], samples: Sequence[Prepared], lengths_vary: bool
    ) -> dict[str, bool]:
        """Whether layers are compiled and steps captured, on CUDA. A run alone is measured uncompiled in any case."""
        chosen = self.settings.compile
        if self.device.type != "cuda" or chosen == "off":
            return {"compiled": False, "captured": False}
        passes = sum(kind.left * kind.spec.trainer.max_steps * kind.spec.trainer.accumulation for kind in kinds)
        passes += sum(run.job.steps * run.request.spec.trainer.accumulation for run in strays)
        together = max(1, min(self.settings.max_pack or MOST, sum(kind.most for kind in kinds) + len(strays)))
        lengths = [len(example.input_ids) for run in samples for example in run.job.examples[:1000]]
        assert self.base is not None
        pays = compilation.pays(
            passes / together, layers=number_of_layers(self.base.targets),
            width=self.base.model.config.get_text_config().hidden_size,
            tokens=together * samples[0].request.spec.trainer.batch_size * sum(lengths) / len(lengths),
            lengths_vary=lengths_vary,
        )  # fmt: skip
        return {"compiled": chosen == "on" or (chosen == "auto" and pays), "captured": True}

    def _calibrate(self, base, queue, options, solo) -> Iterator[Made]:
        for run in queue:
            if run.shape in solo or run.job.steps == 0 or self.should_stop():
                continue
            spec = run.request.spec
            yield Stage(message=f"measuring {spec.placement.name} rank {spec.rank} alone")
            try:
                with self.timeline.span("measure alone"):
                    solo[run.shape] = calibrate.measure(
                        base, run.job, options | {"compiled": False}, self.cache / "calibrations"
                    )
            except (RuntimeError, SweeperError):  # out of memory is one; training meets it again and records it
                continue

    def _train_pack(
        self, base: BaseModel, queue: "_Queue", limit: int, options, solo, probes: Sequence[Prepared]
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
            with self.timeline.span("set up"):
                pack = Pack(base, capacities, **options)
            with pack, self._on_base():
                try:
                    yield from self._fill(pack, queue, running)
                    yield from self._drive(pack, queue, running, solo)
                except torch.OutOfMemoryError:  # what failed moved nothing: every run goes on from where it is
                    for result in pack.drain():
                        yield running[result.job.run_id].note_step(result, 0.0, warming=False)
                    self._checkpoint(pack, running)
                    raise
            return 0
        except (RuntimeError, SweeperError) as error:
            problem = error.with_traceback(None)  # its frames would keep the pack's memory
        self._free_memory()
        if not running and exact and slots == 1:
            run = waiting.popleft()
            yield self._failed(Progress(run.request, run), problem)
            return 0
        return (yield from self._recover(queue, running, problem, slots))

    @contextlib.contextmanager
    def _on_base(self) -> Iterator[None]:
        self.packing = True
        try:
            yield
        finally:
            self.packing = False

    def _recover(
        self, queue: "_Queue", running: dict[str, Progress], error: Exception, slots: int
    ) -> Generator[Made, None, int]:
        """Runs of a pack that broke go back to the queue from their last good step; a run alone has failed."""
        if len(running) == 1:
            (alone,) = running.values()
            yield self._failed(alone, error)
            return 0
        for progress in reversed(running.values()):
            progress.prepared.rewind()
            queue.waiting.appendleft(progress.prepared)
        size = len(running) or slots
        what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}"
        yield Stage(message=f"{what} with {size} runs together; going on with {max(1, size // 2)}")
        return size

    def _fill(self, pack: Pack, queue: "_Queue", running: dict[str, Progress]) -> Iterator[Made]:
        """Puts runs into the slots that are free."""
        arrived = []
        with self.timeline.span("refill"):
            queue.want(len(pack.jobs) - len(pack.active))
            for run in list(queue.waiting):
                slot = pack.free_slot(run.job.adapter)
                if slot is None:
                    continue
                pack.add(run.job, slot)
                queue.waiting.remove(run)
                running[run.request.run_id] = progress = Progress(run.request, run)
                arrived.append(progress)
            pack.refilling = queue.more
        yield from queue.problems()
        for progress in arrived:
            yield RunStarted(run_id=progress.request.run_id, steps=progress.prepared.job.steps)
        for progress in arrived:
            yield from self._score_base(pack, progress)

    def _score_base(self, pack: Pack, progress: Progress) -> Iterator[Made]:
        """A fresh adapter is the identity, so all runs on a dataset share the base model's scores."""
        spec = progress.request.spec
        if not spec.evaluation.before:
            return
        key = repr((spec.dataset, spec.evaluation))
        if key not in self.base_scores:
            self.base_scores[key] = {}
            for split in spec.evaluation.splits:
                yield Stage(message=f"evaluating the base model on {spec.dataset.name} {split}")
                self.base_scores[key][split] = evaluate(pack, [-1], progress.prepared, split)[0]
        for split, found in self.base_scores[key].items():
            yield self._scored(progress, split, "before", found)

    def _drive(self, pack: Pack, queue: "_Queue", running: dict[str, Progress], solo) -> Iterator[Made]:
        clock = _Clock(pack, running)
        saved = asked = time.monotonic()
        told: threading.Event | None = None
        while pack.active or told is not None:
            if told is not None and (told.is_set() or not pack.active):  # what ended is known, so its successors are
                while not (told.wait(IDLE_SECONDS) or self.should_stop()):
                    pass
                told = None
                yield from clock.collect()
                if not self.should_stop():
                    yield from self._fill(pack, queue, running)
                clock.restart()
                continue
            if self.should_stop():
                yield from clock.collect()
                self._checkpoint(pack, running)
                return
            with self.timeline.span("train") as span:
                pack.step()
                span.name = "compile" if pack.warming else "train"
                arrived = clock.collect() if clock.due() else []
            yield from arrived
            yield from self._evaluate_midway(pack, running, clock)
            for run_id in queue.source.to_prune():
                if run_id in running and not running[run_id].prepared.job.finished:
                    running[run_id].pruned = True
            if _ended(pack, running):
                with self.timeline.span("train"):
                    arrived = clock.collect()
                yield from arrived
                yield from self._finish(pack, _ended(pack, running), running, solo, clock)
                told = threading.Event()
                yield told.set
                clock.restart()
            elif queue.more and len(pack.active) < len(pack.jobs) and time.monotonic() - asked > ASK_SECONDS:
                yield from clock.collect()
                yield from self._fill(pack, queue, running)
                asked = time.monotonic()
                clock.restart()
            elif time.monotonic() - saved > self.settings.checkpoint_seconds:
                yield from clock.collect()
                self._checkpoint(pack, running)
                saved = time.monotonic()
                clock.restart()

    def _evaluate_midway(self, pack: Pack, running: dict[str, Progress], clock: "_Clock") -> Iterator[Made]:
        due = [(slot, running[job.run_id]) for slot, job in pack.active if _due(running[job.run_id].request.spec, job)]
        if not due:
            return
        yield from clock.collect()
        for group in _by_dataset(due):
            with self.timeline.span("evaluate"):
                found = evaluate(
                    pack, [slot for slot, _ in group], group[0][1].prepared, "validation", generation=False
                )
            for (slot, progress), result in zip(group, found, strict=True):
                yield self._scored(progress, "validation", str(progress.prepared.job.done), result)
                job = progress.prepared.job
                if job.adapter.keep_best and job.adapter.saveable(job.done) and progress.judge(result.score.nll):
                    pack.bank.keep_best(slot)
        clock.restart()

    def _finish(self, pack: Pack, ended, running: dict[str, Progress], solo, clock: "_Clock") -> Iterator[Made]:
        began = time.perf_counter()
        leaving = [(slot, running[job.run_id]) for slot, job in ended]
        whole = [(slot, progress) for slot, progress in leaving if not (progress.diverged or progress.pruned)]
        for slot, progress in whole:
            if progress.best is not None:
                pack.bank.take_best(slot)
        for group in _by_dataset(whole):
            for split in group[0][1].request.spec.evaluation.splits:
                with self.timeline.span("evaluate"):
                    found = evaluate(pack, [slot for slot, _ in group], group[0][1].prepared, split)
                for (_, progress), result in zip(group, found, strict=True):
                    yield self._scored(progress, split, "after", result)
        share = (time.perf_counter() - began) / max(len(leaving), 1)
        size = len(running)
        for slot, progress in leaving:
            progress.eval_seconds += share
            progress.pack_runs = max(progress.pack_runs, size)
            weights = pack.bank.saved(slot, progress.prepared.job.adapter)
            yield functools.partial(self._write, progress, weights, solo.get(progress.prepared.shape), pack)
            pack.remove(slot)
            del running[progress.request.run_id]

    def _write(
        self, progress: Progress, weights: Mapping[str, Any] | Learnt, solo: calibrate.Solo | None, pack: Pack
    ) -> Event:
        try:
            record = progress.write(self.settings, weights, solo, pack, self._environment(pack))
        except OSError as error:
            return self._failed(progress, error)
        return RunFinished(record=record)

    def _scored(self, progress: Progress, split: str, moment: str, found: EvaluatedSplit) -> Evaluated:
        progress.note_scores(split, moment, found)
        score: Score = found.score
        return Evaluated(run_id=progress.request.run_id, split=split, moment=moment, score=score)

    def _checkpoint(self, pack: Pack, running: dict[str, Progress]) -> None:
        for slot, job in pack.active:
            progress = running[job.run_id]
            state = pack.snapshot(slot)
            progress.prepared.keep(state, progress)
            checkpoint.save(progress.request.folder, state, progress.saved())

    def _failed(self, progress: Progress, error: BaseException) -> RunFinished:
        return RunFinished(record=progress.write_failure(self.settings, error, self._environment(None)))

    def _environment(self, pack: Pack | None) -> dict[str, Any]:
        described = environment.describe(self.device, None if pack is None else next(pack.model.parameters()).dtype)
        return described if pack is None else described | {"compiled": pack.compiled}

    def _free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Clock:
    """Fetches step results and shares out the time that passed among the steps it went to."""

    def __init__(self, pack: Pack, running: dict[str, Progress]) -> None:
        self.pack, self.running = pack, running
        self.restart()

    def restart(self) -> None:
        self.mark = time.perf_counter()

    def due(self) -> bool:
        if self.pack.device.type != "cuda" or self.pack.warming:
            return True
        return time.perf_counter() - self.mark > DRAIN_SECONDS

    def collect(self) -> list[Step]:
        warming = self.pack.warming
        results: list[StepResult] = list(self.pack.drain())
        seconds = time.perf_counter() - self.mark
        share = seconds / max(len(results), 1)
        self.restart()
        return [self.running[result.job.run_id].note_step(result, share, warming=warming) for result in results]


class _Queue:
    """The runs that wait for a slot of packs of one key, and the source that more come from."""

    def __init__(
        self, session: Session, source: Source, kinds: Sequence[Kind], key: tuple[Any, ...], strays: Sequence[Prepared]
    ) -> None:
        self.session, self.source, self.key = session, source, key
        self.kinds = {kind.key for kind in kinds}
        self.waiting: deque[Prepared] = deque()
        self.more = True
        self.failures: list[tuple[RunRequest, Exception]] = []
        taken = {run.request.run_id for run in strays}
        session.strays = [request for request in session.strays if request.run_id not in taken]
        for run in strays:
            self._add(run)

    def want(self, count: int) -> bool:
        """Asks for runs until `count` wait or there are none; returns whether any waits."""
        while len(self.waiting) < count:
            pulled = self.source.pull(count - len(self.waiting), self.kinds)
            self.more = pulled.more
            if not pulled.requests:
                break
            for request in pulled.requests:
                self._prepare(request)
        return bool(self.waiting)

    def problems(self) -> Iterator[Made]:
        """Runs that could not even be prepared, as failed."""
        while self.failures:
            request, error = self.failures.pop()
            yield self.session._failed(Progress(request), error)

    def _prepare(self, request: RunRequest) -> None:
        if _model_key(request.spec) != self.session.model_key or self.session.must_wait(request.spec):
            self.session.strays.append(request)
            return
        try:
            run = self.session._prepare(request)
        except (SweeperError, ValueError) as error:
            self.failures.append((request, error))
            return
        if self.session._pack_key(run) != self.key:
            self.session.strays.append(request)
        else:
            self._add(run)

    def _add(self, run: Prepared) -> None:
        run.resume()
        self.waiting.append(run)


def pack_key(spec: RunSpec, lengths: Sequence[int]) -> tuple[tuple[str, Any], ...]:
    """Runs with equal keys can share a pack of the same base model: batch shape and length bucket.

    A run that trains alone has a key that only runs like it share; they follow one another. The model, its precision
    and its quantisation are decided before: a session holds one base model at a time. The
    bucket is the next power of two of a long example (the 90th percentile), so that short examples are not padded to
    the length of another dataset's.
    """
    ordered = sorted(lengths)
    typical = ordered[int(0.9 * (len(ordered) - 1))]
    return (
        ("accumulation", spec.trainer.accumulation),
        ("alone", methods.alone_key(spec)),
        ("batch_size", spec.trainer.batch_size),
        ("checkpointing", spec.trainer.activation_checkpointing),
        ("length", 1 << (typical - 1).bit_length()),
    )


def _model_key(spec: RunSpec) -> str:
    return repr((spec.model, spec.trainer.precision, methods.find(spec.method.name).quantised))


def _probe_key(spec: RunSpec) -> str:
    """Runs of one base model with equal keys ask a probe the same."""
    seed = spec.seed if spec.allocation.options.get("seed", 0) is None else None
    placed = spec.placement if spec.placement.embeddings or spec.placement.head or spec.placement.patterns else None
    return repr((spec.dataset, spec.allocation.options, spec.trainer.batch_size, seed, placed))


def _ended(pack: Pack, running: dict[str, Progress]) -> list[tuple[int, Job]]:
    def over(job: Job) -> bool:
        progress = running[job.run_id]
        return job.finished or progress.diverged or progress.pruned or progress.stopped

    return [(slot, job) for slot, job in pack.active if over(job)]


def _due(spec: RunSpec, job: Job) -> bool:
    """Whether a run is evaluated now; one that may end early also at its last step, which may be its best."""
    if job.finished:
        return spec.trainer.patience is not None
    return spec.evaluation.every_steps > 0 and job.done % spec.evaluation.every_steps == 0


def _by_dataset(entries: Sequence[tuple[int, Progress]]) -> list[list[tuple[int, Progress]]]:
    def key(entry: tuple[int, Progress]) -> str:
        return repr((entry[1].request.spec.dataset, entry[1].request.spec.evaluation))

    return [list(group) for _, group in itertools.groupby(sorted(entries, key=key), key=key)]
