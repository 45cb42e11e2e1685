"""What a run costs alone is its own, whichever run is measured first."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import record
from sweeper.training import calibrate
from sweeper.training.calibrate import Requested, measure, warm_peak
from sweeper.training.pack_config import PackConfig

OPTIONS = PackConfig(batch_size=4)


class Allocator:
    """Counts as CUDA's does. `WORKSPACE` bytes are made by the first pass that needs them and kept."""

    WORKSPACE, GARBAGE = 32_000, 9_000

    def __init__(self) -> None:
        self.current = self.peak = 1_000
        self.ready = False

    def hold(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)

    def reset_peak(self) -> None:
        self.peak = self.current

    def passes(self, size: int) -> None:
        if not self.ready:
            self.hold(self.WORKSPACE)
            self.ready = True
        self.hold(size)
        self.hold(-size)


class Cycle:
    """Memory that only the garbage collector gives back."""

    def __init__(self, memory: Allocator) -> None:
        self.me, self.memory = self, memory
        memory.hold(memory.GARBAGE)

    def __del__(self) -> None:
        self.memory.hold(-self.memory.GARBAGE)


@pytest.mark.parametrize("order", [(500, 700, 300), (300, 700, 500), (700, 300, 500)])
def test_the_peak_of_a_run_does_not_depend_on_which_was_first(order: tuple[int, ...]) -> None:
    memory: Any = Allocator()
    found = {}
    for size in order:
        found[size] = warm_peak(lambda size=size: memory.passes(size), memory)
        Cycle(memory)
    assert found == {size: size for size in order}


def test_what_is_on_disk_is_read_again_but_not_what_was_measured_otherwise(
    load: Any, make_job: Any, make_adapter: Any, make_examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama")
    job = make_job("x", make_adapter(base, "attn", 4), make_examples(0))
    first = measure(base, job, OPTIONS, tmp_path)
    (path,) = tmp_path.iterdir()
    marked = json.loads(path.read_text()) | {"peak_memory_bytes": 12_345}
    path.write_text(json.dumps(marked))
    assert measure(base, job, OPTIONS, tmp_path).peak_memory_bytes == first.peak_memory_bytes  # not what was written
    marked = json.loads(path.read_text()) | {"peak_memory_bytes": 12_345}
    first = measure(base, job, OPTIONS, tmp_path)
    del marked["seal"]
    path.write_text(json.dumps(marked))
    assert measure(base, job, OPTIONS, tmp_path) == dataclasses.replace(first, peak_memory_bytes=12_345)
    monkeypatch.setattr(calibrate, "SAVED_TENSORS", "in another way")
    again = measure(base, job, OPTIONS, tmp_path)
    assert again.peak_memory_bytes == first.peak_memory_bytes
    assert again.memory_measured == "in another way"


def test_the_record_says_how_memory_was_measured(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    measured, not_measured = make_run("attn"), make_run("ff")
    run_all([measured], calibrate=True)
    run_all([not_measured], calibrate=False)
    ways = [
        record.read_record(tmp_path / "study" / spec.run_id).efficiency.memory_measured
        for spec in (measured, not_measured)
    ]
    assert ways == ["saved tensors", None]


def test_a_step_is_timed_several_times_and_the_record_has_them_all(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = make_run("attn")
    run_all([spec], calibrate=True)
    found = record.read_record(tmp_path / "study" / spec.run_id)
    seconds = found.efficiency.step_seconds_solo
    assert len(seconds) == calibrate.REPEATS["cpu"][0]
    assert found.efficiency.train_seconds_solo == pytest.approx(sorted(seconds)[1] * found.steps)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])  # fmt: skip
def test_arms_cost_the_same_in_any_order(
    device: str, load: Any, make_job: Any, make_adapter: Any, make_examples: Any, tmp_path: Path
) -> None:
    import copy

    base = load("llama")
    if device == "cuda":
        base = dataclasses.replace(base, model=copy.deepcopy(base.model).to("cuda", torch.bfloat16))
    arms = [("attn", 4), ("ff", 8), ("full", 16)]
    jobs = [make_job(f"{name}{rank}", make_adapter(base, name, rank), make_examples(0)) for name, rank in arms]
    found = [
        {job.run_id: measure(base, job, OPTIONS, tmp_path / str(turn)).peak_memory_bytes for job in order}
        for turn, order in enumerate((jobs, jobs[::-1]))
    ]
    assert found[0] == found[1]
    assert found[0]["attn4"] < found[0]["ff8"] < found[0]["full16"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_requests_are_counted_and_not_blocks() -> None:
    memory = Requested(torch.device("cuda"))
    before = memory.current
    held = torch.empty(1000, dtype=torch.uint8, device="cuda")
    assert memory.current - before == len(held) == 1000  # of which the allocator makes 1024
