"""Commands that are printed to be typed: they run as they stand, in the folder and with the Python of this process."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from sweeper.installation import NAME, WHEEL

SCRIPTS = ("train", "evaluate", "adapters")
PARTS = (*SCRIPTS, "analyse")


def command(part: str, *words: str) -> str:
    """What to type for a part of the project: "train", "evaluate", "adapters" or "analyse".

    `lora-atlas PART` where this process was begun so, or the package is a wheel. In a checkout a script, or
    `python -m analysis`, by the Python that runs now.
    """
    if is_installed():
        return shlex.join([NAME, part, *words])
    return shlex.join([*python(), *([str(_script(part))] if part in SCRIPTS else ["-m", "analysis"]), *words])


def this_command() -> str:
    """The command that began this process, to be typed again."""
    given = sys.argv[1:]
    if is_installed():
        return shlex.join([NAME, *(() if given[:1] and given[0] in PARTS else ("train",)), *given])
    return shlex.join([*python(), sys.argv[0], *given])


def noted() -> str:
    """The command that began this process, for readers elsewhere: with nothing of this machine in it."""
    return this_command() if is_installed() else shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def is_installed() -> bool:
    """Whether the package's command is what there is: it began this process, or there are no scripts beside a wheel."""
    return Path(sys.argv[0]).name in (NAME, f"{NAME}.exe") or WHEEL


def python() -> list[str]:
    """The Python that runs now, as short as it can be typed here."""
    here = Path(sys.executable or "python")
    folder, own = here.parent.parent, Path.cwd() / ".venv"
    if folder == own or (own.exists() and folder.resolve() == own.resolve()):
        return [str(Path(".venv", here.parent.name, here.name))]
    for name in ("python", "python3"):
        found = shutil.which(name)
        # a virtual environment's is a link to the one that it was made with: the folders tell them apart
        if found is not None and os.path.realpath(Path(found).parent) == os.path.realpath(here.parent):
            return [name]
    return [str(here)]


def _script(part: str) -> Path:
    """A script of the checkout; it lies beside the one that was begun."""
    begun = Path(sys.argv[0])
    return begun.with_name(f"{part}.py") if begun.stem in SCRIPTS else Path(f"{part}.py")
