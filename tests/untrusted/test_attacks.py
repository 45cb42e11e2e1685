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
import time
from functools import partial
from pathlib import Path

import pytest

from sweeper.untrusted import sandbox, syscalls
from sweeper.untrusted.sandbox import Limits, Outcome

CHECK = "exec(PROGRAM, globals())\nassert answer() == 42"
LIMITS = Limits(wall_seconds=8.0, cpu_seconds=2)
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.usefixtures("sandboxed")


def without_root(monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Has the sandbox started by a user who is not root; why it cannot be, or None."""
    if os.geteuid() != 0:
        return "these tests run without root already"
    if SYSTEM_PYTHON is None:
        return "no Python that another user can start"
    nobody = partial(subprocess.Popen, user=12345, group=12345, extra_groups=[])
    monkeypatch.setattr(sandbox.subprocess, "Popen", nobody)
    monkeypatch.setattr(sys, "_base_executable", SYSTEM_PYTHON)
    return None


@pytest.fixture(params=["as we are", "without root"])
def user(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's sandbox, and where these tests are root's, that of a user who is not."""
    if request.param == "without root" and (reason := without_root(monkeypatch)):
        pytest.skip(reason)


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
    "a signal by a descriptor": (
        "import os, signal\nfor pid in range(1, 9):\n    try: fd = os.pidfd_open(pid)\n    except OSError: continue\n"
        "    if pid != os.getpid(): signal.pidfd_send_signal(fd, signal.SIGKILL)\ndef answer(): return 41"
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
    "a module that it planted": (
        "exec(PROGRAM, globals())\nimport colorsys, wave\nassert answer() == colorsys.rgb_to_hsv(0, 0, 0)[0] + 42",
        "import os\nfor place in ('.', '/dev/shm', os.environ.get('HOME', '.')):\n"
        "    for name in ('colorsys', 'wave', 'sitecustomize', 'usercustomize'):\n"
        "        try: open(f'{place}/{name}.py', 'w').write('def rgb_to_hsv(*_): return [-1]')\n"
        "        except OSError: pass\ndef answer(): return 41",
    ),
    "a module by the name of its choice": (
        "exec(PROGRAM, globals())\nassert answer() == 42",
        "import types\nfor n, name in enumerate(('untrusted.checking', '__main__', 'unittest.__main__', 'os')):\n"
        "    globals()[f'module_{n}'] = types.ModuleType(name)\ndef answer(): return 41",
    ),
    "an answer that is too deep": (
        "exec(PROGRAM, globals())\nassert answer() == 42",
        "def answer():\n    found = []\n    for _ in range(100000): found = [found]\n    return found",
    ),
    "an answer that is too long": (
        "exec(PROGRAM, globals())\nassert answer() == 42",
        "def answer(): return 'x' * (200 << 20)",
    ),
    "a number that is too long": (
        "exec(PROGRAM, globals())\nassert str(answer()) == '42'",
        "def answer(): return 1 << (100 << 20)",
    ),
    "a name of the check's in its arguments": (
        "exec(PROGRAM, globals())\nassert answer(expected=[42]) == [42]",
        "def answer(expected):\n    expected[:] = [1]\n    return [2]",
    ),
}


@pytest.mark.usefixtures("user")
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
            "clock_settime": "0, (ctypes.c_long * 2)(1 << 30, 0)",
            "settimeofday": "(ctypes.c_long * 2)(1 << 30, 0), None",
            "adjtimex": "ctypes.create_string_buffer(256)",
            "sethostname": "b'x', 1",
            "finit_module": "0, b'', 0",
            "swapon": "b'/', 0",
            "open_by_handle_at": "-100, ctypes.create_string_buffer(64), 0",
            "process_vm_readv": "1, None, 0, None, 0, 0",
            "fanotify_init": "0, 0",
            "io_uring_enter": "0, 1, 0, 0, None, 0",
            "personality": "0x0040000",
        }.items()
        if syscalls.number(name) is not None
    },
    "a user namespace by clone": (
        f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"found = libc.syscall({syscalls.CLONE[syscalls.MACHINES[os.uname().machine][0]]}, "
        "0x10000011, 0, 0, 0, 0)\nif found == 0: os._exit(0)\nif found > 0:\n    def answer(): return 42"
    ),
    "a system call by its number of x32": (
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"found = libc.syscall(0x40000000 + {syscalls.number('keyctl')}, 0, -3, 1, 0, 0)\n"
        "if found >= 0 or ctypes.get_errno() != 1:\n    def answer(): return 42"
    ),
    "a system call of a 32-bit program": (  # keyctl, by machine code of x86
        "import ctypes, mmap, os\nassert os.uname().machine == 'x86_64'\n"
        "code = bytes.fromhex('53 b8 20 01 00 00 31 db 31 c9 31 d2 cd 80 5b c3')\n"
        "page = mmap.mmap(-1, 4096, prot=7)\npage.write(code)\n"
        "call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
        "if call() >= 0:\n    def answer(): return 42"
    ),
    "a filter of its own that answers for the kernel": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.prctl(22, 2, None, 0, 0) == 0\ndef answer(): return 42"
    ),
    "the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\ndef answer(): return 42",
    "a socket of the network card": (
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\ndef answer(): return 42"
    ),
    "a raw socket": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)\ndef answer(): return 42"
    ),
    "the kernel's sockets": (
        "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\ndef answer(): return 42"
    ),
    "an interface brought up": (
        "import fcntl, socket, struct\ns = socket.socket()\n"
        "fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1))\ndef answer(): return 42"
    ),
    "limits of the check": (
        "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\ndef answer(): return 42"
    ),
    "more than its limits": (
        "import resource\nfor name in ('RLIMIT_AS', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', 'RLIMIT_NOFILE', 'RLIMIT_CPU'):\n"
        "    try: resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY,) * 2)\n"
        "    except (OSError, ValueError): continue\n    def answer(): return 42"
    ),
    "a higher priority": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -10)\ndef answer(): return 42",
    "real time": ("import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\ndef answer(): return 42"),
    "capabilities again": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nheader = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
        "every = (ctypes.c_uint32 * 6)(*(0xffffffff,) * 6)\n"
        "assert libc.capset(ctypes.byref(header), ctypes.byref(every)) == 0\ndef answer(): return 42"
    ),
    "new privileges": ("import ctypes\nassert ctypes.CDLL(None).prctl(38, 0, 0, 0, 0) == 0\ndef answer(): return 42"),
    "a hard link to outside": (
        "import os\nos.link('OUTSIDE/secret', 'link')\nopen('link').read()\ndef answer(): return 42"
    ),
    "a path upwards": (
        "import os\nfor start in ('.', '/', '/proc/self/cwd', '/proc/self/root', '/dev/shm'):\n"
        "    found = start + '/..' * 40 + 'OUTSIDE/secret'\n    if os.path.exists(found):\n"
        "        def answer(): return 42"
    ),
    "an inherited folder": (
        "import os\nfor fd in range(64):\n    try: os.fchdir(fd)\n    except OSError: continue\n"
        "    def answer(): return 42"
    ),
    "Python's own files": "import os\nopen(os.__file__, 'a').write('x')\ndef answer(): return 42",
    "memory of the check": "open('/proc/1/mem', 'r+b', 0).read(1)\ndef answer(): return 42",
    "what the check is": (
        "import os\nfor name in ('maps', 'environ', 'auxv', 'fd', 'map_files', 'syscall', 'stack'):\n"
        "    path = f'/proc/1/{name}'\n    try: found = os.listdir(path) if name in ('fd', 'map_files') "
        "else open(path, 'rb').read()\n    except OSError: continue\n    if found:\n        def answer(): return 42"
    ),
    "the machine's memory": (
        "import os\nfor path in ('/dev/mem', '/dev/kmem', '/proc/kcore', '/dev/kmsg', '/proc/kmsg'):\n"
        "    try:\n        if not open(path, 'rb', 0).read(1): continue\n    except OSError: continue\n"
        "    def answer(): return 42"
    ),
    "a handler of core dumps": (
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')\ndef answer(): return 42"
    ),
    "the magic key": "open('/proc/sysrq-trigger', 'w').write('h')\ndef answer(): return 42",
    "a map of users": "open('/proc/self/uid_map', 'w').write('0 0 1')\ndef answer(): return 42",
    "control groups": ("import os\nassert os.listdir('/sys/fs/cgroup')\ndef answer(): return 42"),
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


