"""From runs to records: loads base models, forms packs on them and trains those, until a source has nothing left."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sweeper import cache, identity, lost, methods, models
from sweeper.device import precision_for, precision_name
from sweeper.errors import first_line, gist
from sweeper.lost import ContextLost
from sweeper.models import BaseModel
from sweeper.models.architecture import number_of_layers
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings
from sweeper.training import calibrate, compilation, export
from sweeper.training.batches import distinct_lengths
from sweeper.training.context import Context
from sweeper.training.events import Remark, Stage
from sweeper.training.failure import Failure
from sweeper.training.loaded import Loaded
from sweeper.training.memory import MOST, runs_that_fit
from sweeper.training.pack_config import PackConfig
from sweeper.training.packs import Packs
from sweeper.training.run_queue import RunQueue
from sweeper.training.run_state import RunState
from sweeper.training.sharing import PackKey, model_key, pack_key_of
from sweeper.training.source import PendingGroup, Source
from sweeper.training.writer import ListenerFailed

REFUSED_AT_ONCE = 64
IDLE_SECONDS = 0.2  # between questions for work, while others have all there is


@dataclass
class Alike:
    """What can share a pack: groups that are pending, a run prepared of each, and prepared runs that were deferred."""

    groups: list[PendingGroup] = field(default_factory=list)
    samples: list[RunState] = field(default_factory=list)
    deferred: list[RunState] = field(default_factory=list)

    @property
    def states(self) -> list[RunState]:
        return [*self.deferred, *self.samples]

    @property
    def ready(self) -> bool:
        """Whether some could begin now."""
        return any(group.ready for group in self.groups)

    @property
    def most_at_once(self) -> int:
        """Runs that may come to train here at the same time."""
        share = min((group.share for group in self.groups), default=0)
        return int(min(sum(group.most for group in self.groups), share)) + len(self.deferred)


class Trainer:
    """What one device trains for one command. `train` is the whole interface."""

    def __init__(self, source: Source, settings: Settings, should_stop: Callable[[], bool]) -> None:
        lost.check()
        self.source = source
        self.context = Context(settings, source.report, should_stop)
        self.loaded: Loaded | None = None
        self.measures = settings.calibrate and lost.former().measure
        self.deferred: list[Run] = []  # handed out for a pack they could not join: a tuned batch size, say

    def train(self) -> None:
        """Trains what the source has, model by model, pack by pack; says at the end where the time went.

        Raises:
            ContextLost: this process can use its GPU no more.
        """
        if self.context.device.type == "cuda":
            gc.freeze()  # or the many objects of the imports are looked through in the middle of training
            self.context.writer.write(export.get_ready)
        try:
            while (packs := self._next()) is not None:
                if not packs.train():
                    time.sleep(IDLE_SECONDS)
                self.deferred += packs.queue.deferred
        except Exception as error:
            if not (isinstance(error, ContextLost) or self.context.lost(error)):
                raise
            reason = error.reason if isinstance(error, ContextLost) else first_line(error)
            lost.give_up(reason)
            raise error if isinstance(error, ContextLost) else ContextLost(reason) from error
        except ListenerFailed as error:
            raise error.cause from None
        finally:
            self._close()
        cache.trim(self.context.cache)
        self.source.report(Remark(message=f"time: {self.context.timeline}", by_worker=True))

    def _close(self) -> None:
        """Waits until all that happened is told and written."""
        try:
            self.context.writer.close()
        except ListenerFailed as error:
            raise error.cause from None

    def _next(self) -> Packs | None:
        """Runs of one model that can share packs; None where there are none left, or a stop is asked for."""
        while not self.context.should_stop():
            groups = list(self.source.pending())
            # deferred runs first: what is yet to come may wait for them
            ready = [group for group in groups if group.ready] or groups
            specs = [run.spec for run in self.deferred] or [group.spec for group in ready]
            wanted = sorted({model_key(spec) for spec in specs})
            if not wanted:
                return None
            key = self.loaded.key if self.loaded is not None and self.loaded.key in wanted else wanted[0]
            groups = [group for group in groups if model_key(group.spec) == key]
            deferred = [run for run in self.deferred if model_key(run.spec) == key]
            loaded = self._load(key, (groups or deferred)[0].spec)
            if isinstance(loaded, Failure):
                self._refuse(groups, deferred, loaded)
                if loaded.kind == ContextLost.__name__:
                    raise ContextLost(loaded.message)
            elif alike := self._alike(loaded, groups, deferred):
                first = min(alike, key=lambda key: (not alike[key].deferred, not alike[key].ready, key))
                return self._packs(loaded, first, alike[first])
        return None

    def _load(self, key: str, spec: RunSpec) -> Loaded | Failure:
        """The base model of a key, in place of the former one; or why it cannot be had."""
        if self.loaded is not None and self.loaded.key == key:
            return self.loaded
        self.context.emit(Stage(message=models.loading_message(spec.model)))
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
            self.context.emit(Remark(message=said))
        self.loaded = Loaded(base, key, self.context, content)
        return self.loaded

    def _refuse(self, groups: Sequence[PendingGroup], deferred: Sequence[Run], failure: Failure) -> None:
        """Records every run of some groups as failed."""
        keys = {group.key for group in groups}
        self.deferred = [run for run in self.deferred if run not in deferred]
        found = list(deferred)
        while found or (found := list(self.source.pull(REFUSED_AT_ONCE, keys).runs)):
            for run in found:
                self.context.fail(run, failure)
            found = []

    def _alike(
        self, loaded: Loaded, groups: Sequence[PendingGroup], deferred: Sequence[Run]
    ) -> dict[PackKey, Alike]:  # fmt: skip
        """What can share a pack, by its key."""
        alike: dict[PackKey, Alike] = {}
        for group in groups:
            sample = Run(run_id=group.spec.run_id, spec=group.spec, folder=self.context.settings.folder / "-")
            if loaded.unprobed(group.spec):
                self.context.emit(Stage(message=f"probing which modules matter on {group.spec.dataset.name}"))
            try:
                state = loaded.prepare(sample)
                key = pack_key_of(state)
            except Exception as error:
                self._refuse([group], [], self.context.failure(error))
                if self.context.lost(error):
                    raise
                continue
            mine = alike.setdefault(key, Alike())
            mine.groups.append(group)
            mine.samples.append(state)
            for spec in group.others:
                with contextlib.suppress(Exception):
                    mine.samples.append(loaded.prepare(dataclasses.replace(sample, run_id=spec.run_id, spec=spec)))
        for run in deferred:
            try:
                state = loaded.prepare(run)
                key = pack_key_of(state)
            except Exception as error:
                self._refuse([], [run], self.context.failure(error))
                if self.context.lost(error):
                    raise
                continue
            alike.setdefault(key, Alike()).deferred.append(state)
        return alike

    def _packs(self, loaded: Loaded, key: PackKey, alike: Alike) -> Packs:
        """The packs of runs that can share one: how they compute, and how many runs fit together."""
        queue = RunQueue(loaded, self.source, alike.groups, key, alike.deferred)
        taken = {state.run_id for state in alike.deferred}
        self.deferred = [run for run in self.deferred if run.run_id not in taken]
        config = self._config(loaded.base, key, alike)
        solo: dict[str, calibrate.Solo] = {}
        if self.measures and queue.want(1):
            self._calibrate(loaded.base, alike.states, config, solo)
        at_once = 1 if key.unpacked else alike.most_at_once
        measured = [(state, solo.get(state.shape)) for state in alike.states]
        settings, device = self.context.settings, self.context.device
        try:
            limit = runs_that_fit(loaded.base, measured, settings, device, at_once=at_once)
        except Exception as error:
            message = f"how many runs fit together cannot be told, so one at a time: {gist(error)}"
            self.context.emit(Remark(message=message))
            limit = 1
        return Packs(loaded, queue, config, solo, alike.samples, limit)

    def _config(self, base: BaseModel, key: PackKey, alike: Alike) -> PackConfig:
        """How packs of a key compute: whether layers are compiled and steps captured, on CUDA."""
        lengths = np.concatenate([state.order.lengths for state in alike.states])
        config = PackConfig(
            batch_size=key.batch_size, accumulation=key.accumulation, checkpointing=key.checkpointing,
            deterministic=key.deterministic, lengths_vary=distinct_lengths(lengths.tolist()) > 1,
            by_task=key.by_task if any(key.by_task) else None,
        )  # fmt: skip
        chosen = self.context.settings.compile
        if self.context.device.type != "cuda" or chosen == "off":
            return config
        steps = sum(group.left * group.spec.trainer.max_steps for group in alike.groups)
        passes = config.passes * (steps + sum(state.steps for state in alike.deferred))
        together = max(1, min(self.context.settings.max_pack or MOST, alike.most_at_once))
        rows = config.examples * alike.states[0].rows_of_example
        pays = compilation.pays(
            passes / together, layers=number_of_layers(base.targets), width=models.hidden_size(base.model),
            tokens=together * rows * float(lengths.mean()), lengths_vary=config.lengths_vary,
        )  # fmt: skip
        return dataclasses.replace(config, compiled=chosen == "on" or (chosen == "auto" and pays), captured=True)

    def _calibrate(
        self, base: BaseModel, states: Sequence[RunState], config: PackConfig, solo: dict[str, calibrate.Solo]
    ) -> None:
        """Measures what runs cost alone, uncompiled in any case, into `solo`."""
        for state in states:
            if state.shape in solo or state.steps == 0 or self.context.should_stop():
                continue
            spec = state.spec
            method = "" if spec.method.name == "lora" else f", {spec.method.name},"
            self.context.emit(Stage(message=f"measuring {spec.placement.name} rank {spec.rank}{method} alone"))
            try:
                with self.context.timeline.span("measure alone"):
                    solo[state.shape] = calibrate.measure(
                        base, state, dataclasses.replace(config, compiled=False), self.context.cache / "calibrations"
                    )
            except Exception as error:  # training meets it again and records it
                if self.context.lost(error):
                    raise ContextLost(first_line(error), measuring=True) from error
