"""What falls to each worker; and a real Ray on this machine: two share a sweep, and one that dies costs nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sweeper import record
from sweeper.arms import grouped
from sweeper.lost import ContextLost
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings
from sweeper.study.scheduler import Scheduler
from sweeper.training.events import RunFinished

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


@pytest.fixture
def crew(make_spec: Callable[..., RunSpec], study: Settings) -> Any:
    """Two workers that have not asked for anything yet, and a grid of four arms with three seeds each."""
    from sweeper.study.ray_workers import RaySettings, _Crew

    specs = [make_spec(rank=rank, seed=seed) for rank in (2, 4, 8, 16) for seed in (0, 1, 2)]
    work = Scheduler(grouped(specs), [spec.run_id for spec in specs], study)
    return _Crew(
        scheduler=work, ray_settings=RaySettings(workers=2), desk=None, holds={"worker 1": set(), "worker 2": set()}
    )


def take(crew: Any, worker: str) -> list[RunSpec]:
    """What a worker gets that has room for everything."""
    kinds = crew.answer(worker, "pending", None, stop=False)
    pulled = crew.answer(worker, "pull", (64, [kind.key for kind in kinds]), stop=False)
    return [request.spec for request in pulled.runs]


def test_each_worker_gets_an_equal_part_of_every_arm_whenever_it_comes(crew: Any) -> None:
    parts = [take(crew, "worker 1"), take(crew, "worker 1"), take(crew, "worker 2"), take(crew, "worker 1")]
    assert [len(part) for part in parts] == [6, 0, 6, 0]
    assert len({spec.run_id for part in parts for spec in part}) == 12
    for part in (parts[0], parts[2]):
        assert set(Counter(spec.rank for spec in part).values()) <= {1, 2}
        assert {spec.rank for spec in part} == {2, 4, 8, 16}


def most_at_once(groups: Any) -> int:
    from sweeper.training.trainer import Alike

    return Alike(groups=groups).most_at_once


def test_a_worker_makes_room_for_its_own_part_alone(crew: Any, make_record: Callable[..., Record]) -> None:
    first = crew.answer("worker 1", "pending", None, stop=False)
    assert (most_at_once(first), sum(kind.left for kind in first)) == (6, 6)
    specs = take(crew, "worker 1")
    late = crew.answer("worker 2", "pending", None, stop=False)
    assert (most_at_once(late), sum(kind.left for kind in late)) == (6, 6)
    # the other never came: what waits is shared anew each time
    crew.answer("worker 1", "report", [RunFinished(record=make_record(spec)) for spec in specs], stop=False)
    again = crew.answer("worker 1", "pending", None, stop=False)
    assert (most_at_once(again), sum(kind.left for kind in again)) == (3, 3)
    assert len(take(crew, "worker 1")) == 3


def test_a_turn_asks_ray_at_most_once_what_there_is(crew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes by it as a whole: a GPU that joins meanwhile is seen by the next."""
    from sweeper.study import ray_workers

    asked, hired = list[int](), list[dict[str, Any]]()

    def gpus() -> int:
        asked.append(len(asked) + 2)
        return asked[-1]

    actor = SimpleNamespace(remote=lambda *_: SimpleNamespace(train=SimpleNamespace(remote=lambda: None)))
    kind = SimpleNamespace(options=lambda **options: hired.append(options) or actor)
    monkeypatch.setattr(ray_workers, "_gpus", gpus)
    monkeypatch.setattr(ray_workers.ray, "remote", lambda _: kind)
    crew.ray_settings, crew.holds = ray_workers.RaySettings(), {}
    for seconds, there in ((0.0, 2), (0.01, 2), (1.0, 3)):
        monkeypatch.setattr(ray_workers, "time", SimpleNamespace(monotonic=lambda seconds=seconds: seconds))
        crew.look()
        crew.hire()
        for worker in crew.holds:
            take(crew, worker)
        assert (len(crew.alive), crew.wanted()) == (there, there)
    assert asked == [2, 3]
    assert [options["num_gpus"] for options in hired] == [1, 1, 1]


def test_a_worker_that_lost_its_gpu_is_replaced_and_its_runs_go_on(crew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often: which of them is to blame is found by the engine."""
    from ray.exceptions import RayTaskError

    from sweeper.study import ray_workers

    killed: list[str] = []

    def get(_: Any) -> None:
        raise RayTaskError("train", "traceback", ContextLost("assert")).as_instanceof_cause()

    monkeypatch.setattr(ray_workers.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray_workers.ray, "get", get)
    monkeypatch.setattr(ray_workers.ray, "kill", killed.append)
    assert len(take(crew, "worker 1")) == 6
    for number in range(5):
        crew.alive["worker 1"] = (f"actor {number}", None)
        crew.notice()
        crew.holds["worker 1"] = set()
        assert len(take(crew, "worker 1")) == 6
    assert killed == [f"actor {number}" for number in range(5)]
    assert len(take(crew, "worker 2")) == 6
    assert not crew.scheduler.records


@pytest.mark.slow
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


@pytest.mark.slow
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
