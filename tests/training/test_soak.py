"""Runs that follow one another leave nothing behind: handles, threads, processes, and objects of ours."""

import gc
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sweeper
from benchmarks.soak import children
from sweeper.study.scheduler import Scheduler
from sweeper.training.batches import DataOrder
from sweeper.training.events import RunFinished
from sweeper.training.pack import Pack
from sweeper.training.run_state import RunState

COUNTED = (DataOrder, Pack, RunState)


def held() -> dict[str, int]:
    objects = Counter(type(one).__name__ for one in gc.get_objects() if type(one) in COUNTED)
    return {
        "handles": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
        "children": len(children(os.getpid())), **{kind.__name__: objects[kind.__name__] for kind in COUNTED},
    }  # fmt: skip


@pytest.mark.slow
def test_sixty_runs_in_several_packs_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the collector: what only it would find is held until it comes by."""
    seen: list[dict[str, int]] = []
    ended: list[str] = []
    report = Scheduler.report

    def look(self: Scheduler, event: Any) -> None:
        report(self, event)
        if isinstance(event, RunFinished):
            ended.append(event.record.run_id)
            if len(ended) % 6 == 0:  # to look through all objects takes a while
                seen.append(held())

    monkeypatch.setattr(Scheduler, "report", look)
    gc.collect()
    gc.disable()
    try:
        found = sweeper.sweep(
            "experiment=smoke", "placement=attn,ff", "rank=2,4", "seed=range(15)", "trainer.device=cpu",
            "trainer.max_steps=2", "trainer.batch_size=2", "sweep.max_pack=4", "sweep.calibrate=false",
            output_root=tmp_path, study="soak",
        )  # fmt: skip
    finally:
        gc.enable()
    assert [one.status for one in found.runs] == ["completed"] * 60
    early, late = seen[:3], seen[-3:]
    for name in early[0]:
        assert max(one[name] for one in late) <= max(one[name] for one in early), name
