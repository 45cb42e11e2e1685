#!/usr/bin/env python3
"""Seconds that a study of 10,000 runs takes to plan, start, resume, list and analyse.

    python -m benchmarks.load                        # 10,000 runs, about three minutes
    python -m benchmarks.load --runs 1000 --only plan resume
    python -m benchmarks.load --keep /tmp/load       # leaves the study there; a second call measures it again

The grid: eight placements, five ranks, 25 learning rates and seeds, on a tiny random model. Records, curves and
predictions are written as the engine leaves them, with made-up scores. Each row is a command in a process of its own:

    plan     a dry run with no record there             start    until the first run has a record, of two steps
    resume   one run is missing and trains              again    nothing is missing: the table
    list     load_study, and every record read          analyse  python -m analysis with its figures
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PLACEMENTS = ("attn", "ff", "full", "attn_q", "attn_qv", "attn_vo", "ff_in", "ff_out")
RANKS = (1, 2, 4, 8, 16)
RATES = tuple(float(f"{1e-4 * 1.26**place:.3g}") for place in range(25))
EXAMPLES, STEPS = 100, 60
LISTING = (
    "import sys, sweeper; study = sweeper.load_study(sys.argv[1]); "
    "print(len(study.runs), sum(one.record.steps for one in study.runs))"
)


def overrides(root: Path, runs: int, steps: int = STEPS) -> list[str]:
    """The grid of at least so many runs, as it is typed."""
    seeds = -(-runs // (len(PLACEMENTS) * len(RANKS) * len(RATES)))
    return [
        "experiment=smoke", f"placement={','.join(PLACEMENTS)}", f"rank={','.join(map(str, RANKS))}",
        f"optim.lr={','.join(map(str, RATES))}", f"seed=range({seeds})", f"trainer.max_steps={steps}",
        f"output_root={root}", "study=load", "sweep.calibrate=false",
    ]  # fmt: skip


def write(root: Path, runs: int, *, records_alone: bool = False) -> int:
    """Writes what a finished study of that grid holds, or its records alone; returns how many runs it has."""
    from sweeper import config, device, record
    from sweeper.study import plan as planning

    found = config.expand(overrides(root, runs), config.composer_of())
    plan = planning.make(found.arms, found.settings)
    known: dict[tuple[str, int], Any] = {}
    for run in plan.runs:
        write_run(run, known, records_alone=records_alone)
    record.write_json(plan.study / device.PRECISION, {"auto": "float32"})
    return len(plan.runs)


def write_run(run: Any, known: dict[tuple[str, int], Any], *, records_alone: bool = False) -> None:
    """Record, curve and predictions of one run, in a folder of its own; its scores follow from its spec alone.

    `known` keeps the modules of each placement and rank.
    """
    import dataclasses

    import numpy as np

    from sweeper import methods, record, seal
    from sweeper.record import Efficiency, Module, Score
    from sweeper.spec import to_mapping
    from sweeper.study import plan as planning

    spec = run.spec
    rng = np.random.default_rng([int(run.run_id, 16)])
    shared = np.random.default_rng(0)
    tokens, hard = shared.integers(4, 14, EXAMPLES), shared.normal(0, 0.5, EXAMPLES)
    level = 3.0 - 0.05 * PLACEMENTS.index(spec.placement.name) - 0.02 * math.log2(spec.rank)
    level += 0.1 * math.log10(spec.optim.lr / 1e-3) ** 2 + rng.normal(0, 0.005)
    nll = {"before": 4.0 + hard, "after": level + hard + rng.normal(0, 0.05, EXAMPLES)}
    key = (spec.placement.name, spec.rank)
    if key not in known:
        known[key] = tuple(
            Module(
                name=target.name, role=target.role, layer=target.layer, rank=rank,
                parameters=methods.parameters(spec.method, target, rank),
            )
            for target, rank in planning.module_ranks(spec).items()
        )  # fmt: skip
    modules = known[key]
    scores, lines = {}, []
    for split in ("validation", "test"):
        scores[split] = {
            moment: Score(
                nll=float(values @ tokens / tokens.sum()), tokens=int(tokens.sum()), examples=EXAMPLES,
                metrics={"exact_match": 0.0},
            )
            for moment, values in nll.items()
        }  # fmt: skip
        lines += [
            {"split": split, "moment": moment, "id": f"e{place}", "nll": round(value * count, 5), "tokens": count,
             "exact_match": 0.0}
            for moment, values in nll.items()
            for place, (value, count) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True))
        ]  # fmt: skip
    curve = [
        {"step": step, "loss": level + 2 * math.exp(-step / 10), "lr": spec.optim.lr, "grad_norm": 1.0, "tokens": 60,
         "total_tokens": 200, "seconds": 0.01}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    found = record.Record(
        run_id=run.run_id, study="load", status="completed", spec=to_mapping(spec), modules=modules,
        trainable_parameters=sum(module.parameters for module in modules), total_parameters=500_000, steps=STEPS,
        scores=scores, data={split: {"examples": EXAMPLES, "groups": EXAMPLES} for split in scores},
        efficiency=Efficiency(
            train_seconds_amortised=0.1, eval_seconds_amortised=0.1, train_tokens=12_000, train_flops=1e9 * spec.rank,
            adapter_bytes=1000 * spec.rank, pack_runs=64,
        ),
        environment={"device": "cpu", "precision": "float32", "versions": {"torch": "2.13.0"}},
        started="2026-01-01T00:00:00+00:00", finished="2026-01-01T00:01:00+00:00",
    )  # fmt: skip
    run.folder.mkdir(parents=True)
    for name, rows in () if records_alone else ((record.PREDICTIONS, lines), (record.METRICS, curve)):
        (run.folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run.folder / record.RECORD).write_text(seal.sealed(dataclasses.asdict(found), indent=1))


def train(root: Path, runs: int, *more: str, steps: int = STEPS) -> list[str]:
    return [sys.executable, "train.py", "-m", *overrides(root, runs, steps), *more]


def timed(command: list[str]) -> float:
    """Seconds of a command, which must end well."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[-300:]}\n{(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - began


