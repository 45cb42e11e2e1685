#!/usr/bin/env python3
"""How long the analysis takes and how much memory.

    python -m benchmarks.analysis_scale                       # 100 and 10,000 runs, tests clustered by 40 groups
    python -m benchmarks.analysis_scale 1000 --no-figures
    python -m benchmarks.analysis_scale --arms                # 256 arms in 9,984 runs

Writes synthetic studies (two tasks, five placements, ten ranks, ten learning rates; 200 examples, 60 steps a run), runs
`python -m analysis` on each with its defaults and prints seconds, seconds of CPU (which another process beside it does
not change) and peak memory as a table and as JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

from tests.analysis.synthetic import ROLES, SHAPES, Truth, write_study

PLACEMENTS = {"attn": 0.155, "ff": 0.125, "full": 0.105, "attn_qv": 0.17, "ff_in": 0.135}
RATES = (1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)


def make(folder: Path, runs: int, groups: int | None) -> None:
    """A study of about `runs` runs, whose predictions name that many groups of examples (None: none)."""
    if runs < 1000:
        seeds = range(max(1, round(runs / 24)))
        write_study(folder, ranks=(1, 2, 4, 8, 16, 32, 64, 128), seeds=seeds, groups=groups, group_sd=0.01)
    else:
        ranks, datasets = [2**i for i in range(10)], ("icd10_chapter", "gsm_symbolic")
        seeds = range(max(1, round(runs / 1000)))
        write_study(
            folder, truth=Truth(placements=PLACEMENTS), datasets=datasets, ranks=ranks, lrs=RATES, seeds=seeds,
            groups=groups, group_sd=0.01,
        )  # fmt: skip


def make_arms(folder: Path, groups: int | None) -> None:
    """A study of 256 arms, 9,984 runs: 32 sets of roles, eight ranks, 13 learning rates, three seeds."""
    subsets = [roles for size in range(1, len(SHAPES)) for roles in combinations(SHAPES, size)][:32]
    ROLES.update({"+".join(roles): list(roles) for roles in subsets})
    levels = {"+".join(roles): 0.17 - 0.01 * len(roles) for roles in subsets}
    rates, ranks = [1e-3 * 1.3**i for i in range(13)], [2**i for i in range(8)]
    write_study(folder, truth=Truth(placements=levels), ranks=ranks, lrs=rates, groups=groups, group_sd=0.01)


def cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=int, default=[100, 10_000], help="sizes of studies (100 10000)")
    parser.add_argument("--groups", type=int, default=40, help="groups of the 200 examples; 0: predictions name none")
    parser.add_argument("--arms", action="store_true", help="instead, one study of 256 arms")
    parser.add_argument("--no-figures", action="store_true", help="tables and report only")
    parser.add_argument("--keep", type=Path, help="write the studies and their analyses here, and leave them")
    args = parser.parse_args()
    print(f"{'runs':>8}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}")
    found = []
    for runs in [9984] if args.arms else args.runs:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (args.keep or Path(scratch)) / str(runs)
            study = folder / "study"
            if not study.exists():
                make_arms(study, args.groups or None) if args.arms else make(study, runs, args.groups or None)
            count = sum(1 for _ in study.iterdir())
            command = [sys.executable, "-m", "analysis", str(study), "--out", str(folder / "paper")]
            command += ["--no-figures"] if args.no_figures else []
            began, used = time.perf_counter(), cpu_seconds()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds, cpu = time.perf_counter() - began, cpu_seconds() - used
        # ru_maxrss is kilobytes on Linux, of the largest child so far
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        size = {"runs": count, "groups": args.groups, "figures": not args.no_figures}
        found.append(size | {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(peak)})
        print(f"{count:>8}{seconds:>10.1f}{cpu:>10.1f}{peak:>10.0f}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
