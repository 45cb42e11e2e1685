"""Runs that trained together when the GPU was lost: a process that goes on tries them in ever smaller packs.

Each has a note in its folder. Runs whose notes name the same `part` are tried together, each until it has gone further
than it was; a part that does so again is halved. A run that does so alone has failed.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sweeper.record import write_json

NOTE = "suspect.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """`until` is the number of steps after which a run is none any more."""

    part: str
    until: int
    reason: str


def mark(members: Iterable[tuple[Path, int]], reason: str) -> None:
    """Notes that the runs of some folders, with the steps they had begun, are to be tried as one part."""
    part = secrets.token_hex(6)
    for folder, begun in members:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NOTE, asdict(Suspect(part=part, until=begun, reason=reason)))


def read(folder: Path) -> Suspect | None:
    """The note in a run's folder, if there is one."""
    try:
        plain = json.loads((folder / NOTE).read_text())
        return Suspect(part=str(plain["part"]), until=int(plain["until"]), reason=str(plain["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clear(folder: Path) -> None:
    (folder / NOTE).unlink(missing_ok=True)
