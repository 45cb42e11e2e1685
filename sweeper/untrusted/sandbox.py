"""Runs model-written programs in a kernel-enforced sandbox, one process tree each.

A program sees no network, no processes but its own, and a read-only file system without a user's files, apart from an
empty temporary folder. CPU time, memory, processes, file size and wall time are limited; on timeout the whole tree is
killed. `jail.py` enforces this. `ready` tests it on this machine, and if any limit fails nothing is run, unless the
user accepts the risk with the environment variable SWEEPER_UNSAFE_EXEC=1. The check runs in a process of its own,
which alone knows the check and alone can tell how it ended (`checking.py`); the program's process answers its calls
(`program.py`).
"""

import builtins
import contextlib
import functools
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sweeper.errors import SweeperError
from sweeper.untrusted import syscalls, wire

JAIL = Path(__file__).parent
# the folder as a package of its own: in the sandbox there are no installed packages, hence no `sweeper`
START = """\
import sys, types
package = types.ModuleType("untrusted")
package.__path__ = [sys.argv[1]]
sys.modules["untrusted"] = package
from untrusted import jail
jail.main()
"""
ALLOW = "SWEEPER_UNSAFE_EXEC"
PASSED, WALL = "passed", "wall time"
# all that a check can say: no text of the program's choice leaves the sandbox
ANSWERS = {PASSED, "broken answer", *(name for name, one in vars(builtins).items() if isinstance(one, type))}


class SandboxError(SweeperError):
    """Programs cannot be run safely on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits per program: seconds of wall clock and CPU, bytes of address space per process, processes (including
    threads), bytes of the working folder and of any file."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 8
    memory: int = 1 << 29
    processes: int = 8
    disk: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `passed`, or why it failed (a builtin exception's class, a limit, or an exit status)."""

    reason: str

    @property
    def passed(self) -> bool:
        return self.reason == PASSED


def run_all(programs: Sequence[tuple[str, str]], limits: Limits | None = None) -> list[Outcome]:
    """Runs every (program, check) pair, one per CPU at a time.

    A check is Python source that sees the program as the string `PROGRAM`, runs it with `exec` or `eval`, and raises
    if it is wrong; it passes if it runs to the end. It gives the program plain values and functions, and gets plain
    values and `checking.Remote`s back.

    Raises:
        SandboxError: this machine cannot sandbox a program, see `ready`.
    """
    if not programs:
        return []
    contained = check()
    with ThreadPoolExecutor(max_workers=min(len(programs), max(1, len(os.sched_getaffinity(0))))) as pool:
        return list(pool.map(lambda one: run(one[0], one[1], limits or Limits(), contained=contained), programs))


def run(program: str, check: str, limits: Limits, *, contained: bool = True) -> Outcome:
    """Runs one check on one program, without namespaces and the read-only file system if not `contained`."""
    with tempfile.TemporaryDirectory(prefix="sweeper-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # the jail drops root before it enters
        places = {name: str(Path(folder, name)) for name in ("folder", "python", "root")}
        for place in places.values():
            os.mkdir(place)
        task = wire.frame(asdict(limits) | places | {"contained": contained})
        work = wire.frame({"program": program, "check": check})
        process = subprocess.Popen(
            [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-X", "utf8", "-c", START, str(JAIL)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd="/",
            env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": places["folder"]},
        )  # fmt: skip
        try:
            said, problem = process.communicate(task + work, timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(WALL)
        finally:
            _kill(process)
    if (answer := said.decode(errors="replace")) in ANSWERS:
        return Outcome(answer)
    if process.returncode == 3 and problem:
        raise SandboxError(f"programs cannot be sandboxed here: {problem.decode(errors='replace').strip()}")
    return Outcome(f"died ({process.returncode})")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the jail and thereby everything in its PID namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(Exception):
        process.communicate(timeout=5)


def python() -> str:
    """The Python that programs run on; its version can change their results."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def check() -> bool:
    """True if programs run sandboxed, False if the user allows them to run without a sandbox.

    Raises:
        SandboxError: sandboxing does not work here and the user has not allowed running without it.
    """
    if os.environ.get(ALLOW) == "1":
        return False
    ready()
    return True


RUN = "exec(PROGRAM, globals())"
HARMLESS = """\
import decimal, math, random, re, socket
x = math.comb(3, 3)
with open("file", "w") as file:
    file.write("x")
"""
# limit -> a program that runs to the end only if the limit is not enforced
PROBES = {
    "network": "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())",
    "file system": "import tempfile, os; [open(d + '/sweeper-probe', 'w') for d in ('/tmp', '/var/tmp', '/dev/shm')]",
    "memory": "x = bytearray(1 << 30)",
    "processes": (
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(1)\n        os._exit(0)"
    ),
    "processes of others": "import os\nassert os.getppid() <= 1\nos.kill(PARENT, 0)",
    "capabilities": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(b'tmpfs', b'.', b'tmpfs', 0, None) == 0"
    ),
    "system calls": "import ctypes\nassert ctypes.CDLL(None).syscall(KEYCTL, 0, -3, 1, 0, 0) >= 0",
    "sockets at paths": "import socket; socket.socket(socket.AF_UNIX)",
    "files of a user": f"open({str(JAIL / 'jail.py')!r})",
}


@functools.cache
def ready() -> None:
    """Tests, once per process, that a harmless program runs on this machine and that every limit is enforced.

    Raises:
        SandboxError: names the limit that is not enforced.
    """
    limits = Limits(wall_seconds=20.0)
    otherwise = f"remove the metric pass_at_1, or set {ALLOW}=1 to run programs without a sandbox"
    if sys.platform != "linux":
        raise SandboxError(f"pass_at_1 runs generated programs in a sandbox of Linux namespaces; {otherwise}")
    try:
        if not (harmless := run(HARMLESS, f"{RUN}\nassert x == 1", limits)).passed:
            raise SandboxError(f"a harmless program ended with {harmless.reason}")
        keyctl = str(syscalls.number("keyctl"))
        for name, probe in PROBES.items():
            if run(probe.replace("PARENT", str(os.getpid())).replace("KEYCTL", keyctl), RUN, limits).passed:
                raise SandboxError(f"the limit on {name} is not enforced")
    except (SandboxError, OSError) as error:
        raise SandboxError(f"pass_at_1 cannot run generated programs safely here ({error}); {otherwise}") from None
