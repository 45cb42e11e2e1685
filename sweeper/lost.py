"""A GPU that this process can use no more, and the process that goes on in its place.

After a device-side assert, an illegal access or an uncorrectable ECC error every call on the device fails until the
process ends, and the memory that it holds stays taken. The command therefore replaces itself by a fresh one. What that
must know of those before it travels in the environment; which runs may be to blame lies in their folders
(`sweeper.training.suspects`).
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass

from sweeper.errors import SweeperError

VARIABLE = "SWEEPER_GOES_ON"
MOST_IN_A_ROW = 10  # processes that lose the device before a run of theirs ends; a pack of 512 is halved in nine

SIGNS = (
    "device-side assert", "illegal memory access", "misaligned address", "illegal instruction",
    "invalid program counter", "hardware stack error", "address space", "unspecified launch failure",
    "launch timed out", "uncorrectable",
    "context is destroyed", "hardware error",
)  # fmt: skip


class ContextLost(SweeperError):
    """The process can use its GPU no more; a fresh one goes on from what is saved.

    `measuring`: it happened while a run was measured alone.
    """

    exit_code = 1

    def __init__(self, reason: str, *, measuring: bool = False) -> None:
        self.reason, self.measuring = reason, measuring
        super().__init__(
            f"this process can use its GPU no more ({reason}); the same again in a fresh process goes on from what is "
            "saved"
        )

    def __reduce__(self) -> tuple[type["ContextLost"], tuple[str]]:
        return type(self), (self.reason,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Former:
    """What the processes of this command before this one leave it.

    Attributes:
        failed: runs that they recorded as failed; the command does not train them again.
        in_a_row: how many of them lost the device without a run that ended.
        measure: whether runs are measured alone; not any more after that has lost the device.
    """

    failed: tuple[str, ...] = ()
    in_a_row: int = 0
    measure: bool = True


_ended: dict[str, bool] = {}  # runs that ended in this process, and whether they failed
_held: list[object] = []
_gone: list[str] = []  # why this process can use its GPU no more


def former() -> Former:
    """What there was before this process; nothing, usually."""
    try:
        plain = json.loads(os.environ[VARIABLE])
        return Former(failed=tuple(plain["failed"]), in_a_row=int(plain["in_a_row"]), measure=bool(plain["measure"]))
    except (KeyError, ValueError, TypeError):
        return Former()


def give_up(reason: str) -> None:
    """Remembers that this process can use its GPU no more."""
    _gone.append(reason)


def check() -> None:
    """Raises ContextLost where this process has lost its GPU already: whatever trains next is not to blame."""
    if _gone:
        raise ContextLost(_gone[0])


def note(run_id: str, *, failed: bool) -> None:
    """Remembers that a run ended in this process."""
    _ended[run_id] = failed


def hold(*things: object) -> None:
    """Keeps what has tensors on a lost GPU, errors by their frames included: to free one there aborts the process."""
    for thing in things:
        _held.append(thing)
        link = thing if isinstance(thing, BaseException) else None
        while link is not None and link.__traceback__ not in _held:
            _held.append(link.__traceback__)
            link = link.__cause__ or link.__context__


def is_sign(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that CUDA's context is lost."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = str(link)
        if isinstance(link, ContextLost) or ("CUDA" in text and any(sign in text for sign in SIGNS)):
            return True
        link = link.__cause__ or link.__context__
    return False


def is_of_device(error: BaseException) -> bool:
    """Whether an error says something of the device, its memory or its state, and nothing of what ran on it."""
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or is_sign(error)


def go_on(error: ContextLost, *, without: tuple[str, ...] = ()) -> None:
    """Replaces this process by one of the same command; returns where that has come to nothing too often.

    Args:
        without: environment variables that the new process is not to have.
    """
    before = former()
    in_a_row = 0 if _ended else before.in_a_row + 1
    if in_a_row > MOST_IN_A_ROW:
        print(f"error: {in_a_row} processes in a row lost the GPU before a run ended", file=sys.stderr)
        return
    failed = [run_id for run_id, bad in _ended.items() if bad]
    after = Former(failed=(*before.failed, *failed), in_a_row=in_a_row, measure=before.measure and not error.measuring)
    left_out = {*without, "WANDB_SERVICE"}  # names a server that belongs to this process
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment[VARIABLE] = json.dumps(dataclasses.asdict(after))
    print(f"the GPU is lost to this process ({error.reason}); going on in a fresh one", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
