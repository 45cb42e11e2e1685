"""What is measured of bad input, the sandbox and versions, as sections of docs/robustness.md.

.venv/bin/python -m tools.robustness fuzz .cache/fuzz   what `make fuzz` gathered there -> docs/fuzz.json
.venv/bin/python -m tools.robustness sandbox            attacks the sandbox -> docs/sandbox.json
.venv/bin/python -m tools.robustness page               docs/*.json -> the page
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
FUZZ, SANDBOX, MATRIX, PAGE = (DOCS / name for name in ("fuzz.json", "sandbox.json", "matrix.json", "robustness.md"))


# ---- bad input ----


def gathered(folder: Path) -> dict[str, dict[str, Any]]:
    """Kind of input -> how many distinct ones there were, and what came of them.

    Raises:
        ValueError: the folder has no figures.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        row = found.setdefault(part["kind"], dict.fromkeys(("distinct", "accepted", "refused", "tracebacks"), 0))
        for key in ("accepted", "refused", "tracebacks"):
            row[key] += part[key]
        seen.setdefault(part["kind"], set()).update(part["digests"])
        row["distinct"] = len(seen[part["kind"]])
        row["minutes"] = round(row.get("minutes", 0) + part["seconds"] / 60, 1)
    if not found:
        raise ValueError(f"{folder} has no figures: run make fuzz")
    return found


def bad_input(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(kind, *(f"{row[key]:,}" for key in COUNTS)) for kind, row in kinds.items()]
    rows.append(("**all**", *(f"**{sum(row[key] for row in kinds.values()):,}**" for key in COUNTS)))
    return "\n".join(
        (
            "`make fuzz` makes inputs at random, from a fixed seed: commands of every program with fields that there",
            "are and are not, values that fit and do not; placements on architectures; records, files of a study and",
            "tables with values of other kinds, missing keys, turned bits. Each is to be carried out or refused in",
            "lines that say why. A traceback, a signal, an end without a word or none within a minute counts as a",
            "traceback. One that comes up in two parts counts once as distinct.",
            "",
            *table(("input", "distinct", "carried out", "refused", "tracebacks"), rows),
        )
    )


COUNTS = ("distinct", "accepted", "refused", "tracebacks")


# ---- the sandbox ----

# kind of attack -> those of tests/untrusted; together they are all
KINDS: dict[str, tuple[str, ...]] = {
    "read, write or delete files": (
        "a file outside", "a link to outside", "a hard link to outside", "a path upwards", "an inherited folder",
        "Python's own files", "the installed packages", "a deletion outside", "the system call open_by_handle_at",
        "the system call name_to_handle_at", "the system call fanotify_init",
    ),
    "reach the network": (
        "a socket", "a name", "a name resolved", "a raw socket", "a socket of the network card", "the kernel's sockets",
        "an interface brought up", "a VM's socket", "the kernel's ciphers", "a listener at a path", "a pipe outside",
    ),
    "see or touch other processes, /proc": (
        "a root of another process", "a folder of another process", "an environment", "memory of the check",
        "what the check is", "limits of the check", "the system call ptrace", "the system call process_vm_writev",
        "the system call process_vm_readv", "the system call pidfd_getfd", "the system call shmget",
        "the system call mq_open", "the kernel's settings", "a handler of core dumps", "the magic key",
        "control groups",
    ),
    "signals": (
        "its parent", "the parent outside", "all", "a signal to itself", "a signal that stops it", "no signal obeyed",
    ),
    "take memory": (
        "10 GB of memory", "memory in pieces", "pipes full of memory", "memory that processes share",
        "a file in shared memory", "the system call memfd_create", "the system call memfd_secret", "deep recursion",
    ),
    "take time, the clock": (
        "endless loop", "sleep", "questions without end", "noise", "noise wherever it can be heard", "real time",
        "a higher priority", "the clock", "the system call clock_settime", "the system call settimeofday",
        "the system call adjtimex",
    ),
    "processes and threads without end": ("fork bomb", "threads", "a daemon"),
    "fill the disk": ("a file without end", "many files", "names without end", "a file of holes"),
    "new namespaces and mounts": (
        "a user namespace by clone", "another user namespace", "another mount", "the system call unshare",
        "the system call setns", "the system call mount", "the system call pivot_root", "the system call chroot",
        "the system call fsopen", "the system call open_tree", "a map of users", "the system call sethostname",
    ),
    "gain rights": (
        "root", "a program of root's", "capabilities again", "new privileges", "more than its limits", "its limits",
        "a device", "a terminal", "the machine's memory",
    ),
    "key rings": ("the system call keyctl", "the system call add_key", "the system call request_key"),
    "BPF": ("the system call bpf",),
    "io_uring": ("the system call io_uring_setup", "the system call io_uring_enter"),
    "other ways into the kernel": (
        "the system call perf_event_open", "the system call userfaultfd", "the system call kexec_load",
        "the system call init_module", "the system call finit_module", "the system call syslog",
        "the system call swapon", "the system call personality", "a system call by its number of x32",
        "a system call of a 32-bit program", "a filter of its own that answers for the kernel",
    ),
    "end as if all were well": ("exit as if all were well", "exit", "a crash"),
}  # fmt: skip


