#!/usr/bin/env python3
"""Kills a sweep with SIGKILL at random moments, resumes it each time, and compares it with one left alone.

    python -m benchmarks.kill_resume --kills 50

A search (random sampler, asha pruner off) of two arms over two seeds on a tiny random model, on the CPU. Fails unless
every run of the undisturbed sweep is there once, with equal scores, and no other. Each start is a fork of a warm
process, so that what is killed is the sweep and not the import of its libraries.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [
    "-m", "experiment=smoke", "placement=attn,ff", "rank=4", "seed=0,1", "optim.lr=tag(log,interval(1e-4,1e-2))",
    "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler=random", "trainer.max_steps=24", "evaluation.every_steps=8",
    "hydra.sweeper.confirm_seeds=[2]", "sweep.checkpoint_seconds=0.2", "sweep.calibrate=false", "sweep.max_pack=3",
]  # fmt: skip


def sweep(root: str, study: str) -> None:
    os.setpgrp()
    with open(f"{root}/{study}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        sys.argv = ["train.py", *COMMAND, f"output_root={root}", f"study={study}"]
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as exit_:
            log.flush()
            os._exit(int(exit_.code or 0))


def start(root: str, study: str) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=sweep, args=(root, study))
    process.start()
    return process


def outcome(study: Path) -> dict[str, tuple]:
    """Run id -> status, steps, scores after training, trial."""
    found = {}
    for path in study.glob("*/record.json"):
        record = json.loads(path.read_text())
        after = {split: moments.get("after", {}).get("nll") for split, moments in record["scores"].items()}
        found[record["run_id"]] = (record["status"], record["steps"], after, record["search"].get("purpose"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}  # before torch is loaded

    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        calm = start(root, "calm")
        calm.join()
        alone = time.monotonic() - began
        if calm.exitcode:
            raise SystemExit(Path(root, "calm.log").read_text()[-3000:])
        expected = outcome(Path(root, "calm"))
        kills = rounds = 0
        study = 0
        while kills < args.kills:
            study, done = study + 1, False
            while not done:
                process = start(root, f"killed{study}")
                rounds += 1
                if kills < args.kills:
                    process.join(chance.uniform(0, alone / 2))
                if process.is_alive() and kills < args.kills:
                    os.killpg(process.pid, signal.SIGKILL) if os.getpgid(process.pid) == process.pid else process.kill()
                    kills += 1
                process.join()
                done = process.exitcode == 0
                if not done and process.exitcode != -signal.SIGKILL:
                    raise SystemExit(
                        f"exit {process.exitcode}: " + Path(root, f"killed{study}.log").read_text()[-3000:]
                    )
            found = outcome(Path(root, f"killed{study}"))
            missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
            different = [
                run_id for run_id in expected.keys() & found.keys() if not same(expected[run_id], found[run_id])
            ]
            print(
                f"study {study}: {kills} kills so far, {len(found)} runs; missing {len(missing)}, "
                f"more than there should be {len(extra)}, different {len(different)}",
                flush=True,
            )
            if missing or extra or different:
                pairs = [(expected[run_id], found[run_id]) for run_id in different]
                raise SystemExit(f"missing {missing}, extra {extra}, different {pairs}")
        print(f"{kills} kills over {study} studies and {rounds} starts: every study ended as the one left alone "
              f"({len(expected)} runs, {alone:.1f} s)")  # fmt: skip


def same(one: tuple, two: tuple) -> bool:
    """Equal but for the rounding of another pack's shape."""
    if (one[0], one[1], one[3]) != (two[0], two[1], two[3]) or one[2].keys() != two[2].keys():
        return False
    return all(a == b or abs(a - b) <= 1e-4 * abs(a) for a, b in zip(one[2].values(), two[2].values(), strict=True))


if __name__ == "__main__":
    main()
