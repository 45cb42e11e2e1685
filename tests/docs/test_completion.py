"""Completion in a real bash, as the README and the documentation print it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.carried_out import ROOT
from tools import printed_commands

BASH = shutil.which("bash")
PROBE = r"""
source ./script
COMP_LINE="$1" COMP_POINT=${#1} COMP_CWORD=9
read -ra COMP_WORDS <<<"$1"
compopt() { :; }
_lora_atlas_complete
printf '%s\n' "${COMPREPLY[@]}"
"""


def completed(folder: Path, line: str) -> list[str]:
    """What bash offers behind a line, in a folder that looks like a clone."""
    assert BASH is not None
    done = subprocess.run([BASH, "-c", PROBE, "bash", line], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `.venv/bin/python` and `train.py`, and the script that the printed command evaluates."""
    if BASH is None:
        pytest.skip("no bash")
    folder = tmp_path_factory.mktemp("clone")
    interpreter = folder / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!{BASH}\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    (folder / "train.py").write_text(f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    printed = {command.text for command in printed_commands.printed(ROOT) if command.text.startswith('eval "$(.venv')}
    (command,) = {match[1] for text in printed if (match := re.fullmatch(r'eval "\$\((.*)\)"', text))}
    script = subprocess.run([BASH, "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout
    (folder / "script").write_text(script)
    return folder


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (".venv/bin/python train.py place", ["placement.", "placement="]),
        (".venv/bin/python train.py -m placement=attn_q", ["attn_q", "attn_qk", "attn_qv"]),
        (".venv/bin/python train.py -m placement=full,mix", ["full,mixer"]),
        (".venv/bin/python train.py rank=8 optim.warm", ["optim.warmup_fraction="]),
        (".venv/bin/python setup.py place", []),
    ],
)
def test_the_printed_line_completes(line: str, offered: list[str], clone: Path) -> None:
    assert completed(clone, line) == offered


def test_bash_takes_the_script_for_python_by_its_path(clone: Path) -> None:
    asked = "source ./script; complete -p python"
    done = subprocess.run([str(BASH), "-c", asked], cwd=clone, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "complete -o default -F _lora_atlas_complete python"
