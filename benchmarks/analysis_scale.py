"""How long the analysis takes and how much memory: python -m benchmarks.analysis_scale [runs ...] (default 100 10000)

Writes synthetic studies (two tasks, five placements, ten ranks, ten learning rates; 200 examples, 60 steps a run), runs
`python -m analysis` on each and prints seconds, of the clock and of all processors, and peak memory as a table and as
JSON. With `--arms`, one study of 256 arms in about 10,000 runs: 32 sets of roles, eight ranks, 13 learning rates.
"""

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


def make(folder: Path, runs: int) -> None:
    """A study of about `runs` runs."""
    if runs < 1000:
        write_study(folder, ranks=(1, 2, 4, 8, 16, 32, 64, 128), seeds=range(max(1, round(runs / 24))))
    else:
        ranks, datasets = [2**i for i in range(10)], ("icd10_chapter", "gsm_symbolic")
        seeds = range(max(1, round(runs / 1000)))
        write_study(folder, truth=Truth(placements=PLACEMENTS), datasets=datasets, ranks=ranks, lrs=RATES, seeds=seeds)


def make_arms(folder: Path) -> None:
    """A study of 256 arms, 9,984 runs."""
    subsets = [roles for size in range(1, len(SHAPES)) for roles in combinations(SHAPES, size)][:32]
    ROLES.update({"+".join(roles): list(roles) for roles in subsets})
    levels = {"+".join(roles): 0.17 - 0.01 * len(roles) for roles in subsets}
    rates, ranks = [1e-3 * 1.3**i for i in range(13)], [2**i for i in range(8)]
    write_study(folder, truth=Truth(placements=levels), ranks=ranks, lrs=rates)


def main() -> None:
    print(f"{'runs':>8}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}")
    found = []
    arms = "--arms" in sys.argv
    for runs in [10_000] if arms else [int(text) for text in sys.argv[1:]] or [100, 10_000]:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "study"
            make_arms(study) if arms else make(study, runs)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            count = sum(1 for _ in study.iterdir())
            began = time.perf_counter()
            command = [sys.executable, "-m", "analysis", str(study), "--out", str(Path(folder) / "paper")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        peak = used.ru_maxrss / 1024  # kilobytes on Linux, of the largest child so far
        found.append({"runs": count, "seconds": round(seconds, 2), "cpu": round(cpu, 2), "peak_mb": round(peak)})
        print(f"{count:>8}{seconds:>10.1f}{cpu:>10.1f}{peak:>10.0f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
