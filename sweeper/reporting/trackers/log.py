"""What a service has to offer to be a tracker: a log a run, several open at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sweeper.spec import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A run as its log is told of it.

    Attributes:
        label: what people call it, such as "attn r8 seed=1". arm: the same without the seed.
        config: plain data of its spec.
    """

    run_id: str
    label: str
    arm: str
    config: Mapping[str, Any]


class RunLog(Protocol):
    """One run in a tracker. What its methods raise ends this log, and never training."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Ends the log; `summary` is empty for a run that was stopped, which may go on later."""


OpenLog = Callable[[Begun], RunLog]


def nothing(options: Mapping[str, Any]) -> None:
    """The check of a tracker that has nothing to check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A service.

    Attributes:
        package: what is imported. fields: of `tracking`, besides `every_steps`.
        open: makes what opens logs; raises whatever the package does where it cannot be used.
        check: raises SpecError for options that cannot work, before anything is loaded.
    """

    package: str
    fields: tuple[str, ...] = ()
    open: Callable[[Settings, Mapping[str, Any]], OpenLog]
    check: Callable[[Mapping[str, Any]], None] = nothing


class Onward:
    """Leaves out what a log has already: a run that was cut off goes on from a checkpoint, some steps back.

    Args:
        last: name -> the last step at which it was logged.
    """

    def __init__(self, last: Mapping[str, int]) -> None:
        self.last = dict(last)

    def __call__(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """The values that are new at this step."""
        return {name: value for name, value in values.items() if step > self.last.get(name, -1)}
