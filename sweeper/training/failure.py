"""What a run raised, as plain data."""

import traceback
from dataclasses import dataclass

import torch

from sweeper.errors import first_line
from sweeper.redaction import without_credentials

MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What a smaller pack may not meet."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Class, message and traceback of an error. The error itself would keep a pack's memory by its frames."""

    kind: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        trace = without_credentials("".join(traceback.format_exception(error)))
        return cls(type(error).__name__, _printable(without_credentials(first_line(error))[:500]), _printable(trace))


def _printable(text: str) -> str:
    """Text that a file and a terminal take: data may hold halves of surrogate pairs, and errors quote data."""
    return text.encode(errors="backslashreplace").decode()
