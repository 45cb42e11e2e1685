"""A command that loses its GPU goes on in a fresh process, finds the run that it is for, and says so at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sweeper import cli, lost, record
from sweeper.lost import ContextLost, Former

BREAKS = {
    # as on a card: once an assert has fired, everything that is asked of it fails
    "cpu": 'raise RuntimeError("CUDA error: device-side assert triggered")',
    "cuda": "torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')]",
}

# train.py of a process in which a run of rank 3 breaks the device in its third step
TRAIN = """
import os, runpy, sys
import torch
from sweeper.training.pack import Pack
print("process", os.getpid(), file=sys.stderr)
step, snapshot, dead = Pack.step, Pack.snapshot, []
def broken(pack):
    ranks = [set(job.adapter.ranks.values()) for _, job in pack.active]
    if dead or any(3 in found and job.done == 2 for found, (_, job) in zip(ranks, pack.active)):
        dead.append(1)
        {breaks}
    step(pack)
def snapped(pack, slot):
    if dead:
        {breaks}
    return snapshot(pack, slot)
Pack.step, Pack.snapshot = broken, snapped
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(root: Path, cwd: Path, *arguments: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    code = TRAIN.format(breaks=BREAKS[device], script=str(root / "train.py"))
    env = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS", lost.VARIABLE)}
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    env |= {"SWEEPER_CACHE": str(cwd / "cache"), "PYTHONPATH": paths}
    common = ["experiment=smoke", "placement=attn", f"trainer.device={device}", "trainer.precision=float32"]
    return subprocess.run(
        [sys.executable, "-c", code, *common, *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def statuses(study: Path) -> dict[Any, str]:
    return {found.spec["rank"]: found.status for found in record.records(study)}


def grid(root: Path, cwd: Path, device: str) -> None:
    out = train(root, cwd, "-m", "rank=2,3,4,5", "sweep.calibrate=false", device=device)
    assert out.returncode == 1, out.stderr
    assert statuses(cwd / "outputs/smoke") == {2: "completed", 3: "failed", 4: "completed", 5: "completed"}
    assert out.stderr.count("the GPU is lost to this process") == 3  # of four runs, of two, of one
    processes = {line for line in out.stderr.splitlines() if line.startswith("process")}
    assert len(processes) == 1  # it is replaced, so whoever waits for it waits on
    assert "error: 1 of 4 runs failed; the same command trains just these again" in out.stderr
    (failed,) = [found for found in record.records(cwd / "outputs/smoke") if found.status == "failed"]
    assert failed.error is not None
    assert failed.error["class"] == "ContextLost"
    assert "device-side assert" in failed.error["message"]
    assert failed.run_id in out.stderr
    assert (cwd / "outputs/smoke" / failed.run_id / "traceback.txt").exists()


@pytest.mark.slow
def test_a_grid_goes_on_in_fresh_processes(root: Path, tmp_path: Path) -> None:
    grid(root, tmp_path, "cpu")


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="needs CUDA")
def test_a_grid_goes_on_after_a_real_assert_on_cuda(root: Path, tmp_path: Path) -> None:
    grid(root, tmp_path, "cuda")


@pytest.mark.slow
def test_a_run_alone_needs_no_other_process(root: Path, tmp_path: Path) -> None:
    out = train(root, tmp_path, "rank=3", "sweep.calibrate=false")
    assert out.returncode == 1, out.stderr
    assert out.stderr.count("process ") == 1
    assert "ContextLost: CUDA error: device-side assert triggered" in out.stderr


@pytest.mark.slow
def test_jobs_of_hydras_own_launcher_go_on_too(root: Path, tmp_path: Path) -> None:
    """They share a process: the one after the bad run finds the device gone."""
    out = train(root, tmp_path, "-m", "rank=3,4", "sweep.calibrate=false", "hydra/launcher=basic")
    assert out.returncode == 1, out.stderr
    assert statuses(tmp_path / "outputs/smoke") == {3: "failed", 4: "completed"}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the process would be replaced by."""
    found: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *call: found.extend(call))
    monkeypatch.setattr(lost, "_ended", {})
    monkeypatch.delenv(lost.VARIABLE, raising=False)
    return found


def test_the_next_process_knows_what_failed_before(process: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", "-m", "rank=4,8"])
    monkeypatch.setenv("MINE", "kept")
    lost.note("aaa", failed=True)
    lost.note("bbb", failed=False)

    def main() -> None:
        raise ContextLost("assert")

    assert cli.run(main) == 1
    program, arguments, environment = process
    assert program == sys.executable
    assert arguments[1:] == ["-X", "dev", "train.py", "-m", "rank=4,8"]
    assert environment["MINE"] == "kept"
    assert cli.FULL not in environment
    monkeypatch.setenv(lost.VARIABLE, environment[lost.VARIABLE])
    assert lost.former() == Former(failed=("aaa",), in_a_row=0, measure=True)
    process.clear()
    monkeypatch.setattr(lost, "_ended", {})
    lost.go_on(ContextLost("assert", measuring=True))
    monkeypatch.setenv(lost.VARIABLE, process[2][lost.VARIABLE])
    assert lost.former() == Former(failed=("aaa",), in_a_row=1, measure=False)


def test_processes_that_get_nowhere_end(
    process: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"failed": [], "in_a_row": lost.MOST_IN_A_ROW, "measure": True}
    monkeypatch.setenv(lost.VARIABLE, json.dumps(row))
    lost.go_on(ContextLost("assert"))
    assert not process
    assert "11 processes in a row lost the GPU" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"failed": 3}'])
def test_an_environment_that_makes_no_sense_is_as_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lost.VARIABLE, text)
    assert lost.former() == Former()


def test_signs_of_a_lost_context() -> None:
    assert lost.is_sign(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert lost.is_sign(ContextLost("assert"))
    later = KeyError("weight")
    later.__context__ = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    assert lost.is_sign(later)
    for harmless in ("CUDA out of memory. Tried to allocate 8 GiB", "CUDA error: invalid argument", "an assert"):
        assert not lost.is_sign(RuntimeError(harmless))
