"""A real Ray on this machine: two workers share a sweep, and one that dies costs nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from sweeper import record

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(280)


def driver(root: Path, outputs: Path, study: str, axes: Sequence[str]) -> subprocess.Popen[str]:
    command = [
        sys.executable, "train.py", "-m", "experiment=smoke", *axes, "hydra/launcher=ray", "hydra.launcher.workers=2",
        f"output_root={outputs}", f"study={study}", "sweep.calibrate=false", "sweep.checkpoint_seconds=0.3",
    ]  # fmt: skip
    with (outputs / f"{study}.log").open("w") as log:
        return subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, text=True)


def workers(parent: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "_Worker.train" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(what: object, seconds: float = 90) -> None:
    assert callable(what)
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.1)


def test_a_worker_killed_in_the_middle_of_its_pack_loses_nothing(root: Path, tmp_path: Path) -> None:
    axes = ["placement=attn,ff", "rank=2,4,8", "trainer.max_steps=150"]
    process = driver(root, tmp_path, "killed", axes)
    study = tmp_path / "killed"
    wait_for(lambda: len(list(study.glob("*/checkpoint.safetensors"))) == 6 or process.poll() is not None)
    crew = workers(process.pid)
    assert len(crew) == 2, (tmp_path / "killed.log").read_text()
    os.kill(crew[0].pid, signal.SIGKILL)
    assert process.wait(180) == 0, (tmp_path / "killed.log").read_text()
    said = (tmp_path / "killed.log").read_text()
    assert re.search(r"worker \d died; its 3 runs go to others", said)
    found = list(record.records(study))
    assert {one.status for one in found} == {"completed"}
    assert len(found) == 6
    assert {one.steps for one in found} == {150}
    for one in found:
        lines = (study / one.run_id / "metrics.jsonl").read_text().splitlines()
        steps = [int(match[1]) for line in lines if '"loss"' in line and (match := re.search(r'"step": (\d+)', line))]
        assert steps == list(range(1, 151))


def test_a_search_over_two_workers_prunes_and_stops_when_asked(root: Path, tmp_path: Path) -> None:
    axes = [
        "placement=attn,ff", "rank=4", "optim.lr=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.n_trials=8",
        "trainer.max_steps=48", "evaluation.every_steps=6", "hydra.sweeper.pruner=asha",
    ]  # fmt: skip
    process = driver(root, tmp_path, "search", axes)
    study = tmp_path / "search"
    wait_for(lambda: len(list(study.glob("*/record.json"))) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "search.log").read_text()
    assert "the same command goes on from here" in (tmp_path / "search.log").read_text()
    process = driver(root, tmp_path, "search", axes)
    assert process.wait(180) == 0, (tmp_path / "search.log").read_text()
    found = list(record.records(study))
    assert len(found) == 16
    assert {one.status for one in found} == {"completed", "pruned"}
