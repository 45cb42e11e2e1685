"""The process inside the sandbox: isolates itself, then runs one program. Started as a script, never imported.

Reads one JSON object from standard input: `program`, `check`, `token` and the limits. Writes `token` and the outcome to
standard output; a program that exits the process leaves no outcome. Uses the standard library only.

Linux only. In order: new user, mount, PID, network, IPC and host-name namespaces; every mount read-only except
a small tmpfs as working folder; a `/proc` that shows only this namespace; resource limits; no capabilities, nor a way
to gain any. See namespaces(7), user_namespaces(7), mount_setattr(2), capabilities(7).
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
    """Calls a function of libc; raises OSError if it fails."""
    if getattr(libc, what)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def show_python(place: str) -> None:
    """Mounts Python at `place` and imports from there: root's may be in a folder that others cannot read (/root)."""
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", sys.base_prefix.encode(), place.encode(), None, MS_BIND, None)
    packages = [
        module.__path__ for module in list(sys.modules.values()) if isinstance(vars(module).get("__path__"), list)
    ]
    for paths in (sys.path, *packages):
        paths[:] = [place + path.removeprefix(sys.base_prefix) for path in paths if path.startswith(sys.base_prefix)]


def enter_namespaces(place: str) -> None:
    """Enters new namespaces as an unprivileged user. Root becomes nobody first: process limits do not apply to root."""
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


def restrict_file_system(folder: str, size: int) -> None:
    """Makes everything read-only but `folder`, a tmpfs of `size` bytes, and hides the host's `/proc` and `/dev/shm`."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), 32)
    flags = MS_NOSUID | MS_NODEV
    try:
        call("mount", b"proc", b"/proc", b"proc", flags | MS_NOEXEC, None)
    except OSError:  # some containers forbid mounting a new one
        call("mount", b"tmpfs", b"/proc", b"tmpfs", flags | MS_NOEXEC, b"size=0")
    if os.path.isdir("/dev/shm"):
        call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", flags | MS_NOEXEC, b"size=4096")
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", flags, f"size={size},mode=700".encode())
    os.chdir(folder)


def drop_privileges() -> None:
    """Drops all capabilities and, where the kernel allows it, forbids new namespaces and shared memory segments."""
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
    """Runs the check on the program and discards its output."""
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
        restrict_file_system(task["folder"], task["disk"])
        drop_privileges()
    else:
        os.chdir(task["folder"])
    limit(task)
    # PID 1 of a namespace ignores signals without a handler, so the program runs as its child. PID 1 forwards one short
    # outcome and exits, which kills everything in the namespace.
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
