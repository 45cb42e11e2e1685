"""System calls that no program needs and that namespaces do not hold, refused by a seccomp filter. See seccomp(2).

Key rings, tracing, BPF and io_uring lead into the kernel; files in memory count against no limit; a UNIX socket reaches
whoever listens at a path.
"""

import ctypes
import errno
import os

# name -> number on x86-64, and on machines with the generic table (ARM, RISC-V, LoongArch); None: there is none
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "personality": (135, 92),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
CLONE, CLONE3, SOCKET, PRLIMIT = (56, 220), (435, 435), (41, 198), (302, 261)
NEW_NAMESPACES = 0x7E020000  # the flags of clone(2) that make any
DOMAINS = (2, 10)  # IPv4 and IPv6, which the empty network namespace holds
MACHINES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
    "riscv64": (1, 0xC00000F3),
    "loongarch64": (1, 0xC0000102),
}

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]  # code, instructions to skip if true, if false, operand


def number(name: str) -> int | None:
    """The number of a refused call on this machine.

    Raises:
        OSError: as `instructions`.
    """
    return REFUSED[name][_machine(os.uname().machine)[0]]


def _machine(name: str) -> tuple[int, int]:
    if name not in MACHINES:
        raise OSError(errno.ENOSYS, f"the numbers of system calls on {name} are not known")
    return MACHINES[name]


def instructions(machine: str) -> list[Instruction]:
    """The filter as a program of classic BPF.

    Raises:
        OSError: the machine is of a kind whose numbers are not known here.
    """
    table, architecture = _machine(machine)
    refuse = (RETURN, 0, 0, REFUSE | errno.EPERM)
    made: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), refuse,
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), refuse,  # the x32 table, under other numbers
    ]  # fmt: skip
    for numbers in REFUSED.values():
        if (found := numbers[table]) is not None:
            made += [(EQUAL, 0, 1, found), refuse]
    # C libraries fall back to clone, whose flags can be read
    made += [(EQUAL, 0, 1, CLONE3[table]), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    # a process may change its own limits, not those of the check
    made += [
        (EQUAL, 0, 4, PRLIMIT[table]), (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, 0), refuse, (RETURN, 0, 0, ALLOW)
    ]  # fmt: skip
    made += [
        (EQUAL, 0, 4, CLONE[table]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES), refuse,
        (RETURN, 0, 0, ALLOW),
        (EQUAL, 0, 3 + len(DOMAINS), SOCKET[table]), (LOAD, 0, 0, FIRST_ARGUMENT),
        *((EQUAL, 1 + len(DOMAINS) - place - 1, 0, domain) for place, domain in enumerate(DOMAINS)),
        refuse, (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    return made


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("true", ctypes.c_uint8), ("false", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter)))


def refuse() -> None:
    """Installs the filter for this process and all that it starts; `no_new_privs` must be set.

    Raises:
        OSError: the kernel has no such filters, or the machine's calls are not known.
    """
    made = instructions(os.uname().machine)
    array = (_Filter * len(made))(*(_Filter(*one) for one in made))
    libc = ctypes.CDLL(None, use_errno=True)
    pointer = ctypes.byref(_Program(len(made), ctypes.cast(array, ctypes.POINTER(_Filter))))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp: the filter of system calls cannot be installed")
