"""The command `lora-atlas`: finds the part that is asked for, and says what the part needs where that is missing.

Nothing of a part is imported before it is asked for.
"""

import importlib.util
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass

from sweeper import __version__, installation
from sweeper.errors import SweeperError, unknown
from sweeper.installation import NAME

READER_GONE = 141  # the exit code of what a shell ends so: 128 and the number of SIGPIPE


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A subcommand: what it does in a line, how it runs (the exit code), and the modules and extra that it needs."""

    about: str
    run: Callable[[], int]
    needs: tuple[str, ...] = ()
    extra: str = ""


def main() -> int:
    """Runs the part named first in `sys.argv` with what follows it; returns the exit code of the command."""
    installation.forgive_output()
    try:
        try:
            return _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return READER_GONE


def _run() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"{NAME} {__version__}")
        return 0
    if name in ("-sc", "--shell-completion"):
        return _complete()
    if name not in PARTS:
        print(f"error: {unknown('command', name, PARTS, given=f'{NAME} {name}')}", file=sys.stderr)
        return 2
    if missing := [module for module in PARTS[name].needs if importlib.util.find_spec(module) is None]:
        how = installation.install(PARTS[name].extra)
        print(f"error: {NAME} {name} needs {', '.join(missing)}: {how}", file=sys.stderr)
        return 2
    del sys.argv[1]  # parts, and Hydra, read the rest as their own
    return PARTS[name].run()


def _reader_is_gone() -> bool:
    """Whether what reads our output has ended, as `head` does; nothing more is written to it then."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # only what is reported unasked: that the other end is closed
    if not poller.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def usage() -> str:
    """What `lora-atlas --help` prints."""
    parts = "\n".join(f"  {name:10}{part.about}" for name, part in PARTS.items())
    return (
        "LoRA Atlas: which layers should LoRA adapt, at which rank, and what does each choice cost?\n\n"
        f"{NAME} COMMAND [...]\n\n{parts}\n\n"
        f'{NAME} COMMAND --help says more; {NAME} --version; shell completion: eval "$({NAME} -sc install=bash)"'
    )


def _train() -> int:
    import hydra

    from sweeper import cli

    cli.put_flags_last()
    # a function of a module: launchers that train in other processes send it there by its name
    return cli.run(hydra.main(version_base="1.3", config_path=str(installation.CONF), config_name="config")(cli.train))


def _evaluate() -> int:
    from sweeper import cli
    from sweeper.rescoring import command

    return cli.run(lambda: command.main(sys.argv[1:]))


def _adapters() -> int:
    from sweeper import cli
    from sweeper.adapters import command

    return cli.run(lambda: command.main(sys.argv[1:]))


def _analyse() -> int:
    code: int = installation.analysis("__main__").main(sys.argv[1:])
    return code


def _repeat() -> int:
    from sweeper import cli

    sys.argv[1:] = [cli.FROM, *sys.argv[1:]]
    cli.put_flags_last()
    return 0


def _bundle() -> int:
    code: int = installation.analysis("bundle").main(sys.argv[1:])
    return code


def _cache() -> int:
    from sweeper import cache

    return cache.main(sys.argv[1:])


def _fetch() -> int:
    from sweeper import fetch

    try:
        fetch.main(sys.argv[1:])
    except SweeperError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _complete() -> int:
    """Prints the script that bash is to carry out, so that commands and what follows `train` are completed."""
    from sweeper.completion import SCRIPTS

    asked = sys.argv[-1]
    if asked not in SCRIPTS:
        print(f"error: {asked}: completion is {' or '.join(SCRIPTS)}", file=sys.stderr)
        return 2
    print(SCRIPTS[asked])
    return 0


_TRAINING = ("hydra", "torch", "transformers", "peft")
PARTS = {
    "train": _Part(
        about="train a run, or with -m every run of a grid that is still missing", run=_train,
        needs=_TRAINING, extra="train",
    ),
    "repeat": _Part(
        about="train the run of a record once more and compare the two", run=_repeat, needs=_TRAINING, extra="train"
    ),
    "evaluate": _Part(
        about="score saved adapters on any tasks, without training", run=_evaluate, needs=_TRAINING, extra="train"
    ),
    "adapters": _Part(
        about="merge, combine or route saved adapters; look at their spectra", run=_adapters,
        needs=_TRAINING, extra="train",
    ),
    "analyse": _Part(
        about="tables, tests, figures and a report from a study's records", run=_analyse,
        needs=("matplotlib", "moocore", "pandas", "scipy"), extra="analysis",
    ),
    "bundle": _Part(
        about="a study as one file with its analysis, and `bundle verify FILE`", run=_bundle,
        needs=("matplotlib", "moocore", "pandas", "scipy"), extra="analysis",
    ),
    "cache": _Part(about="what the cache folder holds, and `cache clean`", run=_cache),
    "fetch": _Part(about="put the default model and data, or others that lie in packages, into the cache", run=_fetch),
}  # fmt: skip
