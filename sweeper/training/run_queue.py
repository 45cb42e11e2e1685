"""The runs that wait for a slot."""

from collections import deque
from collections.abc import Iterable, Sequence

from sweeper.run import Run
from sweeper.training import begin_from, suspects
from sweeper.training.events import Remark, RunResumed
from sweeper.training.loaded import Loaded
from sweeper.training.run_state import RunState
from sweeper.training.sharing import PackKey, model_key, pack_key_of
from sweeper.training.source import PendingGroup, Source


class RunQueue:
    """The runs that wait for a slot of packs of one key, and the source that more come from.

    Attributes:
        deferred: what the source gave that cannot share these packs.
    """

    def __init__(
        self, loaded: Loaded, source: Source, groups: Sequence[PendingGroup], key: PackKey, first: Sequence[RunState]
    ) -> None:
        self.loaded, self.source, self.key = loaded, source, key
        self.groups = {group.key for group in groups}
        self.waiting: deque[RunState] = deque()
        self.more = True
        self.deferred: list[Run] = []
        for state in first:
            try:
                self._add(state)
            except Exception as error:
                self.loaded.context.fail(state.run, self.loaded.context.failure(error))

    def want(self, count: int) -> bool:
        """Asks for runs until `count` wait or there are none; returns whether any waits.

        A run that cannot even be prepared has failed.
        """
        while len(self.waiting) < count:
            pulled = self.source.pull(count - len(self.waiting), self.groups)
            self.more = pulled.more
            if not pulled.runs:
                break
            for run in pulled.runs:
                self._prepare(run)
        return bool(self.waiting)

    def of(self, states: Iterable[RunState]) -> "RunQueue":
        """A queue of these runs and no others."""
        queue = RunQueue(self.loaded, self.source, (), self.key, ())
        queue.waiting.extend(states)
        queue.more = False
        return queue

    def take_suspects(self) -> list[list[RunState]]:
        """Takes out the runs that may have lost an earlier process its GPU; in parts that are to be tried together."""
        parts: dict[str, list[RunState]] = {}
        for state in list(self.waiting):
            if state.suspect is not None:
                parts.setdefault(state.suspect.part, []).append(state)
                self.waiting.remove(state)
        return list(parts.values())

    def _prepare(self, run: Run) -> None:
        context = self.loaded.context
        try:
            if (
                model_key(run.spec) != self.loaded.key
                or self.loaded.must_wait(run.spec)
                or suspects.read(run.folder) is not None
            ):
                self.deferred.append(run)
                return
            state = self.loaded.prepare(run)
            if pack_key_of(state) != self.key:
                self.deferred.append(run)
            else:
                self._add(state)
        except Exception as error:
            context.fail(run, context.failure(error))
            if context.lost(error):
                raise

    def _add(self, state: RunState) -> None:
        goes_on = state.spec.trainer.init_from is not None
        if goes_on:
            begin_from.name_origin(state)
        before = state.done
        said = state.resume()
        if said is not None:
            self.loaded.context.emit(Remark(message=said))
        elif state.done > before:
            self.loaded.context.emit(RunResumed(run_id=state.run_id, step=state.done, steps=state.steps))
        if goes_on and state.weights is None:
            begin_from.take_over(state)
        self.waiting.append(state)
