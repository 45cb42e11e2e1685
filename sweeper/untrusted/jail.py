"""The inside of `sandbox.py`: shuts this process in, then runs one program. Started as a script, never imported.

Reads one JSON object from standard input: `program`, `check`, `token` and the limits. Writes `token` and the outcome to
standard output; a program that ends the process itself leaves no outcome. Needs nothing but the standard library.

Linux only. In order: new user, mount, PID, network, IPC and host-name namespaces; every mount read-only but a small
tmpfs that is the working folder; a `/proc` that shows this namespace alone; resource limits; no capabilities and no way
to new ones. See namespaces(7), user_namespaces(7), mount_setattr(2), capabilities(7).
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, *arguments: object) -> None:
    """Calls a function of libc; OSError where it fails."""
    if getattr(libc, what)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def show_python(place: str) -> None:
    """Root's Python may lie where nobody else can look (/root): it is mounted at `place`, and imported from there."""
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", sys.base_prefix.encode(), place.encode(), None, MS_BIND, None)
    packages = [
        module.__path__ for module in list(sys.modules.values()) if isinstance(vars(module).get("__path__"), list)
    ]
    for paths in (sys.path, *packages):
        paths[:] = [place + path.removeprefix(sys.base_prefix) for path in paths if path.startswith(sys.base_prefix)]


def enter_namespaces(place: str) -> None:
    """An unprivileged user in namespaces of its own. Root becomes nobody first: limits on processes spare root."""
    if os.geteuid() == 0:
        show_python(place)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self/uid_map belongs to root
    user, group = os.geteuid(), os.getegid()
    spaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    call("unshare", spaces)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")


def shut_file_system(folder: str, size: int) -> None:
    """Everything read-only but `folder`, a tmpfs of `size` bytes; `/proc` and `/dev/shm` show nothing of outside."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), 32)
    flags = MS_NOSUID | MS_NODEV
    try:
        call("mount", b"proc", b"/proc", b"proc", flags | MS_NOEXEC, None)
    except OSError:  # some containers forbid a new one
        call("mount", b"tmpfs", b"/proc", b"tmpfs", flags | MS_NOEXEC, b"size=0")
    if os.path.isdir("/dev/shm"):
        call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", flags | MS_NOEXEC, b"size=4096")
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", flags, f"size={size},mode=700".encode())
    os.chdir(folder)


def forbid_more() -> None:
    """No further namespaces and no shared memory segments, where the kernel lets us say so; no capabilities."""
    for name, value in (("user/max_user_namespaces", "0"), ("kernel/shmmni", "0")):
        with contextlib.suppress(OSError):
            write(f"/proc/sys/{name}", value)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
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


def run(task: dict[str, Any], report: int) -> None:
    """Runs the check on the program; its own output goes nowhere."""
    sys.stdin = open(os.devnull)  # noqa: SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    namespace = {"__name__": "__main__", "PROGRAM": task["program"]}
    try:
        exec(compile(task["check"], "<check>", "exec"), namespace)
        outcome = "passed"
    except BaseException as error:
        outcome = type(error).__name__[:60]
    os.write(report, f"{task['token']}{outcome}".encode())
    os._exit(0)


def main() -> None:
    task = json.load(sys.stdin)
    if task["contained"]:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        enter_namespaces(task["python"])
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # cleared by the change of user
    report = os.dup(1)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    if task["contained"]:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        shut_file_system(task["folder"], task["disk"])
        forbid_more()
    else:
        os.chdir(task["folder"])
    limit(task)
    # The first process of a PID namespace ignores signals it has no handler for, so the program is its child. It
    # passes on one short outcome and ends, and everything in the namespace with it.
    receiver, sender = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(report)
        os.close(receiver)
        run(task, sender)
    os.close(sender)
    outcome = os.read(receiver, 200)
    if outcome:
        os.write(report, outcome)
        os._exit(0)
    _, status = os.waitpid(program, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    if platform.system() != "Linux":
        sys.exit("only Linux has the namespaces this needs")
    try:
        main()
    except OSError as problem:
        print(problem, file=sys.stderr)
        os._exit(3)
