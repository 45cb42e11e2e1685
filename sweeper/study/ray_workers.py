"""Workers over Ray: one a GPU, on this machine or a cluster, each an engine that pulls runs from the one scheduler.

The scheduler stays in the driver's process. A worker reaches it through the desk, an actor that only keeps questions
until the driver has answered them: what may come, runs to train, what happened. A worker that dies gives its runs back;
a machine that joins gets a worker.
"""

import asyncio
import dataclasses
import itertools
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from sweeper import register
from sweeper.errors import Problems, SweeperError, first_line, gist
from sweeper.lost import ContextLost
from sweeper.spec import Settings
from sweeper.study.scheduler import Outcome, Scheduler, stop_on_signal
from sweeper.training.events import Evaluated, Event, Remark, RunFinished, RunStarted, Stage
from sweeper.training.source import PendingGroup, Pulled

FLUSH_SECONDS = 0.5  # how long a worker keeps steps to itself
POLL_SECONDS = 0.5
CONNECT_SECONDS = 5.0
STOP_SECONDS = 120.0  # for workers to checkpoint what trains
MOST_LOST = 8  # workers that may die for each one there is, until something is taken to be wrong with all


class NoWorkers(SweeperError):
    """Ray cannot be reached, or every worker died."""

    exit_code = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Where workers run.

    Attributes:
        address: of a running cluster ("auto" finds it), null starts Ray on this machine for the length of the command.
        workers: how many; null is one for each GPU there is, also later, or two where there is none.
        cpus_per_worker: CPU cores that Ray sets aside for each; null is an equal share of this machine's.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SweeperError(f"hydra.launcher.{name} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What the driver answers to a report: runs to end, and whether to stop altogether."""

    prune: frozenset[str] = frozenset()
    stop: bool = False


