"""Commands that are printed run as they stand, wherever the process was begun."""

import subprocess
import sys
from pathlib import Path

import pytest

from sweeper import installation, shell


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with its own environment, in which train.py was begun."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "rank=4,8", "study=a b"])
    return tmp_path


def test_in_a_clone_it_is_the_environments_python(clone: Path) -> None:
    analyse = shell.command("analyse", "outputs/x", "--out", "paper/")
    assert analyse == ".venv/bin/python -m analysis outputs/x --out paper/"
    assert shell.command("evaluate", "outputs/a b") == ".venv/bin/python evaluate.py 'outputs/a b'"
    assert shell.this_command() == ".venv/bin/python train.py -m rank=4,8 'study=a b'"


def test_begun_by_the_installed_command_it_is_that(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lora-atlas", "train", "-m", "rank=4,8"])
    assert shell.command("analyse", "outputs/x", "--out", "paper/") == "lora-atlas analyse outputs/x --out paper/"
    assert shell.command("train", "rank=8") == "lora-atlas train rank=8"
    assert shell.this_command() == shell.noted() == "lora-atlas train -m rank=4,8"
    monkeypatch.setattr(sys, "argv", ["lora-atlas", "-m", "rank=4,8"])  # its own first word is taken off for Hydra
    assert shell.this_command() == "lora-atlas train -m rank=4,8"


def test_elsewhere_it_is_the_python_of_the_path_or_its_full_name(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other/bin"
    other.mkdir(parents=True)
    (other / "python").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(other / "python"))
    monkeypatch.setattr(sys, "argv", ["../atlas/train.py", "rank=8"])
    monkeypatch.setenv("PATH", str(other))
    assert shell.command("analyse", "outputs/x") == "python -m analysis outputs/x"
    assert shell.command("adapters", "spectra") == "python ../atlas/adapters.py spectra"
    assert shell.this_command() == "python ../atlas/train.py rank=8"
    monkeypatch.setenv("PATH", str(clone))
    assert shell.command("analyse") == f"{other / 'python'} -m analysis"


def test_what_a_study_notes_has_nothing_of_the_machine(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "rank=8"])
    assert shell.noted() == "python train.py rank=8"


def test_the_printed_python_is_the_one_that_runs(tmp_path: Path) -> None:
    prefix = subprocess.run(
        [*installation.python(), "-c", "import sys; print(sys.prefix)"], cwd=Path.cwd(), capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    assert prefix == sys.prefix
