"""Faults that need more than one process, a service, or a file system of their own."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.harness import Attempt, Plant

GRID = ("optim.lr=0.001", "rank=2,4", "seed=0,1")
JOBS = ("hydra/launcher=forked",)
RAY = ("hydra/launcher=ray", "hydra.launcher.workers=2")


# -- processes that train for a driver


def children(pid: int) -> list[Any]:
    import psutil

    try:
        return [one for one in psutil.Process(pid).children() if one.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []


def worker_killed(attempt: "Attempt") -> int | None:
    process = attempt.start()
    if not attempt.sleep(process):
        return None
    left, crew = attempt.left(), children(process.pid or 0)
    if not crew:
        attempt.wait(process)
        return None
    os.kill(attempt.chance.choice(crew).pid, signal.SIGKILL)
    attempt.wait(process)
    return left


def driver_of_jobs_killed(attempt: "Attempt") -> int | None:
    process = attempt.start()
    if not attempt.sleep(process):
        return None
    left, crew = attempt.left(), children(process.pid or 0)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    attempt.stack.callback(_end, crew)  # until then they train on, beside the command that is repeated
    return left if crew else None


def _end(processes: list[Any]) -> None:
    import psutil

    for one in processes:
        with contextlib.suppress(psutil.Error):
            one.kill()


def two_drivers(attempt: "Attempt") -> int | None:
    first = attempt.start()
    first.join(attempt.chance.uniform(0, 0.5 * attempt.harness.seconds))
    left = attempt.left()
    if not first.is_alive():
        attempt.wait(first)
        return None
    second = attempt.start()
    codes = [attempt.wait(one, 60 + 40 * attempt.harness.seconds) for one in (first, second)]
    if codes != [0, 0]:
        raise AssertionError(f"two drivers ended with {codes}: {attempt.log.read_text()[-3000:]}")
    return left


def two_drivers_one_killed(attempt: "Attempt") -> int | None:
    first = attempt.start()
    first.join(attempt.chance.uniform(0, 0.5 * attempt.harness.seconds))
    second = attempt.start()
    second.join(attempt.chance.uniform(0, 0.7 * attempt.harness.seconds))
    both = first.is_alive() and second.is_alive()
    left = attempt.left()
    struck, other = attempt.chance.sample([first, second], 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(struck.pid or 0, signal.SIGKILL)
    for one in (struck, other):
        attempt.wait(one, 60 + 40 * attempt.harness.seconds)
    return left if both else None


# -- file systems


def _mounted(attempt: "Attempt", size: int) -> Path:
    """A file system of so many bytes in memory, where the study lies."""
    folder = attempt.root / "mounted"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    attempt.stack.callback(lambda: subprocess.run(["umount", "-l", folder], check=True))
    return folder


def _remount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", folder], stderr=subprocess.DEVNULL).returncode == 0


def can_mount() -> bool:
    """Whether this user may mount file systems."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def disk_full(attempt: "Attempt") -> int | None:
    """The file system of the study has less room than the sweep needs."""
    attempt.expected  # noqa: B018
    attempt.output = folder = _mounted(attempt, attempt.chance.randrange(64, 640) << 10)
    process = attempt.start()
    code = attempt.wait(process)
    attempt.mend = lambda: _enlarged(folder)
    return attempt.left() if code and "No space left" in attempt.log.read_text() else None


def _enlarged(folder: Path) -> None:
    assert _remount(folder, "size=64m")


def read_only(attempt: "Attempt") -> int | None:
    """The file system of the study becomes read-only."""
    attempt.expected  # noqa: B018
    attempt.output = folder = _mounted(attempt, 64 << 20)
    process = attempt.start()
    if not attempt.sleep(process):
        return None
    left = attempt.left()
    until = time.monotonic() + 5
    while not _remount(folder, "ro"):  # a file that is open for writing holds it up
        if time.monotonic() > until or not process.is_alive():
            attempt.wait(process)
            return None
    attempt.wait(process)
    attempt.mend = lambda: _writable(folder)
    return left


def _writable(folder: Path) -> None:
    assert _remount(folder, "rw")


# -- what a run is made of


