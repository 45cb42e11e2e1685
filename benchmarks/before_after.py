#!/usr/bin/env python3
"""Whether a change costs time: two checkouts in turns (A B A B …), the ratio pair by pair.

    git worktree add ../before main
    python -m benchmarks.before_after ../before .                          # start-up and step time
    python -m benchmarks.before_after ../before . --only "packed step" --pairs 3

`finished grid`, `dry run` and `small grid` (nine tiny runs) are whole processes from return to prompt, caches warm;
`first start` is a small grid with an empty cache; `packed step` is one step of nine runs, or of 64, after warm-up, in a
process of its own. Both checkouts run on this interpreter. Above 1, the second is slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GRID = ["-m", "experiment=smoke", "placement=attn,ff,full", "rank=4,8,16"]
NINE = [(placement, rank) for placement in ("attn", "ff", "full") for rank in (4, 8, 16)]


def run(checkout: Path, folder: Path, command: list[str]) -> str:
    """What a Python command prints in a checkout; its caches and studies are in a folder of its own."""
    own = (str(checkout), str(checkout / "sweeper" / "plugins"))
    paths = os.pathsep.join(filter(None, (*own, os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths, "SWEEPER_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, *command], cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def seconds(checkout: Path, folder: Path, command: list[str]) -> float:
    began = time.perf_counter()
    run(checkout, folder, command)
    return time.perf_counter() - began


def finished_grid(checkout: Path, folder: Path) -> float:
    return seconds(checkout, folder, ["train.py", *GRID, f"output_root={folder}"])


def dry_run(checkout: Path, folder: Path) -> float:
    return seconds(checkout, folder, ["train.py", *GRID, f"output_root={folder}", "study=dry", "sweep.dry_run=true"])


def small_grid(checkout: Path, folder: Path) -> float:
    """Nine tiny runs from return to table; the first of a folder, which is not counted, fills the caches."""
    number = len(list(folder.glob("small_*")))
    return seconds(checkout, folder, ["train.py", *GRID, f"output_root={folder}", f"study=small_{number}"])


def first_start(checkout: Path, folder: Path) -> float:
    """As `small_grid`, with an empty cache folder."""
    number = len(list(folder.glob("first_*")))
    own = folder / f"first_{number}"
    own.mkdir(parents=True)
    return seconds(checkout, own, ["train.py", *GRID, f"output_root={own}"])


def packed_step(checkout: Path, folder: Path, runs: int = len(NINE)) -> float:
    import torch

    size = [] if torch.cuda.is_available() else ["--model", "tiny", "--packed-steps", "30", "--length", "32"]
    arms = json.dumps((NINE * runs)[:runs])
    told = run(checkout, folder, ["-m", "benchmarks.packed_vs_peft", *size, "--child", arms])
    return runs / json.loads(told.strip().splitlines()[-1])["run_steps_per_second"]


def large_packed_step(checkout: Path, folder: Path) -> float:
    return packed_step(checkout, folder, 64)


MEASURES: dict[str, Callable[[Path, Path], float]] = {
    "finished grid": finished_grid, "dry run": dry_run, "small grid": small_grid, "first start": first_start,
    "packed step": packed_step, "packed step, 64 runs": large_packed_step,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--pairs", type=int, default=5, help="of counted runs, after one of each that is not")
    parser.add_argument("--only", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    args = parser.parse_args()
    checkouts = [checkout.resolve() for checkout in (args.before, args.after)]
    print("| what | before, s | after, s | after / before | lowest and highest |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, name) for name in ("before", "after")]
        for what in args.only:
            sides = list(zip(checkouts, folders, strict=True))
            for side in sides:
                MEASURES[what](*side)
            pairs = [[MEASURES[what](*side) for side in sides] for _ in range(args.pairs)]
            ratios = sorted(after / before for before, after in pairs)
            before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
            middle = statistics.median(ratios)
            print(
                f"| {what} | {before:.4g} | {after:.4g} | {middle:.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
