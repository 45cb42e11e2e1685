"""What passes between the scheduler, which has the runs, and the trainer, which pulls them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from sweeper.run import Run
from sweeper.spec import RunSpec
from sweeper.training.events import Event


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingGroup:
    """Runs that are asked for under one key, an arm's.

    `spec` is one of them and `others` are those that differ from it in size, as far as that is known before; there are
    at most `most` at once, and `left` in all (inf where nothing bounds them). Where several ask, `left` is what falls
    to the one that does, and of all kinds together at most `share` at once. `ready` is false where all of them wait for
    another run to end.
    """

    key: str
    spec: RunSpec
    most: int
    left: float = 1
    others: tuple[RunSpec, ...] = ()
    share: float = math.inf
    ready: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """Runs to train now. `more`: others of the same kinds may come when some of what is running has ended."""

    runs: tuple[Run, ...] = ()
    more: bool = False


class Source(Protocol):
    """Where the trainer gets runs, and tells what becomes of them. In one process this is the scheduler; over Ray it is
    its messenger.
    """

    def pending(self) -> Sequence[PendingGroup]:
        """What may still come; empty where everything was handed out and nothing can follow."""
        ...

    def pull(self, count: int, groups: Collection[str]) -> Pulled:
        """At most `count` runs of some groups."""
        ...

    def to_prune(self) -> Collection[str]:
        """Ids of running runs that are to end now."""
        ...

    def report(self, event: Event) -> None:
        """Is told everything that happens, in order; on a GPU in a thread of its own, while training goes on."""
        ...


class Fixed:
    """A source of runs that are all known before; keeps the events that it is told."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.waiting = list(runs)
        self.events: list[Event] = []

    def pending(self) -> list[PendingGroup]:
        return [PendingGroup(key=run.run_id, spec=run.spec, most=1) for run in self.waiting]

    def pull(self, count: int, groups: Collection[str]) -> Pulled:
        found = [run for run in self.waiting if run.run_id in groups][: max(count, 0)]
        given = {run.run_id for run in found}
        self.waiting = [run for run in self.waiting if run.run_id not in given]
        return Pulled(runs=tuple(found), more=any(run.run_id in groups for run in self.waiting))

    def to_prune(self) -> tuple[str, ...]:
        return ()

    def report(self, event: Event) -> None:
        self.events.append(event)
