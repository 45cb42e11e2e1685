"""The runs that wait for a slot."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from sweeper.engine.events import Event, Stage
from sweeper.engine.loaded import Loaded
from sweeper.engine.progress import Prepared, Progress
from sweeper.engine.requests import Kind, RunRequest, Source
from sweeper.engine.sharing import model_key, pack_key
from sweeper.errors import SweeperError


class RunQueue:
    """The runs that wait for a slot of packs of one key, and the source that more come from.

    Attributes:
        aside: what the source gave that cannot share these packs.
    """

    def __init__(
        self, loaded: Loaded, source: Source, kinds: Sequence[Kind], key: tuple[Any, ...], strays: Sequence[Prepared]
    ) -> None:
        self.loaded, self.source, self.key = loaded, source, key
        self.kinds = {kind.key for kind in kinds}
        self.waiting: deque[Prepared] = deque()
        self.more = True
        self.failures: list[tuple[RunRequest, Exception]] = []
        self.aside: list[RunRequest] = []
        self.notes: list[str] = []
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

    def problems(self) -> Iterator[Event]:
        """Runs that could not even be prepared, as failed; and what is to be said of others."""
        while self.notes:
            yield Stage(message=self.notes.pop(0))
        while self.failures:
            request, error = self.failures.pop()
            yield self.loaded.context.failed(Progress(request), error)

    def _prepare(self, request: RunRequest) -> None:
        if model_key(request.spec) != self.loaded.key or self.loaded.must_wait(request.spec):
            self.aside.append(request)
            return
        try:
            run = self.loaded.prepare(request)
        except (SweeperError, ValueError) as error:
            self.failures.append((request, error))
            return
        if pack_key_of(run) != self.key:
            self.aside.append(request)
        else:
            self._add(run)

    def _add(self, run: Prepared) -> None:
        said = run.resume()
        self.notes += [] if said is None else [said]
        self.waiting.append(run)


def pack_key_of(run: Prepared) -> tuple[tuple[str, Any], ...]:
    """`pack_key` of a run whose examples are known."""
    return pack_key(run.request.spec, [len(example.input_ids) for example in run.job.examples])
