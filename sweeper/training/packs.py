"""Packs of one configuration, one after another, and what becomes of one that breaks."""

import contextlib
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sweeper.lora.forms import Capacity
from sweeper.lora.trainee import UnpackedSpec
from sweeper.lost import ContextLost
from sweeper.training import suspects
from sweeper.training.calibrate import Solo
from sweeper.training.events import Remark
from sweeper.training.failure import MEMORY, Failure
from sweeper.training.loaded import Loaded
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.pack_trainer import PackTrainer, halved
from sweeper.training.run_queue import RunQueue
from sweeper.training.run_state import RunState


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
    runs: Sequence[RunState] = ()
    until: Mapping[str, int] = field(default_factory=dict)
    size: int = 1


class Packs:
    """Trains the runs of a queue in packs.

    Args:
        config: how the packs compute. solo: what runs cost alone, by shape.
        samples: a run of each kind that may come: a slot that changes hands must hold any of them.
        limit: most runs together.
    """

    def __init__(
        self, loaded: Loaded, queue: RunQueue, config: PackConfig, solo: Mapping[str, Solo],
        samples: Sequence[RunState], limit: int,
    ) -> None:  # fmt: skip
        self.loaded, self.context = loaded, loaded.context
        self.queue, self.config, self.solo, self.samples, self.limit = queue, config, solo, samples, limit

    def train(self) -> bool:
        """Trains all there is; returns whether there was anything."""
        queue, limit = self.queue, self.limit
        moved = self._try_suspects()
        while queue.want(max(limit, 1)) and not self.context.should_stop():
            moved = True
            broken = self._train(queue, limit, samples=self.samples)
            if broken is None or not broken.runs:
                continue
            if broken.memory or broken.size == 1:
                queue.waiting.extendleft(reversed(broken.runs))
            elif self._bisect(broken):
                continue
            limit = broken.size // 2
            what = "out of memory" if broken.memory else broken.failure.kind
            message = f"{what} with {broken.size} runs together; going on with {max(1, limit)}"
            self.context.emit(Remark(message=message))
        return moved

    def _train(
        self, queue: RunQueue, limit: int, *, samples: Sequence[RunState] = (), until: Mapping[str, int] | None = None
    ) -> Broken | None:
        """Trains one pack until nothing is left for it, or for a trial `until` some steps. Says if and how it broke.

        A `limit` of 0 asks for a slot that holds the first run and nothing larger.
        """
        waiting = queue.waiting
        first = waiting[0].adapter
        exact = limit == 0 or isinstance(first, UnpackedSpec) or (len(waiting) <= limit and not queue.more)
        capacities: list[Capacity] | UnpackedSpec
        if isinstance(first, UnpackedSpec):
            slots, capacities = 1, first
        elif exact:
            slots = min(max(limit, 1), len(waiting))
            capacities = [state.capacity for state in itertools.islice(waiting, slots)]
        else:  # a slot changes hands: it must hold whichever run comes next
            slots = limit
            capacities = [Capacity.union(state.capacity for state in (*waiting, *samples))] * slots
        running: dict[str, RunState] = {}
        begun = False
        try:
            with self.context.timeline.span("set up"):
                pack = Pack(self.loaded.base, capacities, self.config)
            trainer = PackTrainer(self.loaded, pack, queue, self.solo)
            running, begun = trainer.running, True
            with pack, self.loaded.packed():
                try:
                    trainer.train(until)
                except Exception as error:
                    if pack.sound and not self.context.lost(error):  # what failed moved nothing
                        with contextlib.suppress(Exception):
                            trainer.settle()
                    raise
            waiting.extendleft(reversed(running.values()))
            return None
        except Exception as error:
            failure, memory = self.context.failure(error), isinstance(error, MEMORY)
        broken = list(running.values()) or self._first(queue, slots)
        if failure.kind == ContextLost.__name__:
            self._lose(broken, failure)
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(broken) == 1 and (begun or exact):
            self.context.fail(broken[0].run, failure, broken[0])
            return Broken(failure=failure)
        until = {state.run_id: state.done + 1 for state in broken}
        for state in broken:
            state.rewind()
        return Broken(failure=failure, memory=memory, runs=broken, until=until, size=len(broken))

    def _first(self, queue: RunQueue, count: int) -> list[RunState]:
        """Takes the first runs out of the queue."""
        return [queue.waiting.popleft() for _ in range(min(count, len(queue.waiting)))]

    def _bisect(self, broken: Broken) -> bool:
        """Traces what broke a pack to its runs: each half goes beyond where it was, or is halved, or has failed.

        All that did not fail are back in the queue. Returns whether any did.
        """
        message = f"{broken.failure.kind} with {broken.size} runs together; looking for the run that it comes from"
        self.context.emit(Remark(message=message))
        parts = deque(halved(broken.runs))
        until, failed = dict(broken.until), False
        sound: list[RunState] = []
        while parts and not self.context.should_stop():
            trial = self.queue.of(parts.popleft())
            again = self._train(trial, len(trial.waiting), until=until)
            sound += trial.waiting
            if again is not None:
                failed = failed or not again.runs
                until |= again.until
                parts.extendleft(reversed(halved(again.runs)))
        self.queue.waiting.extendleft(reversed([*sound, *(state for part in parts for state in part)]))
        return failed

    def _try_suspects(self) -> bool:
        """Lets the runs that may have lost an earlier process its GPU go beyond where they were, part by part."""
        parts = self.queue.take_suspects()
        for part in parts:
            message = f"the GPU was lost with {len(part)} of these runs: trying them first"
            self.context.emit(Remark(message=message))
            trial = self.queue.of(part)
            until = {state.run_id: state.suspect.until for state in part if state.suspect is not None}
            broken = self._train(trial, len(part), until=until)
            if self.context.should_stop():
                break
            for state in part:
                suspects.clear(state.run.folder)
                state.suspect = None
            self.queue.waiting.extend(trial.waiting)
            if broken is not None and broken.runs:
                self._bisect(broken)
        return bool(parts)

    def _lose(self, members: Sequence[RunState], failure: Failure) -> None:
        """The device is lost to this process: notes which runs it may be for, or that the only one has failed.

        Raises:
            ContextLost: always.
        """
        if len(members) == 1:
            self.context.fail(members[0].run, failure, members[0])
        else:
            for half in halved(members):
                suspects.mark([(state.run.folder, state.done + 1) for state in half], failure.message)
        raise ContextLost(failure.message)