def plan(root: Path, runs: int) -> float:
    return timed(train(root / "empty", runs, "sweep.dry_run=true"))


def start(root: Path, runs: int) -> float:
    """Until the first record; the sweep is then stopped."""
    began, study = time.perf_counter(), root / "started" / "load"
    with subprocess.Popen(
        train(root / "started", runs, steps=2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as sweep:
        while sweep.poll() is None and not any(study.glob("*/record.json")):
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        sweep.send_signal(signal.SIGINT)
        errors = (sweep.stderr.read() if sweep.stderr else b"").decode()
    if not any(study.glob("*/record.json")):
        raise SystemExit(errors[-3000:])
    shutil.rmtree(root / "started")
    return seconds


def resume(root: Path, runs: int) -> float:
    missing = min((root / "load").glob("*/record.json")).parent
    shutil.rmtree(missing)
    return timed(train(root, runs))


def again(root: Path, runs: int) -> float:
    return timed(train(root, runs))


def listing(root: Path, runs: int) -> float:
    return timed([sys.executable, "-c", LISTING, str(root / "load")])


def analyse(root: Path, runs: int) -> float:
    return timed([sys.executable, "-m", "analysis", str(root / "load"), "--out", str(root / "paper")])


MEASURES: dict[str, Callable[[Path, int], float]] = {
    "plan": plan, "start": start, "resume": resume, "again": again, "list": listing, "analyse": analyse,
}  # fmt: skip


def measure(root: Path, runs: int, names: list[str]) -> Iterator[tuple[str, float, float]]:
    """Name, seconds, and seconds of CPU, which other work on the machine does not change."""
    for name in names:
        used = cpu_seconds()
        seconds = MEASURES[name](root, runs)
        yield name, seconds, cpu_seconds() - used


def cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="at least so many (10000); a multiple of 1000 is met")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--keep", type=Path, help="write the study here, and leave it")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        if not (root / "load").exists():
            began = time.perf_counter()
            count = write(root, args.runs)
            print(f"{count:,} runs written in {time.perf_counter() - began:.1f} s", flush=True)
        found = {}
        print(f"{'':>10}{'seconds':>10}{'CPU s':>10}")
        for name, seconds, cpu in measure(root, args.runs, args.only):
            found[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
            print(f"{name:>10}{seconds:>10.1f}{cpu:>10.1f}", flush=True)
        print(json.dumps({"runs": args.runs, **found}))


if __name__ == "__main__":
    main()
