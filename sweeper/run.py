"""A run: the description of one training job with its place in a study."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeper import record as records
from sweeper.errors import DataError, gist
from sweeper.record import Record, Status
from sweeper.spec import RunSpec, run_spec


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

    @classmethod
    def recorded(cls, record: Record, study: Path) -> "Run":
        """The run of a record in the folder of a study.

        Raises:
            SpecError: it is of a spec that this version does not know.
        """
        arm, folder = str(record.search.get("arm", "")), study / record.run_id
        return cls(run_id=record.run_id, spec=run_spec(record.spec), folder=folder, arm=arm, search=record.search)

    @property
    def status(self) -> Status | None:
        """How it ended, as its record says; None where there is no record."""
        return records.status(self.folder)

    @property
    def record(self) -> Record:
        """What it left, read anew.

        Raises:
            DataError: there is no record, as of a run that was only planned, or none that can be read.
        """
        try:
            return records.read_record(self.folder)
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no record; the run has not ended") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder}: its record cannot be read ({gist(error)})") from None
