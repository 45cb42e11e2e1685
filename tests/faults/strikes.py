"""The faults: what each does to a sweep that runs, or to what one left, and what may follow.

A fault in the process is planted in the child before the sweep begins, as a patch that strikes once at a chosen call. A
fault from outside is a signal, or a change of files between two starts. Each strikes while some run is unfinished, or
it does not count.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Plant = Callable[[Callable[[], bool]], None]
"""Patches the child; what it is given says, at each call of what is patched, whether to strike now."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        plant: patches the child, or None. calls: how often, at most, what is patched has been called when it strikes.
        signals: what the driver is sent, one after another. early: within the first second.
        damage: changes a file that a stopped sweep left. what: glob patterns of the files, in the study or the cache.
        kills: whether a real process dies by it. touches: whether runs may fail by it, and are trained again.
    """

    name: str
    plant: Plant | None = None
    calls: int = 1
    signals: tuple[int, ...] = ()
    early: bool = False
    damage: Callable[[Path, random.Random], None] | None = None
    what: str = ""
    kills: bool = False
    touches: bool = False


def _patched(owner: Any, name: str, strike: Callable[[], bool], act: Callable[..., Any]) -> None:
    """Has `act(original, *args)` take the place of a call where it strikes."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return act(original, *args, **kwargs) if strike() else original(*args, **kwargs)

    setattr(owner, name, call)


def _die(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raiser(make: Callable[[], BaseException]) -> Callable[..., Any]:
    def act(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise make()

    return act


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


def _no_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("out of memory, by a fault that was planted")


def in_replace(act: Callable[..., Any]) -> Plant:
    """Where a file that was written beside takes its name: a record, a checkpoint, an adapter, a cache."""
    return lambda strike: _patched(Path, "replace", strike, act)


def in_results(name: str, act: Callable[..., Any]) -> Plant:
    """Where the files of a run that ended are written."""

    def plant(strike: Callable[[], bool]) -> None:
        from sweeper.training import results

        _patched(results, name, strike, act)

    return plant


def in_pack(name: str, act: Callable[..., Any]) -> Plant:
    def plant(strike: Callable[[], bool]) -> None:
        from sweeper.training.pack import Pack

        _patched(Pack, name, strike, act)

    return plant


def _half_written(original: Callable[..., Any], folder: Path, *args: Any, **kwargs: Any) -> None:
    """A record that is on disk by half when the machine loses its power."""
    from sweeper.record import RECORD

    original(folder, *args, **kwargs)
    text = (folder / RECORD).read_text()
    (folder / RECORD).write_text(text[: len(text) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def _not_a_number(original: Callable[..., Any], pack: Any, *args: Any, **kwargs: Any) -> Any:
    """The values of one slot become NaN."""
    slot = pack.active[0][0]
    for piece in pack.store.pieces(slot, pack.store.params):
        piece.fill_(float("nan"))
    return original(pack, *args, **kwargs)


def clock(strike: Callable[[], bool]) -> None:
    """The wall clock jumps by a day, forward or back."""
    stock, jumped = time.time, []

    def jump() -> float:
        if not jumped and strike():
            jumped.append(random.choice((-86400.0, 86400.0)))
        return stock() + sum(jumped)

    time.time = jump


# -- damage to files


def truncate(path: Path, chance: random.Random) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: chance.randrange(len(whole) or 1)])


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def flip(path: Path, chance: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    if whole:
        whole[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
    path.write_bytes(whole)


def edit(path: Path, chance: random.Random) -> None:
    """A digit becomes another, as by a hand that means well."""
    text = path.read_bytes()
    digits = [place for place, byte in enumerate(text) if chr(byte).isdigit()]
    if digits:
        place = chance.choice(digits)
        other = chance.choice([digit for digit in b"0123456789" if digit != text[place]])
        path.write_bytes(text[:place] + bytes([other]) + text[place + 1 :])


DAMAGES = {"truncated": truncate, "empty": empty, "bit flipped": flip, "edited": edit}
FILES = {
    "record": "study:*/record.json",
    "checkpoint": "study:*/checkpoint.safetensors",
    "journal": "study:search.journal",
    "cache": "cache:**/*",
}

FAULTS = (
    Fault(name="driver killed", signals=(signal.SIGKILL,), kills=True),
    Fault(name="driver killed in its first second", signals=(signal.SIGKILL,), early=True, kills=True),
    Fault(name="killed while a file takes its name", plant=in_replace(_die), calls=30, kills=True),
    Fault(name="killed while a record is written", plant=in_results("write_record", _die), calls=10, kills=True),
    Fault(
        name="power lost, a record written by half",
        plant=in_results("write_record", _half_written),
        calls=10,
        kills=True,
    ),
    Fault(name="SIGTERM", signals=(signal.SIGTERM,)),
    Fault(name="Ctrl-C", signals=(signal.SIGINT,)),
    Fault(name="Ctrl-C twice", signals=(signal.SIGINT, signal.SIGINT)),
    Fault(name="disk full", plant=in_replace(_raiser(_full)), calls=30, touches=True),
    Fault(name="read-only folder", plant=in_replace(_raiser(_read_only)), calls=30, touches=True),
    Fault(name="clock jumps a day", plant=clock, calls=200),
    Fault(name="out of memory, step", plant=in_pack("step", _raiser(_no_memory)), calls=40, touches=True),
    Fault(
        name="out of memory, backward", plant=in_pack("forward_backward", _raiser(_no_memory)), calls=40, touches=True
    ),
    Fault(name="out of memory, evaluation", plant=in_pack("scores", _raiser(_no_memory)), calls=40, touches=True),
    Fault(name="out of memory, export", plant=in_results("write_adapter", _raiser(_no_memory)), calls=8, touches=True),
    Fault(name="NaN in one slot", plant=in_pack("step", _not_a_number), calls=40, touches=True),
    *(
        Fault(name=f"{file} {how}", signals=(signal.SIGKILL,), damage=damage, what=what, kills=True)
        for file, what in FILES.items()
        for how, damage in DAMAGES.items()
    ),
)


def by_name(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def outcome(study: Path) -> Mapping[str, tuple[Any, ...]]:
    """Run id -> status, steps, scores after training, purpose, of every record that can be read."""
    from sweeper.record import RECORD, read_record

    found = {}
    for path in sorted(study.glob(f"*/{RECORD}")):
        try:
            one = read_record(path.parent)
        except ValueError:
            continue
        after = {split: moments["after"].nll for split, moments in one.scores.items() if "after" in moments}
        found[one.run_id] = (one.status, one.steps, after, one.search.get("purpose"))
    return found
