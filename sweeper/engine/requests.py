"""What passes between the scheduler, which has the runs, and the engine, which asks for them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sweeper.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """One run to train, and the folder that is to hold what it leaves. `search` goes into its record."""

    run_id: str
    spec: RunSpec
    folder: Path
    kind: str = ""
    search: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Runs that are asked for under one key, an arm's.

    `spec` is one of them and `others` are those that differ from it in size, as far as that is known before; there are
    at most `most` at once, and `left` in all (inf where nothing bounds them). Where several ask, `left` is what falls
    to the one that does, and of all kinds together at most `share` at once.
    """

    key: str
    spec: RunSpec
    most: int
    left: float = 1
    others: tuple[RunSpec, ...] = ()
    share: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """Runs to train now. `more`: others of the same kinds may come when some of what is running has ended."""

    requests: tuple[RunRequest, ...] = ()
    more: bool = False


class Source(Protocol):
    """Where the engine gets runs. In one process this is the scheduler; over Ray it is its messenger."""

    def outlook(self) -> Sequence[Kind]:
        """What may still come; empty where everything was handed out and nothing can follow."""
        ...

    def pull(self, count: int, kinds: Collection[str]) -> Pulled:
        """At most `count` runs of some kinds."""
        ...

    def to_prune(self) -> Collection[str]:
        """Ids of running runs that are to end now."""
        ...


class Fixed:
    """A source of runs that are all known before."""

    def __init__(self, requests: Sequence[RunRequest]) -> None:
        self.waiting = list(requests)

    def outlook(self) -> list[Kind]:
        return [Kind(key=request.run_id, spec=request.spec, most=1) for request in self.waiting]

    def pull(self, count: int, kinds: Collection[str]) -> Pulled:
        found = [request for request in self.waiting if request.run_id in kinds][: max(count, 0)]
        given = {request.run_id for request in found}
        self.waiting = [request for request in self.waiting if request.run_id not in given]
        return Pulled(requests=tuple(found), more=any(request.run_id in kinds for request in self.waiting))

    def to_prune(self) -> tuple[str, ...]:
        return ()