class _Desk:
    """Keeps workers' questions until they are answered; runs as an asynchronous Ray actor."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.open: list[tuple[int, str, str, Any]] = []
        self.replies: dict[int, asyncio.Future[Any]] = {}
        self.asked = asyncio.Event()

    async def ask(self, worker: str, what: str, content: Any) -> Any:
        number = next(self.numbers)
        self.replies[number] = asyncio.get_running_loop().create_future()
        self.open.append((number, worker, what, content))
        self.asked.set()
        return await self.replies[number]

    async def take(self, seconds: float) -> list[tuple[int, str, str, Any]]:
        try:
            await asyncio.wait_for(self.asked.wait(), seconds)
        except TimeoutError:
            return []
        found, self.open = self.open, []
        self.asked.clear()
        return found

    async def answer(self, replies: dict[int, Any]) -> None:
        for number, reply in replies.items():
            future = self.replies.pop(number)
            if not future.cancelled():
                future.set_result(reply)


class _Messenger:
    """The scheduler as a worker sees it; the engine may ask from one thread while another tells what it did."""

    def __init__(self, name: str, desk: Any) -> None:
        self.name, self.desk = name, desk
        self.lock = threading.RLock()
        self.events: list[Event] = []
        self.sent = time.monotonic()
        self.prune: frozenset[str] = frozenset()
        self.stop = False

    def _ask(self, what: str, content: Any) -> Any:
        return ray.get(self.desk.ask.remote(self.name, what, content))

    def pending(self) -> Sequence[PendingGroup]:
        with self.lock:
            self.flush()
            found: list[PendingGroup] = self._ask("pending", None)
            return found

    def pull(self, count: int, groups: Collection[str]) -> Pulled:
        with self.lock:
            self.flush()
            found: Pulled = self._ask("pull", (count, list(groups)))
            if lines := [line for run in found.runs for line in register.missing(run.spec)]:
                raise Problems(lines)
            return found

    def to_prune(self) -> Collection[str]:
        return self.prune

    def report(self, event: Event) -> None:
        """Sends events on, in bunches; what the scheduler may act on at once."""
        urgent = isinstance(event, RunFinished | RunStarted | Stage | Remark | Evaluated)
        with self.lock:
            self.events.append(event)
            if urgent or time.monotonic() - self.sent > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        with self.lock:
            if self.events or time.monotonic() - self.sent > FLUSH_SECONDS:
                events, self.events, self.sent = self.events, [], time.monotonic()
                reply: Reply = self._ask("report", events)
                self.prune, self.stop = reply.prune, reply.stop


class _Worker:
    """One engine, on one device; runs as a Ray actor."""

    def __init__(self, name: str, desk: Any, settings: Settings, folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        register.load(settings.plugins)
        self.settings, self.messenger = settings, _Messenger(name, desk)

    def train(self) -> None:
        from sweeper.training import train_runs

        def should_stop() -> bool:
            return self.messenger.stop

        train_runs(self.messenger, self.settings, should_stop=should_stop)
        self.messenger.flush()


@dataclasses.dataclass(kw_only=True)
class _Crew:
    """The workers there are: name -> actor and the reference of its work."""

    scheduler: Scheduler
    ray_settings: RaySettings
    desk: Any
    alive: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    holds: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    lost: int = 0
    gpus: int = 0  # of the cluster
    looked: float = -math.inf

    def look(self) -> None:
        """Asks Ray what the cluster has now, if it was not asked just before; everything else goes by the answer."""
        if time.monotonic() - self.looked >= POLL_SECONDS:
            self.gpus, self.looked = _gpus(), time.monotonic()

    def wanted(self) -> int:
        """How many workers there shall be."""
        if self.ray_settings.workers is not None:
            return self.ray_settings.workers
        return self.gpus or 2

    def hire(self) -> None:
        """Starts workers for what is left to do."""
        for _ in range(self.wanted() - len(self.alive)):
            name = f"worker {next(self.numbers) + 1}"
            gpus = min(1, self.gpus)
            cpus = self.ray_settings.cpus_per_worker or max(1, (os.cpu_count() or 1) // self.wanted())
            options = {
                "num_gpus": gpus, "num_cpus": 0 if gpus else cpus, "max_restarts": 0,
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cpus), "GOMP_SPINCOUNT": "2000"}},
            }  # fmt: skip
            remote: Any = ray.remote(_Worker)
            actor = remote.options(**options).remote(name, self.desk, self.scheduler.settings, os.getcwd())
            self.alive[name], self.holds[name] = (actor, actor.train.remote()), set()

    def room(self, worker: str) -> int:
        """Runs that a worker may take now: its part of all that train or wait, less what it has."""
        return math.ceil(self.scheduler.outstanding() / max(self.wanted(), 1)) - len(self.holds[worker])

    def pending(self, worker: str) -> list[PendingGroup]:
        """What may still come to a worker: it shall keep no slots, or lanes of its steps, for what others train."""
        groups, room = self.scheduler.pending(), max(1, self.room(worker))
        left = sum(group.left for group in groups)
        in_all = left + sum(map(len, self.holds.values()))
        mine = in_all / max(self.wanted(), 1) - len(self.holds[worker])
        part = min(1.0, max(0.0, mine / left)) if 0 < left < math.inf else 1.0
        return [dataclasses.replace(group, share=room, left=part * group.left) for group in groups]

    def answer(self, worker: str, what: str, content: Any, *, stop: bool) -> Any:
        if what == "pending":
            return [] if stop else self.pending(worker)
        if what == "pull":
            count, groups = content
            count = 0 if stop else min(count, self.room(worker))
            pulled = self.scheduler.pull(count, groups, spread=self.wanted() > 1)
            self.holds[worker] |= {run.run_id for run in pulled.runs}
            return pulled
        for event in content:
            if len(self.alive) > 1 and (isinstance(event, Stage) or (isinstance(event, Remark) and event.by_worker)):
                event = dataclasses.replace(event, message=f"{worker}: {event.message}")
            if isinstance(event, RunFinished):
                self.holds[worker].discard(event.record.run_id)
            self.scheduler.report(event)
        return Reply(prune=frozenset(self.scheduler.to_prune()) & self.holds[worker], stop=stop)

    def notice(self) -> None:
        """Lets go of workers that are done or dead; the runs of dead ones go back."""
        ended = [name for name, (_, ref) in self.alive.items() if ray.wait([ref], timeout=0)[0]]
        for name in ended:
            actor, ref = self.alive.pop(name)
            runs = self.holds.pop(name)
            try:
                ray.get(ref)
            except RayActorError:
                self.lost += 1
                self.scheduler.notify(Remark(message=f"{name} died; its {len(runs)} runs go to others"))
                self.scheduler.lose(runs, f"{name} died while it trained this run")
            except ContextLost as error:  # which runs it may be for lies in their folders
                self.lost += 1
                self.scheduler.notify(Remark(message=f"{name} lost its GPU ({error.reason}); its runs go to others"))
                ray.kill(actor)
                self.scheduler.give_back(runs)
            except RayError as error:  # an error of ours in the worker, with its own traceback
                raise error.as_instanceof_cause() if hasattr(error, "as_instanceof_cause") else error from None
            if self.lost > MOST_LOST * self.wanted():
                raise NoWorkers(f"{self.lost} workers died; see Ray's logs")


def run(scheduler: Scheduler, ray_settings: RaySettings) -> Outcome:
    """Trains what a scheduler has on Ray workers. Ctrl-C once stops them after their step, twice at once.

    Raises:
        NoWorkers: Ray cannot be reached, or workers keep dying.
    """
    scheduler.settings = dataclasses.replace(
        scheduler.settings, output_root=str(Path(scheduler.settings.output_root).absolute())
    )
    with _connected(ray_settings), stop_on_signal() as stop:
        remote: Any = ray.remote(_Desk)
        desk: Any = remote.options(num_cpus=0, max_concurrency=1000).remote()
        crew = _Crew(scheduler=scheduler, ray_settings=ray_settings, desk=desk)
        patience = math.inf
        try:
            while time.monotonic() < patience:
                crew.look()
                if stop.is_set():
                    patience = min(patience, time.monotonic() + STOP_SECONDS)
                elif scheduler.pending():
                    crew.hire()
                if not crew.alive:
                    break
                questions = ray.get(desk.take.remote(POLL_SECONDS))
                replies = {
                    number: crew.answer(worker, what, content, stop=stop.is_set())
                    for number, worker, what, content in questions
                    if worker in crew.holds
                }
                if replies:
                    ray.get(desk.answer.remote(replies))
                crew.notice()
        except RayActorError as error:
            raise NoWorkers(
                "the node of the Ray cluster that passed messages between this command and its workers is gone "
                f"({gist(error, 120)}): give the same command again, it goes on from what is saved"
            ) from error
        finally:
            for actor, _ in crew.alive.values():
                ray.kill(actor)
            scheduler.close()
    return Outcome(records=scheduler.records, interrupted=stop.is_set())


def _gpus() -> int:
    """GPUs of the cluster as it is now."""
    resources: Any = ray.cluster_resources  # untyped in Ray
    return int(resources().get("GPU", 0))


def _reachable(address: str | None) -> None:
    """Raises `NoWorkers` where nothing listens at host:port, which Ray itself would find out in minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise NoWorkers(f"hydra.launcher.address={address}: no Ray cluster answers there ({error})") from None


@contextmanager
def _connected(ray_settings: RaySettings) -> Iterator[None]:
    """Ray, started if no cluster is named, and left as it was found."""
    mine = not ray.is_initialized()
    if mine:
        _reachable(ray_settings.address)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(
                address=ray_settings.address, log_to_driver=False, include_dashboard=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NoWorkers(f"hydra.launcher.address={ray_settings.address}: {first_line(error)}") from None
    try:
        yield
    finally:
        if mine:
            ray.shutdown()
