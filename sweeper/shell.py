"""Commands that are printed to be typed: they run as they stand, in the folder and with the Python of this process."""

import shlex
import sys
from pathlib import Path

from sweeper.installation import NAME, SCRIPTS, is_command, program, python

PARTS = (*SCRIPTS, "analyse")


def command(part: str, *words: str) -> str:
    """What to type for a part of the project: "train", "evaluate", "adapters" or "analyse", with some words."""
    return " ".join([program(part), shlex.join(words)]).rstrip()


def this_command() -> str:
    """The command that began this process, to be typed again."""
    given = sys.argv[1:]
    if is_command():
        return shlex.join([NAME, *(() if given[:1] and given[0] in PARTS else ("train",)), *given])
    return shlex.join([*python(), sys.argv[0], *given])


def noted() -> str:
    """The command that began this process, for readers elsewhere: with nothing of this machine in it."""
    return this_command() if is_command() else shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
