"""What the scheduler asks of the engine."""

from dataclasses import dataclass
from pathlib import Path

from sweeper.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """One run to train, and the folder that is to hold what it leaves."""

    run_id: str
    spec: RunSpec
    folder: Path
