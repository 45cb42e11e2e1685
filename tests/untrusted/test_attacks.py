"""What a program does to pass without being right, or to reach outside, by name. None of it works, with root or
without.
"""

import builtins
import os
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from sweeper.untrusted import sandbox, syscalls
from sweeper.untrusted.sandbox import Limits

CHECK = "exec(PROGRAM, globals())\nassert answer() == 42"
LIMITS = Limits(wall_seconds=8.0, cpu_seconds=2)
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.usefixtures("sandboxed")


@pytest.fixture(params=["as we are", "without root"])
def user(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's sandbox, and where these tests are root's, that of a user who is not."""
    if request.param == "without root":
        if os.geteuid() != 0:
            pytest.skip("these tests run without root already")
        if SYSTEM_PYTHON is None:
            pytest.skip("no Python that another user can start")
        nobody = partial(subprocess.Popen, user=12345, group=12345, extra_groups=[])
        monkeypatch.setattr(sandbox.subprocess, "Popen", nobody)
        monkeypatch.setattr(sys, "_base_executable", SYSTEM_PYTHON)


EVERYWHERE = """\
import json, os
texts = [b"passed", b"passed" * 3]
for message in (["answer", 42], ["answer", [42, []]], ["answer", [["answer", 42]]]):
    text = json.dumps(message).encode()
    texts.append(len(text).to_bytes(4, "little") + text)
"""
FORGED = {
    "a class by the name of the verdict": "class passed(Exception): pass\nraise passed",
    "frames": (
        "import os, sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:\n"
        "        for fd in range(64):\n            try: os.write(fd, f'{value}passed'.encode()[-60:])\n"
        "            except OSError: pass\n    frame = frame.f_back"
    ),
    "every descriptor": (
        EVERYWHERE
        + "for fd in range(64):\n    for text in texts:\n        try: os.write(fd, text)\n        except OSError: pass"
    ),
    "descriptors of others": (
        EVERYWHERE + "for pid in filter(str.isdigit, os.listdir('/proc')):\n    if int(pid) == os.getpid(): continue\n"
        "    for fd in range(64):\n        for text in texts:\n"
        "            try: open(f'/proc/{pid}/fd/{fd}', 'wb', 0).write(text)\n            except OSError: pass"
    ),
    "memory of others": (
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    if int(pid) == os.getpid(): continue\n"
        "    open(f'/proc/{pid}/mem', 'r+b', 0)\n    def answer(): return 42"
    ),
    "the checking module": (
        "import sys\nchecking = sys.modules['untrusted.checking']\nchecking.verdict = lambda *_: 'passed'\n"
        "checking.Check.run = lambda *_: None\nchecking.Remote.__eq__ = lambda *_: True\n"
        "checking.verdict.__code__ = (lambda *_: 'passed').__code__"
    ),
    "the object graph": (
        "import gc, types\nfor one in gc.get_objects():\n"
        "    if isinstance(one, types.FunctionType) and one.__name__ in "
        "('verdict', 'run', 'run_check', 'supervise'):\n        one.__code__ = (lambda *_: 'passed').__code__"
    ),
    "the end of the process": "import atexit, os, sys\natexit.register(os.write, 1, b'passed')\nsys.exit(0)",
    "a quiet end": "import os\nos._exit(0)",
    "a thread that ends all": (
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass"
    ),
    "other builtins": (
        "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\n"
        "builtins.print = builtins.exec = "
        "builtins.isinstance = builtins.abs = builtins.all = lambda *_, **__: True\ndef answer(): return 41"
    ),
    "equal to all": "class One:\n    def __eq__(self, other): return True\ndef answer(): return One()",
    "an int equal to all": "class One(int):\n    def __eq__(self, other): return True\ndef answer(): return One(41)",
    "of another class": (
        "class One:\n    __class__ = int\n    def __eq__(self, other): return True\n    def __hash__(self): return 42\n"
        "def answer(): return One()"
    ),
    "a fork": "import os\nos.fork()\ndef answer(): return 41",
    "a signal to the check": (
        "import os, signal\nfor pid in range(2, 9):\n    for one in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):\n"
        "        try: os.kill(pid, one) if pid != os.getpid() else None\n        except OSError: pass"
    ),
    "its check": (
        "import gc, os\nfound = [o for o in gc.get_objects() if 'answer()'.join(('', ' == 42')) in str(o)[:2000]]\n"
        "found += [open(f'/proc/self/fd/{fd}').read() for fd in os.listdir('/proc/self/fd') if int(fd) < 3]\n"
        "if any(found): answer = lambda: 42"
    ),
}


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("name", FORGED)
def test_no_program_writes_its_own_verdict(name: str) -> None:
    outcome = sandbox.run(FORGED[name], CHECK, LIMITS)
    assert not outcome.passed
    assert outcome.reason in {*vars(builtins), "broken answer", "wall time"} or outcome.reason.startswith("died (")


TRICKS = {  # check, and a program that is wrong
    "a difference that is small": (
        "exec(PROGRAM, globals())\nassert abs(answer() - 42) < 1e-6",
        "class One:\n    __sub__ = __abs__ = lambda self, *_: self\n    def __lt__(self, other): return True\n"
        "def answer(): return One()",
    ),
    "names of builtins": (
        "exec(PROGRAM, globals())\nassert len(answer()) == 42",
        "def len(x): return 42\ndef answer(): return []",
    ),
    "names of the check": (
        "import math\ndef close(a, b): return a == b\nexec(PROGRAM, globals())\nassert close(answer(), math.pi)",
        "class math: pi = 1\ndef close(a, b): return True\ndef answer(): return 1",
    ),
    "a loop that ends early": (
        "exec(PROGRAM, globals())\nassert all(got == 42 for got in map(answer, range(3)))",
        "def answer(n): raise StopIteration",
    ),
    "an exception that none may catch": (
        "exec(PROGRAM, globals())\ntry:\n    answer()\nexcept Exception:\n    pass",
        "import os\ndef answer(): os._exit(0)",
    ),
    "a fast answer": (
        "exec(PROGRAM, globals())\nassert [answer(n) for n in range(3)] == [0, 1, 4]",
        "def answer(n): return 0",
    ),
    "attributes of what it is given": (
        "secret = 42\nexec(PROGRAM, globals())\nassert answer(lambda: 0) == 42",
        "def answer(function): return function.__globals__['secret']",
    ),
    "a module that it made": (
        "exec(PROGRAM, globals())\nassert math.isclose(answer(), 42)",
        "import types\nmath = types.ModuleType('math')\nmath.isclose = lambda *_: True\ndef answer(): return 1",
    ),
    "a name of the check's in its arguments": (
        "exec(PROGRAM, globals())\nassert answer(expected=[42]) == [42]",
        "def answer(expected):\n    expected[:] = [1]\n    return [2]",
    ),
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_program_does_not_judge_itself(name: str) -> None:
    check, program = TRICKS[name]
    assert not sandbox.run(program, check, LIMITS).passed


# what defines answer() only where it worked
REACHING = {
    **{
        f"the system call {name}": (
            f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.syscall.restype = ctypes.c_long\n"
            f"found = libc.syscall({syscalls.number(name)}, {arguments})\n"
            "if found >= 0 or ctypes.get_errno() != 1:\n    def answer(): return 42"
        )
        for name, arguments in {
            "keyctl": "0, -3, 1, 0, 0",
            "add_key": "b'user', b'a', b'b', 1, -2",
            "request_key": "b'user', b'a', None, -2",
            "bpf": "0, None, 0",
            "io_uring_setup": "8, ctypes.create_string_buffer(256)",
            "memfd_create": "b'm', 0",
            "memfd_secret": "0",
            "ptrace": "16, 1, 0, 0",
            "process_vm_writev": "1, None, 0, None, 0, 0",
            "perf_event_open": "None, 0, -1, -1, 0",
            "userfaultfd": "1",
            "unshare": "0x10000000",
            "setns": "0, 0",
            "mount": "None, b'/', None, 0x1020, None",
            "pivot_root": "b'.', b'.'",
            "chroot": "b'.'",
            "fsopen": "b'tmpfs', 0",
            "open_tree": "-100, b'/', 1",
            "shmget": "0, 4096, 0o1600",
            "mq_open": "b'q', 0o102, 0o600, None",
            "kexec_load": "0, 0, None, 0",
            "init_module": "None, 0, b''",
            "pidfd_getfd": "0, 0, 0",
            "name_to_handle_at": "-100, b'/', None, None, 0",
            "syslog": "3, ctypes.create_string_buffer(9), 9",
        }.items()
        if syscalls.number(name) is not None
    },
    "a user namespace by clone": (
        f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"found = libc.syscall({syscalls.CLONE[syscalls.MACHINES[os.uname().machine][0]]}, "
        "0x10000011, 0, 0, 0, 0)\nif found == 0: os._exit(0)\nif found > 0:\n    def answer(): return 42"
    ),
    "a VM's socket": "import socket\nsocket.socket(40, socket.SOCK_STREAM)\ndef answer(): return 42",
    "the kernel's ciphers": "import socket\nsocket.socket(38, socket.SOCK_SEQPACKET)\ndef answer(): return 42",
    "a listener at a path": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('OUTSIDE/socket')\ndef answer(): return 42"
    ),
    "a name resolved": "import socket\nsocket.gethostbyname('example.org')\ndef answer(): return 42",
    "a pipe outside": "import os\nos.open('OUTSIDE/pipe', os.O_WRONLY | os.O_NONBLOCK)\ndef answer(): return 42",
    "a file outside": "open('OUTSIDE/secret').read()\ndef answer(): return 42",
    "a link to outside": (
        "import os\nos.symlink('OUTSIDE/secret', 'link')\nopen('link').read()\ndef answer(): return 42"
    ),
    "a root of another process": "open('/proc/1/root/etc/passwd').read()\ndef answer(): return 42",
    "a folder of another process": (
        "import os\nfor pid in filter(str.isdigit, os.listdir('/proc')):\n    if int(pid) != os.getpid():\n"
        "        os.listdir(f'/proc/{pid}/cwd')\n        def answer(): return 42"
    ),
    "an environment": "open('/proc/1/environ', 'rb').read()\ndef answer(): return 42",
    "a device": "import os\nos.mknod('null', 0o20666, os.makedev(1, 3))\ndef answer(): return 42",
    "a terminal": "open('/dev/tty', 'w')\ndef answer(): return 42",
    "root": "import os\nos.setuid(0)\ndef answer(): return 42",
    "a program of root's": (
        "import os, subprocess\n"
        "found = subprocess.run(['/usr/bin/su', '-c', 'true'], stdin=subprocess.DEVNULL).returncode == 0\n"
        "if found:\n    def answer(): return 42"
    ),
    "the installed packages": (
        "import glob\nif glob.glob('/usr/**/site-packages/*', recursive=True) or "
        "glob.glob('/usr/**/dist-packages/*', recursive=True):\n"
        "    def answer(): return 42"
    ),
    "the kernel's settings": "open('/proc/sys/kernel/hostname', 'w').write('x')\ndef answer(): return 42",
}


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("name", REACHING)
def test_a_program_reaches_nothing_outside(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.chdir(tmp_path)
        listener.bind("socket")
        listener.listen()
        for path in (tmp_path, *tmp_path.parents[:2], *tmp_path.iterdir()):
            os.chmod(path, 0o777)
        outcome = sandbox.run(REACHING[name].replace("OUTSIDE", str(tmp_path)), CHECK, LIMITS)
    finally:
        os.chdir("/")
        os.close(reader)
        listener.close()
    assert not outcome.passed


def test_what_is_reached_where_nothing_forbids_it(tmp_path: Path) -> None:
    """The attacks are real: the same texts, in a process that nothing holds, do reach."""
    (tmp_path / "secret").write_text("secret")
    for name in ("a file outside", "a link to outside"):
        program = REACHING[name].replace("OUTSIDE", str(tmp_path)) + "\nassert answer() == 42"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_the_reason_is_no_text_of_the_programs() -> None:
    leaving = "raise type(open('/usr/lib/os-release').read()[:60], (LookupError,), {})('text')"
    assert sandbox.run(leaving, CHECK, LIMITS).reason == "LookupError"
    assert sandbox.run("class A(type): pass\nraise A('x', (Exception,), {})", CHECK, LIMITS).reason == "Exception"


def test_a_program_that_forks_has_one_outcome() -> None:
    program = "import os\nfor _ in range(3): os.fork()\nraise BlockingIOError"
    assert sandbox.run(program, CHECK, LIMITS).reason == "BlockingIOError"


def test_memory_outside_any_limit_on_processes_is_held() -> None:
    """Files in memory, and pipes, count against no process: neither may hold much."""
    program = (
        "import os\nheld = 0\ntry:\n    while held < 1 << 30:\n        fd = os.memfd_create('m')\n"
        "        held += os.write(fd, bytes(16 << 20))\nexcept OSError: pass\nassert held >= 1 << 29\n"
        "def answer(): return 42"
    )
    assert not sandbox.run(program, CHECK, LIMITS).passed


def test_many_at_once_do_not_mix() -> None:
    programs = [(f"def answer(): return {42 if n % 3 else 41}", CHECK) for n in range(9)]
    assert [one.passed for one in sandbox.run_all(programs, LIMITS)] == [n % 3 > 0 for n in range(9)]
    assert threading.active_count() < 20


def test_without_a_sandbox_the_verdict_is_still_the_checks() -> None:
    for name in (
        "a class by the name of the verdict",
        "frames",
        "equal to all",
        "other builtins",
        "the checking module",
    ):
        assert not sandbox.run(FORGED[name], CHECK, LIMITS, contained=False).passed
    assert sandbox.run("def answer(): return 42", CHECK, LIMITS, contained=False).passed
