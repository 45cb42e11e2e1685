"""Hostile programs end where they are and score nothing; what they were after is untouched."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeper.untrusted import sandbox
from sweeper.untrusted.sandbox import Limits, SandboxError

# A program is right if it defines answer() == 42; a hostile one may do what it likes before.
CHECK = "exec(PROGRAM, globals())\nassert answer() == 42"
LIMITS = Limits(wall_seconds=3.0, cpu_seconds=1)


pytestmark = pytest.mark.usefixtures("sandboxed")


def processes() -> set[str]:
    """Command lines of the jails that run."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line for line in lines if str(sandbox.JAIL) in line}


def test_right_and_wrong_programs() -> None:
    programs = [
        ("def answer(): return 42", CHECK),
        ("def answer(): return 41", CHECK),
        ("def answer(: return 42", CHECK),
        ("", CHECK),
        ("import math, random, re, decimal, itertools\ndef answer(): return math.comb(7, 2) * 2", CHECK),
    ]
    reasons = [outcome.reason for outcome in sandbox.run_all(programs, LIMITS)]
    assert reasons == ["passed", "AssertionError", "SyntaxError", "NameError", "passed"]


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "10 GB of memory": "x = bytearray(10 << 30)",
    "memory in pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "a file without end": "with open('file', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "many files": "n = 0\nwhile True:\n    n += 1\n    with open(f'{n}', 'wb') as f: f.write(bytes(1 << 20))",
    "exit as if all were well": "import os; os._exit(0)",
    "exit": "import sys; sys.exit(0)",
    "a signal to itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "a signal that stops it": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "no signal obeyed": (
        "import signal, time\nfor one in range(1, 65):\n    try: signal.signal(one, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "a crash": "import ctypes; ctypes.string_at(0)",
    "pipes full of memory": (
        "import fcntl, os\nends = [os.pipe() for _ in range(24)]\nfor _, end in ends:\n"
        "    os.set_blocking(end, False)\n    try: fcntl.fcntl(end, 1031, 1 << 20); os.write(end, bytes(1 << 20))\n"
        "    except OSError: pass\nwhile True: pass"
    ),
    "memory that processes share": (
        "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 64 << 20)); kept[-1].write(bytes(64 << 20))"
    ),
    "a file in shared memory": "with open('/dev/shm/x', 'wb') as f:\n    while True: f.write(bytes(1 << 12))",
    "names without end": "import os\nn = 0\nwhile True:\n    n += 1\n    os.mkdir(str(n))",
    "a file of holes": "f = open('file', 'wb'); f.truncate(1 << 40)",
    "questions without end": "class A:\n    def __eq__(self, other): return self == other\nanswer = A\nA() == 1",
    "deep recursion": "def f(): return f()\nf()",
    "a socket": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=2)",
    "a name": "import socket; socket.getaddrinfo('localhost', 80); socket.create_connection(('localhost', PORT))",
    "its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "the parent outside": "import os, signal; os.kill(PARENT, signal.SIGKILL)",
    "all": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)",
    "a file outside": "open('OUTSIDE/file', 'w').write('x')",
    "a deletion outside": "import os; os.unlink('OUTSIDE/kept')",
    "another mount": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.mount(None, b'/', None, 32 | 4096, None) == 0"
    ),
    "another user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "noise": "while True: print('x' * 10000)",
    "noise wherever it can be heard": (
        "import os\nwhile True:\n    for fd in range(64):\n        try: os.write(fd, b'passed' * 10000)\n"
        "        except OSError: pass"
    ),
}


def harm(name: str, folder: Path) -> list[str]:
    """Runs an attack of HOSTILE beside a folder that anybody may write to; what it did."""
    kept = folder / "kept"
    kept.write_text("here")
    os.chmod(folder, 0o777)
    before = processes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        program = HOSTILE[name].replace("PARENT", str(os.getpid())).replace("OUTSIDE", str(folder))
        program = program.replace("PORT", str(server.getsockname()[1]))
        began = time.monotonic()
        outcome = sandbox.run(program, CHECK, LIMITS)
        seconds = time.monotonic() - began
        try:
            server.accept()
            reached = True
        except BlockingIOError:
            reached = False
    found = {
        "passed": outcome.passed, "reached a server": reached, "took long": seconds >= LIMITS.wall_seconds + 3,
        "changed files": [path.name for path in folder.iterdir()] != ["kept"] or kept.read_text() != "here",
        "left processes": not processes() <= before,
    }  # fmt: skip
    return [what for what, so in found.items() if so]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_held_and_score_nothing(name: str, tmp_path: Path) -> None:
    assert harm(name, tmp_path) == []


@pytest.mark.parametrize(
    "program",
    [
        "import os\nassert not [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 60]",
        "import os\nassert sum(1 for _ in os.scandir('.')) == 0",
        "import os\nassert not set(os.environ) - {'OMP_NUM_THREADS', 'PATH', 'HOME', 'LC_CTYPE', 'PWD'}",
        "import os\nassert not os.path.exists('/sys')",
        "import os\n"
        "assert sorted(os.listdir('/')) == sorted({'etc', 'dev', 'proc', *[SHOWN]} & set(os.listdir('/')) | TMP)",
        "import os\nassert set(os.listdir('/etc')) <= {'ld.so.cache'}",
        "import os\nassert set(os.listdir('/dev')) == {'full', 'null', 'random', 'shm', 'urandom', 'zero'}",
        "import sys\nassert not {name for name in sys.modules if name.startswith('sweeper')}",
    ],
)
def test_a_program_sees_nothing_of_outside(program: str) -> None:
    top = Path(tempfile.gettempdir()).parts[1]
    program = program.replace("SHOWN", "'bin', 'lib', 'lib64', 'usr'").replace("TMP", f"{{{top!r}}}")
    assert sandbox.run(program + "\ndef answer(): return 42", CHECK, LIMITS).passed


@pytest.fixture
def untested() -> Iterator[None]:
    """Limits are tested on this machine once per process: here again, and again afterwards."""
    sandbox.ready.cache_clear()
    yield
    sandbox.ready.cache_clear()


@pytest.mark.usefixtures("untested")
def test_nothing_runs_unless_every_limit_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PROBES", {"thoughts": "pass"})
    with pytest.raises(SandboxError, match=r"safely here \(the limit on thoughts is not enforced\); .*UNSAFE_EXEC=1"):
        sandbox.run_all([("", "pass")])
    monkeypatch.setenv(sandbox.ALLOW, "1")
    assert sandbox.run_all([("def answer(): return 42", CHECK)])[0].passed


@pytest.mark.usefixtures("untested")
def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux namespaces; remove the metric pass_at_1, or set SWEEPER_UNSAFE"):
        sandbox.check()
