"""Numbers, times and tables as text for people."""

import math
import re
from collections.abc import Mapping
from typing import Any

_NUMBER = re.compile(r"([\d.,:/e+→–\- ]|nan|inf)*( ?[kMGTPEB]i?B?)?")


def number(value: float | None, digits: int = 3) -> str:
    """A score for people: three decimals, "-" where there is none, "nan" and "inf" as they are."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:.3g}"


def point(params: Mapping[str, Any]) -> str:
    """Tuned values for people: "optim.lr=0.00123, rank=8"."""
    shown = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in params.values())
    return ", ".join(f"{key}={text}" for key, text in zip(params, shown, strict=True))


def clock_time(seconds: float | None) -> str:
    """m:ss or h:mm:ss."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Seconds with a decimal, or with three digits where that would leave few of them: 12.3, 0.0417.

    >>> [duration(value) for value in (1234.5, 12.34, 0.0417, 0.0)]
    ['1234.5', '12.3', '0.0417', '0']
    """
    return f"{seconds:.1f}" if seconds >= 9.95 else f"{seconds:.3g}"


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def amount(count: float) -> str:
    """A large count for people: 1.23 T."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} E"


def is_number(text: str) -> bool:
    """Whether a cell is to be set right: numbers, with their unit, pairs of them, times, and what is absent."""
    return _NUMBER.fullmatch(text) is not None