def attacks() -> dict[str, list[tuple[str, Callable[[Path], bool]]]]:
    """Kind -> name and what tells whether it was held, of every attack in the tests.

    Raises:
        ValueError: one has no kind, or there is none of a name.
    """
    from sweeper.untrusted import sandbox
    from tests.untrusted import test_attacks as found
    from tests.untrusted import test_sandbox as hostile

    def verdict(program: str, check: str) -> Callable[[Path], bool]:
        return lambda folder: not sandbox.run(program, check, found.LIMITS).passed

    def reason(program: str, wanted: str) -> Callable[[Path], bool]:
        return lambda folder: sandbox.run(program, found.CHECK, found.LIMITS).reason == wanted

    each: dict[str, Callable[[Path], bool]] = {}
    for name in found.REACHING:
        each[name] = lambda folder, name=name: not found.reach(name, folder).passed  # type: ignore[misc]
    for name in hostile.HOSTILE:
        each[name] = lambda folder, name=name: not hostile.harm(name, folder)  # type: ignore[misc]
    named = [name for names in KINDS.values() for name in names]
    absent = sorted(set(each) ^ set(named)) + [name for name in named if named.count(name) > 1]
    if absent:
        raise ValueError(f"of no kind, of two, or no attack: {', '.join(absent)}")
    forged = [(name, verdict(program, found.CHECK)) for name, program in found.FORGED.items()]
    forged += [(name, verdict(program, check)) for name, (check, program) in found.TRICKS.items()]
    leaked = [(name, reason(*both)) for name, both in found.LEAKING.items()]
    rest = {kind: [(name, each[name]) for name in names] for kind, names in KINDS.items()}
    return {"forge the verdict": forged, "send text out in the reason": leaked} | rest


def attacked() -> dict[str, Any]:
    """Tries every attack, as root where this is root, and without; how many, and the names of those not held."""
    import pytest

    from tests.untrusted.test_attacks import without_root

    found: dict[str, Any] = {"kernel": platform.release(), "machine": platform.machine(), "users": {}}
    for user in ("root", "not root") if os.geteuid() == 0 else ("not root",):
        with pytest.MonkeyPatch.context() as patch:
            if user == "not root" and os.geteuid() == 0 and (reason := without_root(patch)):
                print(f"{user}: not run: {reason}")
                continue
            rows = found["users"][user] = {}
            for kind, tries in attacks().items():
                rows[kind] = {"tried": len(tries), "not_held": [name for name, held in tries if not _held(held)]}
                print(f"{user}: {kind}: {len(tries)} tried, not held: {rows[kind]['not_held'] or 'none'}", flush=True)
    return found


