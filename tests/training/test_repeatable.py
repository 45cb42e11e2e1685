"""The same command twice gives the same bits, whether costs were measured before, and whatever is in the cache."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sweeper import record
from sweeper.record import ADAPTER, METRICS, PREDICTIONS
from sweeper.spec import RunSpec

NOT_RESULTS = ("seconds", "time")


def outcome(folder: Path) -> tuple[Any, ...]:
    """All that a run's numbers are: steps, scores, predictions, saved weights."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    steps = [{key: value for key, value in row.items() if key not in NOT_RESULTS} for row in rows]
    weights = sorted((folder / ADAPTER).glob("*.safetensors"))
    scores = record.read_record(folder).scores
    return steps, scores, (folder / PREDICTIONS).read_bytes(), [path.read_bytes() for path in weights]


@pytest.fixture
def specs(make_run: Any) -> list[RunSpec]:
    """Arms and methods in one pack, one run alone, and one with all that is drawn at random."""
    trainer = {"max_steps": 6, "batch_size": 4, "neftune_alpha": 5.0}
    clipped = {"lr": 1e-2, "max_grad_norm": 0.05}
    return [
        make_run("attn", trainer=trainer, optim=clipped, method={"name": "lora", "dropout": 0.2}),
        make_run("full", rank=8, trainer=trainer, optim=clipped),
        make_run("ff", method={"name": "dora"}, trainer=trainer, optim=clipped),
        make_run("ff", method={"name": "adalora", "dropout": 0.2}, trainer=trainer),
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_command_twice_gives_the_same_bits(
    precision: str, specs: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    specs = [dataclasses.replace(s, trainer=dataclasses.replace(s.trainer, precision=precision)) for s in specs]
    found = {}
    for way in ("plain", "again", "measured", "measured-from-cache"):
        run_all(specs, way, calibrate=way.startswith("measured"))
        found[way] = [outcome(tmp_path / way / spec.run_id) for spec in specs]
    for way, outcomes in found.items():
        assert outcomes == found["plain"], way
