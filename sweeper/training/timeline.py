"""Where a command's time goes: seconds by what was being done, from the start of the process."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Span:
    """One stretch of work; its name may be settled before it ends."""

    name: str


class Timeline:
    """Adds up exclusive seconds by name; a span inside another takes its time away from it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[Span] = []
        self.mark = time.perf_counter()
        started = process_seconds()
        if started is not None:
            self.seconds["start"] = started

    @contextmanager
    def span(self, name: str) -> Iterator[Span]:
        self._account()
        self.open.append(Span(name))
        try:
            yield self.open[-1]
        finally:
            self._account()
            self.open.pop()

    def __str__(self) -> str:
        return " · ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items() if seconds >= 0.05)

    def _account(self) -> None:
        now = time.perf_counter()
        if self.open:
            name = self.open[-1].name
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.mark
        self.mark = now


def process_seconds() -> float | None:
    """Seconds since this process began, where the system tells (Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
