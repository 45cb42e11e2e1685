"""How long the analysis takes and how much memory: python benchmarks/analysis_scale.py [runs ...] (default 100 10000)

Writes synthetic studies (two tasks, five placements, ten ranks, ten learning rates; 200 examples, 60 steps a run), runs
`python -m analysis` on each and prints seconds and peak memory as a table and as JSON.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.analysis.synthetic import Truth, write_study

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


def main() -> None:
    print(f"{'runs':>8}{'seconds':>10}{'peak MB':>10}")
    found = []
    for runs in [int(text) for text in sys.argv[1:]] or [100, 10_000]:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "study"
            make(study, runs)
            count = sum(1 for _ in study.iterdir())
            began = time.perf_counter()
            command = [sys.executable, "-m", "analysis", str(study), "--out", str(Path(folder) / "paper")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - began
        # ru_maxrss is kilobytes on Linux, of the largest child so far
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        found.append({"runs": count, "seconds": round(seconds, 2), "peak_mb": round(peak)})
        print(f"{count:>8}{seconds:>10.1f}{peak:>10.0f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
