"""The faults: what each does to a sweep that runs, or to what one left.

A fault in the process is planted in the child before the sweep begins, as a patch that strikes once at a chosen call. A
fault from outside is a signal, or a change of files between two starts. Those that need more than one process, a
service or a file system of their own are in `services.py`.
"""

import dataclasses
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import services
from tests.faults.harness import Fault, Plant

Strike = Callable[..., bool]


def _patched(owner: Any, name: str, strike: Strike, act: Callable[..., Any]) -> None:
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

    def plant(strike: Strike) -> None:
        from sweeper.training import results

        _patched(results, name, strike, act)

    return plant


def in_pack(name: str, act: Callable[..., Any]) -> Plant:
    def plant(strike: Strike) -> None:
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


def not_a_number_in_weights(strike: Strike) -> None:
    """The adapter of one slot becomes NaN or infinite before a step."""
    from sweeper.training.pack import Pack

    original = Pack.step

    def step(pack: Any) -> None:
        slot, state = random.choice(pack.active)
        if not (state.finished or state.halted) and strike(state.run_id):
            for piece in pack.store.pieces(slot, pack.store.params):
                piece.fill_(random.choice((float("nan"), float("inf"))))
        original(pack)

    setattr(Pack, "step", step)  # noqa: B010


def not_a_number_in_data(strike: Strike) -> None:
    """The weights of one run's target tokens become NaN or infinite in a batch."""
    from sweeper.training.pack import Pack

    original = Pack.forward_backward

    def forward_backward(pack: Any, batch: Any) -> Any:
        lanes = [slot for slot in pack.store.lanes.host_slots if slot >= 0]
        lane = random.randrange(len(lanes))
        if strike(pack.states[lanes[lane]].run_id):
            weights = batch.weights.clone()
            weights[lane] = random.choice((float("nan"), float("inf")))
            batch = dataclasses.replace(batch, weights=weights)
        return original(pack, batch)

    setattr(Pack, "forward_backward", forward_backward)  # noqa: B010


def not_a_number_in_rate(strike: Strike) -> None:
    """The learning rate of one run is NaN or infinite for a step."""
    from sweeper.lora.optimizer import IDLE, LR
    from sweeper.training.run_state import RunState

    original = RunState.hyperparameters

    def hyperparameters(state: Any) -> Any:
        rows = original(state)
        if strike(state.run_id):
            bad = random.choice((float("nan"), float("inf")))
            rows = [row if row is IDLE else [bad if place == LR else v for place, v in enumerate(row)] for row in rows]
        return rows

    setattr(RunState, "hyperparameters", hyperparameters)  # noqa: B010


