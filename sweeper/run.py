"""A run: the description of one training job with its place in a study."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeper.spec import RunSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training job of a study.

    Attributes:
        folder: holds what the run leaves.
        arm: key of the arm that it is a replicate or a trial of.
        search: what its record says of the search that it is part of; empty for a run of a plain grid.
    """

    run_id: str
    spec: RunSpec
    folder: Path
    arm: str = ""
    search: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: RunSpec, study: Path, *, arm: str = "", search: Mapping[str, Any] | None = None) -> "Run":
        """The run of a spec in the folder of a study."""
        run_id = spec.run_id
        return cls(run_id=run_id, spec=spec, folder=study / run_id, arm=arm, search=search or {})