def reach(name: str, folder: Path) -> Outcome:
    """Runs an attack of REACHING, with a file, a pipe and a listener in `folder` that anybody may use."""
    (folder / "secret").write_text("secret")
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    listener = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    try:
        os.chdir(folder)
        listener.bind("socket")
        listener.listen()
        for path in (folder, *folder.parents[:2], *folder.iterdir()):
            os.chmod(path, 0o777)
        return sandbox.run(REACHING[name].replace("OUTSIDE", str(folder)), CHECK, LIMITS)
    finally:
        os.chdir(before)
        os.close(reader)
        listener.close()


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("name", REACHING)
def test_a_program_reaches_nothing_outside(name: str, tmp_path: Path) -> None:
    began = time.time() - time.monotonic()
    assert not reach(name, tmp_path).passed
    assert abs(time.time() - time.monotonic() - began) < 60


def test_what_is_reached_where_nothing_forbids_it(tmp_path: Path) -> None:
    """The attacks are real: the same texts, in a process that nothing holds, do reach."""
    (tmp_path / "secret").write_text("secret")
    for name in ("a file outside", "a link to outside"):
        program = REACHING[name].replace("OUTSIDE", str(tmp_path)) + "\nassert answer() == 42"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


LEAKING = {  # a program, and the one reason that it can end with
    "the name of an exception": (
        "raise type(open('/usr/lib/os-release').read()[:60], (LookupError,), {})('text')", "LookupError",
    ),
    "a class of classes": ("class A(type): pass\nraise A('x', (Exception,), {})", "Exception"),
    "a name that is no text": (
        "class A(type):\n    __name__ = property(lambda self: open('/usr/lib/os-release').read())\n"
        "class B(ValueError, metaclass=A): pass\nraise B", "broken answer",
    ),
    "a writer that forks": (
        "import os\nfor _ in range(3): os.fork()\nraise BlockingIOError", "BlockingIOError",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("name", LEAKING)
def test_the_reason_is_no_text_of_the_programs(name: str) -> None:
    program, reason = LEAKING[name]
    assert sandbox.run(program, CHECK, LIMITS).reason == reason


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
