"""The processes inside the sandbox: isolates them, then runs one program and the check on it. Started, never imported.

Reads two messages from standard input: the limits and folders, and then, once the program's process is there and knows
nothing of it, the program and its check. Writes how the check ended to standard output. Inside there are two
processes: the first runs the check and holds the way out, the second runs the program and may answer the first.
Uses the standard library only.

Linux only. In order: new user, mount, PID, network, IPC and host-name namespaces; a file system of its own,
read-only, with Python, the system's libraries and a small tmpfs as working folder; a `/proc` that shows only this
namespace; no capabilities, nor a way to gain any; a filter of system calls; resource limits; no process may be read
or traced by another. See namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), capabilities(7),
seccomp(2), PR_SET_DUMPABLE.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

from . import syscalls
from .checking import Line, verdict
from .program import Program
from .wire import Gone, receive

TYPE_CHECKING = False  # typing is not worth its import, once a program
if TYPE_CHECKING:
    from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
NOBODY = 65534
SYSTEM = ("", "/usr", "/usr/local")
SHOWN = ("bin", "lib", "lib64")  # of the system and of Python
DEVICES = ("null", "zero", "full", "random", "urandom")
LARGEST_TASK = 1 << 30  # what stands in the messages is ours, and as large as a dataset makes it
UNSANDBOXED = 3  # exit status

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, *arguments: object) -> None:
    """Calls a function of libc; raises OSError if it fails."""
    if getattr(libc, what)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    call("mount", *(None if text is None else text.encode() for text in (source, target, kind)), flags,
         None if options is None else options.encode())  # fmt: skip


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def show_python(place: str) -> None:
    """Mounts Python at `place` and imports from there: root's may be in a folder that others cannot read (/root)."""
    call("unshare", CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    for name in SHOWN:
        if os.path.isdir(f"{sys.base_prefix}/{name}"):
            os.mkdir(f"{place}/{name}")
            mount(f"{sys.base_prefix}/{name}", f"{place}/{name}", None, MS_BIND | MS_REC)
    packages = [
        module.__path__ for module in list(sys.modules.values()) if isinstance(vars(module).get("__path__"), list)
    ]
    for paths in (sys.path, *packages):
        paths[:] = [place + path.removeprefix(sys.base_prefix) for path in paths if path.startswith(sys.base_prefix)]


def enter_namespaces(place: str) -> str:
    """Enters new namespaces as an unprivileged user. Root becomes nobody first: process limits do not apply to root.

    Returns:
        The folder of Python.
    """
    python = sys.base_prefix
    if os.geteuid() == 0:
        show_python(place)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self/uid_map belongs to root
        python = place
    user, group = os.geteuid(), os.getegid()
    spaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    call("unshare", spaces)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")
    return python


def restrict_file_system(root: str, folder: str, python: str, size: int) -> None:
    """Makes of `root` a file system with Python and the system's libraries but no installed package, and enters it.

    All of it is read-only but `folder`, a tmpfs of `size` bytes. Nothing else is there: no file of a user's, no
    socket, pipe or device that a read-only mount would leave open to writing.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=65536,mode=755")
    for path in _shown(python):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
            mount(path, root + path, None, MS_BIND | MS_REC)
    for path in _packages(root, python):
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4096")
    os.makedirs(f"{root}/etc")
    os.makedirs(f"{root}/dev/shm")
    os.makedirs(root + folder, exist_ok=True)
    for path in ("/etc/ld.so.cache", *(f"/dev/{name}" for name in DEVICES)):
        if os.path.exists(path):
            write(root + path, "")
            mount(path, root + path, None, MS_BIND)
    os.mkdir(f"{root}/proc")
    with contextlib.suppress(OSError):  # some containers forbid mounting a new one
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call(
        "syscall", syscalls.number("mount_setattr"), AT_FDCWD, root.encode(), AT_RECURSIVE, ctypes.byref(attributes), 32
    )
    mount("tmpfs", f"{root}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4096")
    mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=700")
    os.chdir(root)
    call("syscall", syscalls.number("pivot_root"), b".", b".")  # the old root then lies over the new one
    call("umount2", b".", MNT_DETACH)
    os.chdir(folder)


def _shown(python: str) -> list[str]:
    """The folders to show, none of them inside another."""
    found = [f"{home}/{name}" for home in (*SYSTEM, python) for name in SHOWN]
    with open("/proc/self/maps") as lines:  # a system whose libraries lie elsewhere
        libraries = {os.path.dirname(line[line.index("/") :]) for line in lines if ".so" in line}
    known = (sys.base_prefix, *(os.path.realpath(path) for path in found))
    found += [path for path in libraries if not f"{path}/".startswith(tuple(f"{one}/" for one in known))]
    return [path for path in dict.fromkeys(found) if not any(path.startswith(f"{other}/") for other in found)]


def _packages(root: str, python: str) -> list[str]:
    """Folders of installed packages, which may hold the answers to a task."""
    found = []
    for home in {"/usr", "/usr/local", python}:
        for library in (f"{root}{home}/lib", f"{root}{home}/lib64"):
            for name in os.listdir(library) if os.path.isdir(library) and not os.path.islink(library) else ():
                if name.startswith("python"):
                    found += [f"{library}/{name}/{one}" for one in ("site-packages", "dist-packages")]
    return [path for path in found if os.path.isdir(path)]


def drop_privileges() -> None:
    """Drops all capabilities and, where the kernel allows it, forbids new namespaces and shared memory segments."""
    for name, value in (("user/max_user_namespaces", "0"), ("kernel/shmmni", "0")):
        with contextlib.suppress(OSError):
            write(f"/proc/sys/{name}", value)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def limit(task: dict[str, Any]) -> None:
    for name, value in (
        ("RLIMIT_CPU", task["cpu_seconds"]),
        ("RLIMIT_AS", task["memory"]),
        ("RLIMIT_NPROC", task["processes"]),
        ("RLIMIT_FSIZE", task["disk"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def silence() -> int:
    """Leaves this process none of the descriptors that lead out; returns another number for the one of the report."""
    report = os.dup(1)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return report


def run_both() -> NoReturn:
    """Starts the program's process, runs the check in this one, and tells how it ended.

    Sandboxed, this is the first process of its namespace: the program cannot signal it, and all others end with it.
    """
    questions, asking = os.pipe()
    answering, answers = os.pipe()
    program = os.fork()
    if program == 0:
        for descriptor in (asking, answering, silence()):
            os.close(descriptor)
        with contextlib.suppress(BaseException):
            Program(questions, answers).serve()
        os._exit(0)
    os.close(questions)
    os.close(answers)
    work = receive(0, LARGEST_TASK)
    report = silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the only one that Python handles, and so the first process too
    try:
        outcome = verdict(work["check"], work["program"], Line(answering, asking))
    except Gone:
        _, status = os.waitpid(program, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.write(report, outcome.encode())
    os._exit(0)


def isolate_and_run() -> NoReturn:
    task = receive(0)
    python = sys.base_prefix
    if task["contained"]:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        python = enter_namespaces(task["python"])
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # cleared by the change of user
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    if task["contained"]:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        restrict_file_system(task["root"], task["folder"], python, task["disk"])
        drop_privileges()
    else:
        os.chdir(task["folder"])
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    syscalls.refuse()
    limit(task)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    run_both()


def main() -> NoReturn:
    try:
        isolate_and_run()
    except (OSError, Gone) as problem:
        print(problem, file=sys.stderr)
        sys.stderr.flush()
        os._exit(UNSANDBOXED)