def data_changed(attempt: "Attempt") -> int | None:
    """The file of examples is another one when the command is repeated."""
    path = attempt.harness.root / "data.jsonl"
    _write_examples(path, 1)
    attempt.files = "data"
    attempt.overrides += ["dataset=jsonl", f"dataset.path={path}"]
    return _changed(attempt, lambda: _write_examples(path, 2))


def _write_examples(path: Path, factor: int) -> None:
    import json

    lines = [{"id": str(n), "prompt": f"{factor} times {n} is", "response": str(factor * n)} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def model_changed(attempt: "Attempt") -> int | None:
    """The base model's folder has other weights when the command is repeated."""
    folder = attempt.harness.root / "model"
    write_model(folder, 0)
    attempt.files = "model"
    attempt.overrides += ["model=path", f"model.location={folder}"]
    return _changed(attempt, lambda: write_model(folder, 1))


def write_model(folder: Path, seed: int) -> None:
    """A tiny Llama with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sweeper.models.files import byte_tokenizer

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=512, max_position_embeddings=512, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _changed(attempt: "Attempt", change: Callable[[], None]) -> int | None:
    """Kills a sweep, changes what it reads, and expects both what it left and what is made of the new."""
    before = attempt.expected
    process = attempt.start()
    alive = attempt.sleep(process)
    left = attempt.left()
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGKILL)
    attempt.wait(process)
    if not alive or left == 0:
        return None
    change()
    attempt.kept, attempt.kept_spare = _ended_runs(attempt, before), lambda: before
    attempt.files += ", changed"
    return left


def _ended_runs(attempt: "Attempt", before: Any) -> Any:
    from tests.faults.outcomes import ENDED, outcome

    found = outcome(attempt.study, deep=False)
    return {run_id: one for run_id, one in before.items() if run_id in found and found[run_id].status in ENDED}


# -- trackers


def tracker(name: str) -> "Plant":
    """From a call of a tracker's own package on, it fails: when a log is opened, written or closed."""

    def plant(strike: Callable[..., bool]) -> None:
        from sweeper.reporting import trackers

        kind = trackers.TRACKERS[name]
        gone: list[bool] = []

        def check() -> None:
            if gone or strike():
                gone.append(True)
                raise ConnectionError("the service is gone, by a fault that was planted")

        def open_(settings: Any, options: Any) -> Any:
            opened = kind.open(settings, options)

            def open_log(begun: Any) -> Any:
                check()
                log = opened(begun)
                for method in ("log", "close"):
                    setattr(log, method, _checked(check, getattr(log, method)))
                return log

            return open_log

        import dataclasses

        trackers.TRACKERS[name] = dataclasses.replace(kind, open=open_)  # type: ignore[index]

    return plant


def _checked(check: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        check()
        return original(*args, **kwargs)

    return call


# -- PostgreSQL

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


class Postgres:
    """A server of its own, which can be restarted."""

    def __init__(self) -> None:
        self.programs = PROGRAMS[-1].parent if PROGRAMS else Path(str(shutil.which("initdb"))).parent
        self.root = os.geteuid() == 0  # the server refuses to run as root
        self.user = "postgres" if self.root else pwd.getpwuid(os.geteuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        if self.root:
            shutil.chown(self.folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.data = str(self.folder / "data")
        self._call("initdb", "-D", self.data, "--auth=trust", "-U", "sweeper")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://sweeper@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        self._call("pg_ctl", "-D", self.data, "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str) -> None:
        self._call("pg_ctl", "-D", self.data, "-m", mode, "stop")

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.programs / program, *arguments], check=True, user=self.user if self.root else None, cwd=self.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        )  # fmt: skip


def postgres_restarted(attempt: "Attempt") -> int | None:
    """The database of the search is shut down and started again, at once or after some seconds."""
    attempt.expected  # noqa: B018
    server = Postgres()
    attempt.stack.callback(server.close)
    attempt.aside.append(f"hydra.sweeper.storage={server.url}")
    process = attempt.start()
    if not attempt.sleep(process):
        return None
    left = attempt.left()
    server.stop(attempt.chance.choice(("fast", "immediate")))
    time.sleep(attempt.chance.choice((0.0, 2.0, 5.0)))
    server.start()
    attempt.wait(process)
    return left


# -- Ray


def _workers(pid: int) -> list[Any]:
    import psutil

    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "_Worker.train" in " ".join(one.cmdline()):
                found.append(one)
    return found


def _both_train(attempt: "Attempt", process: Any, crew: Callable[[], list[Any]]) -> bool:
    """Waits until two workers are there and a run is unfinished that has been saved."""
    until = time.monotonic() + 240
    while process.is_alive() and time.monotonic() < until:
        with contextlib.suppress(Exception):
            if len(crew()) == 2 and list(attempt.study.glob("*/checkpoint.safetensors")):
                time.sleep(attempt.chance.uniform(0, 0.5))
                return attempt.left() > 0
        time.sleep(0.05)
    return False


def ray_worker_killed(attempt: "Attempt") -> int | None:
    attempt.expected  # noqa: B018
    attempt.aside.append("hydra.launcher.address=local")  # whatever else runs on this machine
    process = attempt.start()
    if not _both_train(attempt, process, lambda: _workers(process.pid or 0)):
        attempt.wait(process, 240)
        return None
    left = attempt.left()
    os.kill(attempt.chance.choice(_workers(process.pid or 0)).pid, signal.SIGKILL)
    attempt.wait(process, 300)
    return left


def ray_node_lost(attempt: "Attempt") -> int | None:
    """One of two machines of a Ray cluster, each with a worker, is gone with all of its processes."""
    attempt.expected  # noqa: B018
    cluster = _Cluster(attempt)
    attempt.stack.callback(cluster.close)
    attempt.aside += [f"hydra.launcher.address=127.0.0.1:{cluster.port}", "hydra.launcher.cpus_per_worker=1"]
    process = attempt.start()
    if not _both_train(attempt, process, cluster.workers):
        attempt.wait(process, 240)
        return None
    left = attempt.left()
    cluster.lose()
    attempt.wait(process, 300)
    return left


class _Cluster:
    """Two Ray nodes of one processor each, on this machine."""

    def __init__(self, attempt: "Attempt") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # on this machine alone; a token that a former cluster left is of no use to this one
        attempt.environment["RAY_AUTH_MODE"] = "disabled"
        self.environment = os.environ | {"SWEEPER_CACHE": str(attempt.cache), **attempt.environment}
        self.nodes = [self._start("--head", f"--port={self.port}", "--include-dashboard=false")]
        time.sleep(8)
        self.nodes.append(self._start(f"--address=127.0.0.1:{self.port}"))
        time.sleep(4)

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                "--node-ip-address=127.0.0.1", "--object-store-memory=80000000", *arguments,
            ],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def workers(self) -> list[Any]:
        return [one for node in self.nodes for one in _workers(node.pid)]

    def lose(self) -> None:
        _kill_tree(self.nodes[1].pid)

    def close(self) -> None:
        for node in reversed(self.nodes):
            _kill_tree(node.pid)
            node.wait()
        note = Path("/tmp/ray/ray_current_cluster")  # by which the next driver without an address would look for it
        if note.exists() and note.read_text().endswith(f":{self.port}"):
            note.unlink()


def _kill_tree(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        whole = psutil.Process(pid)
        for one in [*whole.children(recursive=True), whole]:
            with contextlib.suppress(psutil.Error):
                one.kill()


# -- the hub


def network_gone(attempt: "Attempt") -> int | None:
    """The hub stops answering in the middle of a base model's weights."""
    from tests.faults.hub import serve

    folder = attempt.harness.root / "hub-model"
    if not folder.exists():
        write_model(folder, 0)
    attempt.files = "hub"
    attempt.overrides += ["model=path", "model.source=hub", "model.location=faults/tiny"]
    hub = attempt.stack.enter_context(serve(folder, attempt.root))
    attempt.prepare = hub.use
    hub.cut = None
    attempt.expected  # noqa: B018
    size = (folder / "model.safetensors").stat().st_size
    hub.cut = attempt.chance.randrange(1, size)
    attempt.wait(attempt.start())
    if not hub.struck:
        return None
    hub.cut = None
    return attempt.left()
