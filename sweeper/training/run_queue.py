"""The runs that wait for a slot."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sweeper.run import Run
from sweeper.training import suspects
from sweeper.training.events import Event, Stage
from sweeper.training.failure import Failure
from sweeper.training.loaded import Loaded
from sweeper.training.progress import Prepared, Progress
from sweeper.training.sharing import model_key, pack_key
from sweeper.training.source import PendingGroup, Source


class RunQueue:
    """The runs that wait for a slot of packs of one key, and the source that more come from.

    Attributes:
        aside: what the source gave that cannot share these packs.
    """

    def __init__(
        self,
        loaded: Loaded,
        source: Source,
        kinds: Sequence[PendingGroup],
        key: tuple[Any, ...],
        strays: Sequence[Prepared],
    ) -> None:
        self.loaded, self.source, self.key = loaded, source, key
        self.kinds = {kind.key for kind in kinds}
        self.waiting: deque[Prepared] = deque()
        self.more = True
        self.failures: list[tuple[Run, Failure]] = []
        self.aside: list[Run] = []
        self.notes: list[str] = []
        for run in strays:
            try:
                self._add(run)
            except Exception as error:
                self.failures.append((run.request, Failure.of(error)))

    def want(self, count: int) -> bool:
        """Asks for runs until `count` wait or there are none; returns whether any waits."""
        while len(self.waiting) < count:
            pulled = self.source.pull(count - len(self.waiting), self.kinds)
            self.more = pulled.more
            if not pulled.runs:
                break
            for request in pulled.runs:
                self._prepare(request)
        return bool(self.waiting)

    def problems(self) -> Iterator[Event]:
        """Runs that could not even be prepared, as failed; and what is to be said of others."""
        while self.notes:
            yield Stage(message=self.notes.pop(0))
        while self.failures:
            request, failure = self.failures.pop()
            yield self.loaded.context.failed(Progress(request), failure)

    def alone(self, runs: Iterable[Prepared]) -> "RunQueue":
        """A queue of these runs and no others."""
        queue = RunQueue(self.loaded, self.source, (), self.key, ())
        queue.waiting.extend(runs)
        queue.more = False
        return queue

    def take_suspects(self) -> list[list[Prepared]]:
        """Takes out the runs that may have lost an earlier process its GPU; in parts that are to be tried together."""
        parts: dict[str, list[Prepared]] = {}
        for run in list(self.waiting):
            if run.suspect is not None:
                parts.setdefault(run.suspect.part, []).append(run)
                self.waiting.remove(run)
        return list(parts.values())

    def _prepare(self, request: Run) -> None:
        try:
            if (
                model_key(request.spec) != self.loaded.key
                or self.loaded.must_wait(request.spec)
                or suspects.read(request.folder) is not None
            ):
                self.aside.append(request)
                return
            run = self.loaded.prepare(request)
            if pack_key_of(run) != self.key:
                self.aside.append(request)
            else:
                self._add(run)
        except Exception as error:
            self.failures.append((request, self.loaded.context.failure(error)))
            if self.loaded.context.lost(error):
                raise

    def _add(self, run: Prepared) -> None:
        said = run.resume()
        self.notes += [] if said is None else [said]
        self.waiting.append(run)


def pack_key_of(run: Prepared) -> tuple[tuple[str, Any], ...]:
    """`pack_key` of a run whose examples are known."""
    return pack_key(run.request.spec, [len(example.input_ids) for example in run.job.examples])