def _held(held: Callable[[Path], bool]) -> bool:
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        inner = Path(folder, "outer", "inner")  # whose parents are opened to everybody too
        inner.mkdir(parents=True)
        return held(inner)


def the_sandbox(found: Mapping[str, Any]) -> str:
    users = found["users"]
    kinds = next(iter(users.values()))
    rows = [
        (kind, str(row["tried"]), *(str(row["tried"] - len(users[user][kind]["not_held"])) for user in users))
        for kind, row in kinds.items()
    ]
    total = [sum(int(row[place]) for row in rows) for place in range(1, len(users) + 2)]
    rows.append(("**all**", *(f"**{number}**" for number in total)))
    escaped = sorted({name for user in users.values() for row in user.values() for name in row["not_held"]})
    return "\n".join(
        (
            "`.venv/bin/python -m tools.robustness sandbox` tries every attack of `tests/untrusted` on the sandbox",
            "that programs of a model run in: by root, who becomes nobody there, and by a user without rights. An",
            "attack is held if the program is not counted as right, nothing outside changed, no process is left and",
            f"no text got out. Kernel {found['kernel']}, {found['machine']}.",
            "",
            *table(("attack", "tried", *(f"held, {_by(user)}" for user in users)), rows),
            "",
            f"Not held: {', '.join(escaped) or 'none'}. [Security](../SECURITY.md) says what holds each and what does "
            "not hold.",
        )
    )


def _by(user: str) -> str:
    return "by root" if user == "root" else "without root"


# ---- versions ----


def versions(cells: Mapping[str, Mapping[str, Any]]) -> str:
    shown = ("python", "torch", "transformers", "peft", "optuna", "pandas", "numpy", "datasets")
    rows = []
    for name, cell in cells.items():
        if "not_run" in cell:
            rows.append((name, cell["python"], *["–"] * (len(shown) - 1), f"not run: {cell['not_run']}"))
            continue
        failed = cell["failed"] + cell["error"]
        said = f"{cell['passed']:,} passed" + (f", {failed} failed" if failed else "")
        said += f" ({len(cell['files'])} files)"
        rows.append((name, *(cell["versions"][one].partition("+")[0] for one in shown), said))
    return "\n".join(
        (
            "`make matrix` makes an environment for each row and runs tests that touch every library in it, without a",
            "GPU: `pins` is constraints.txt, `floors` the lower bounds of pyproject.toml, `newest` what the package",
            "index has.",
            "",
            *table(("", *shown, "tests"), rows),
        )
    )


# ---- the page ----


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def with_section(page: str, title: str, body: str) -> str:
    """A page with one of its sections, up to the next heading of its level, replaced or added at the end."""
    heading = f"## {title}\n"
    before, found, after = f"\n{page}".partition(f"\n{heading}")
    if not found:
        return f"{page.rstrip()}\n\n{heading}\n{body}\n"
    _, more, rest = after.partition("\n## ")
    return f"{before[1:]}\n{heading}\n{body}\n" + (f"\n## {rest}" if more else "")


def sections() -> dict[str, str]:
    """Title -> text of the sections made here, of those whose figures are there."""
    made = {"Bad input": (FUZZ, bad_input), "The sandbox": (SANDBOX, the_sandbox), "Versions": (MATRIX, versions)}
    return {
        title: write(json.loads(path.read_text(encoding="utf-8")))
        for title, (path, write) in made.items()
        if path.is_file()
    }


def main(arguments: Sequence[str]) -> int:
    match list(arguments):
        case ["fuzz", folder]:
            FUZZ.write_text(json.dumps(gathered(Path(folder)), indent=1) + "\n", encoding="utf-8")
        case ["sandbox"]:
            SANDBOX.write_text(json.dumps(attacked(), indent=1) + "\n", encoding="utf-8")
        case ["page"]:
            pass
        case _:
            print((__doc__ or "").strip(), file=sys.stderr)
            return 2
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "# Robustness\n"
    for title, body in sections().items():
        page = with_section(page, title, body)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
