"""Our sweeper and launcher inside Hydra, with others in their places."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest


def train(root: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    command = [sys.executable, str(root / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("name", ["ablation_sweeper", "own_conf", "packed_launcher"])
def test_modules_are_thin(name: str) -> None:
    """Hydra imports every plugin at every start, so nothing of the sweeper may be imported with them."""
    code = f"import hydra_plugins.lora_sweeper.{name}, sys; print('sweeper' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert importlib.import_module(f"hydra_plugins.lora_sweeper.{name}")


def test_axes_of_an_overlay_yield_to_the_command_line(root: Path, tmp_path: Path) -> None:
    common = ["experiment=placement_grid", "model=tiny_llama", "sweep.dry_run=true"]
    out = train(root, tmp_path, *common, "rank=2,3", "seed=0,1")
    assert "12 runs, 12 to train" in out.stdout, out.stderr


def test_a_grid_with_no_axis_is_one_run(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "-m", "experiment=smoke", "sweep.dry_run=true")
    assert "1 run, 1 to train" in out.stdout, out.stderr


def test_any_launcher_is_checked_before_its_first_job(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "-m", "experiment=smoke", "rank=4,4096", "hydra/launcher=basic")
    assert out.returncode == 2
    assert out.stderr.startswith("error: rank=4096 is above the size")
    assert list(tmp_path.iterdir()) == []