def _after(make: Callable[[], BaseException]) -> Callable[..., Any]:
    """Raises when the call has done its work."""

    def act(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise make()

    return act


def in_backward(strike: Strike) -> None:
    """Memory runs out in the backward pass, gradients being written by then."""
    import torch

    _patched(torch.Tensor, "backward", strike, _after(_no_memory))


def another_version(strike: Strike) -> None:
    """The command is repeated with another version of a package that runs are made with."""
    from sweeper.training import environment

    found = environment._versions() | {"torch": "2.99.0", "transformers": "5.99.0"}
    environment._versions = lambda: found  # type: ignore[assignment]


def clock(strike: Strike) -> None:
    """The wall clock jumps by a day, forward or back."""
    stock, jumped = time.time, list[float]()

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
AGAIN = "^2 arms|nothing to train|ended already|cut off or failed"
UNREADABLE = "trains again; its record is kept"
SAID = {"record": UNREADABLE, "checkpoint": "checkpoint is damaged", "journal": "cannot be read", "cache": None}
FILES = {
    "record": "study:[0-9a-f]*/record.json",
    "checkpoint": "study:*/checkpoint.safetensors",
    "journal": "study:search.journal",
    "cache": "cache:**/*",
}

FAULTS = (
    Fault(name="driver killed", signals=(signal.SIGKILL,), kills=True, says=AGAIN, later=True),
    Fault(
        name="driver killed in its first second",
        signals=(signal.SIGKILL,),
        early=True,
        kills=True,
        says=AGAIN,
        later=True,
    ),
    Fault(
        name="killed while a file takes its name", plant=in_replace(_die), calls=30, kills=True, says=AGAIN, later=True
    ),
    Fault(
        name="killed while a record is written",
        plant=in_results("write_record", _die),
        calls=6,
        kills=True,
        says=AGAIN,
        later=True,
    ),
    Fault(
        name="power lost, a record written by half",
        plant=in_results("write_record", _half_written),
        calls=6,
        kills=True,
        says=UNREADABLE,
        later=True,
        silent=True,
    ),
    Fault(
        name="worker process killed",
        act=services.worker_killed,
        overrides=services.GRID,
        aside=services.JOBS,
        tuned=False,
        kills=True,
        says="BrokenProcessPool",
    ),
    Fault(
        name="driver killed, its workers train on",
        act=services.driver_of_jobs_killed,
        overrides=services.GRID,
        aside=services.JOBS,
        tuned=False,
        kills=True,
        says="done already|to train in",
        later=True,
    ),
    Fault(name="two drivers on one study", act=services.two_drivers),
    Fault(name="two drivers, one killed", act=services.two_drivers_one_killed, kills=True, says=AGAIN, later=True),
    Fault(name="SIGTERM", signals=(signal.SIGTERM,), says="^stopp", silent=True),
    Fault(name="Ctrl-C", signals=(signal.SIGINT,), says="^stopp"),
    Fault(name="Ctrl-C twice", signals=(signal.SIGINT, signal.SIGINT), says="^stopp"),
    Fault(
        # silent where it is a cache that is not written
        name="disk full, at any file",
        plant=in_replace(_raiser(_full)),
        calls=30,
        says="No space left",
        silent=True,
    ),
    Fault(name="disk full, a small file system", act=services.disk_full, says="^error: .*make room"),
    Fault(
        name="read-only, at any file",
        plant=in_replace(_raiser(_read_only)),
        calls=30,
        says="Read-only file system",
        silent=True,
    ),
    Fault(name="read-only file system", act=services.read_only, says="Read-only file system"),
    Fault(name="clock jumps a day", plant=clock, calls=100),
    Fault(
        name="out of memory, forward",
        plant=in_pack("hidden", _raiser(_no_memory)),
        calls=30,
        says="out of memory|OutOfMemory",
    ),
    Fault(name="out of memory, backward", plant=in_backward, calls=16, says="out of memory|OutOfMemory"),
    Fault(
        name="out of memory, evaluation",
        plant=in_pack("scores", _raiser(_no_memory)),
        calls=9,
        says="out of memory|OutOfMemory",
    ),
    Fault(
        name="out of memory, export",
        plant=in_results("write_adapter", _raiser(_no_memory)),
        calls=6,
        says="OutOfMemory",
    ),
    Fault(name="NaN in one slot's weights", plant=not_a_number_in_weights, calls=16, diverges=True, says="diverged"),
    Fault(name="NaN in one slot's data", plant=not_a_number_in_data, calls=16, diverges=True, says="diverged"),
    Fault(name="NaN in one slot's rate", plant=not_a_number_in_rate, calls=30, diverges=True, says="diverged"),
    Fault(
        name="data changed between starts",
        act=services.data_changed,
        kills=True,
        says="has changed since",
        later=True,
        silent=True,
    ),
    Fault(
        name="model changed between starts",
        act=services.model_changed,
        kills=True,
        says="has changed since",
        later=True,
        silent=True,
    ),
    Fault(
        name="another version of a dependency",
        signals=(signal.SIGKILL,),
        again=another_version,
        kills=True,
        later=True,
        says="goes on with another",
        ready="*/checkpoint.safetensors",
    ),
    Fault(
        name="network gone in a download",
        act=services.network_gone,
        most=6,
        says=r"^error: \w+: .*hub cannot be reached|cannot be fetched",
    ),
    Fault(
        name="TensorBoard fails",
        plant=services.tracker("tensorboard"),
        calls=100,
        aside=("tracking=tensorboard",),
        says="not logged from here on",
    ),
    Fault(
        name="W&B fails",
        plant=services.tracker("wandb"),
        calls=14,
        aside=("tracking=wandb",),
        most=6,
        says="not logged from here on",
    ),
    Fault(
        name="MLflow fails",
        plant=services.tracker("mlflow"),
        calls=40,
        aside=("tracking=mlflow",),
        most=6,
        says="not logged from here on",
    ),
    Fault(name="PostgreSQL restarted", act=services.postgres_restarted, most=8, says="does not answer", silent=True),
    Fault(
        name="Ray worker killed",
        act=services.ray_worker_killed,
        overrides=services.GRID,
        aside=services.RAY,
        tuned=False,
        kills=True,
        most=5,
        says="died; its",
    ),
    Fault(
        name="Ray node lost",
        act=services.ray_node_lost,
        overrides=services.GRID,
        aside=services.RAY,
        tuned=False,
        kills=True,
        most=5,
        says="died; its|node of the Ray cluster",
    ),
    *(
        Fault(
            name=f"{file} {how}",
            signals=(signal.SIGKILL,),
            damage=damage,
            what=what,
            kills=True,
            later=True,
            says=SAID[file],
            silent=True,
        )
        for file, what in FILES.items()
        for how, damage in DAMAGES.items()
    ),
)


def by_name(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)
