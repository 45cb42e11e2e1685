"""The runs that wait for a slot."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sweeper.engine.events import Event
from sweeper.engine.progress import Prepared, Progress
from sweeper.engine.requests import Kind, RunRequest, Source
from sweeper.engine.sharing import model_key, pack_key
from sweeper.errors import SweeperError

if TYPE_CHECKING:
    from sweeper.engine.session import Session


class RunQueue:
    """The runs that wait for a slot of packs of one key, and the source that more come from."""

    def __init__(
        self, session: "Session", source: Source, kinds: Sequence[Kind], key: tuple[Any, ...],
        strays: Sequence[Prepared],
    ) -> None:  # fmt: skip
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

    def problems(self) -> Iterator[Event]:
        """Runs that could not even be prepared, as failed."""
        while self.failures:
            request, error = self.failures.pop()
            yield self.session.failed(Progress(request), error)

    def _prepare(self, request: RunRequest) -> None:
        if model_key(request.spec) != self.session.model_key or self.session.must_wait(request.spec):
            self.session.strays.append(request)
            return
        try:
            run = self.session.prepare(request)
        except (SweeperError, ValueError) as error:
            self.failures.append((request, error))
            return
        if pack_key_of(run) != self.key:
            self.session.strays.append(request)
        else:
            self._add(run)

    def _add(self, run: Prepared) -> None:
        run.resume()
        self.waiting.append(run)


def pack_key_of(run: Prepared) -> tuple[tuple[str, Any], ...]:
    """`pack_key` of a run whose examples are known."""
    return pack_key(run.request.spec, [len(example.input_ids) for example in run.job.examples])
