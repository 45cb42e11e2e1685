#!/usr/bin/env python3
"""What pruning costs each arm, and what it saves: the same trials whole, pruned, and pruned with neighbours finished.

    python -m benchmarks.search_regret                          # three tasks, a tiny model: slow without a GPU
    python -m benchmarks.search_regret --model smollm2_135m     # on a GPU

Trials are random and seeded, so that all three searches of an arm try the same points; the whole search knows each
point's score at its end. Regret is how much worse, there, the point is that a search chose than the one that the whole
search did, in standard deviations between seeds (of the choices of the whole search, on fresh seeds, pooled over the
arms of a task). `steps` and `seconds` are of all trials, over those of the whole search.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sweeper.record import RECORD, SEARCHES

ROOT = Path(__file__).parents[1]
TASKS = ("icd10_chapter", "chain_sum", "gsm_symbolic")
ARMS = ["placement=attn,ff", "rank=4,8", "method=lora,dora"]
SIZE = ["dataset.train_examples=400", "dataset.validation_examples=100", "trainer.batch_size=8",
        "evaluation.splits=[validation]", "sweep.calibrate=false"]  # fmt: skip
LR = "optim.lr=tag(log,interval(1e-4,3e-2))"
SEARCHED = {
    "whole": ["hydra.sweeper.pruner=none"],
    "pruned": ["hydra.sweeper.pruner=asha", "hydra.sweeper.finish=0"],
    "finished": ["hydra.sweeper.pruner=asha", "hydra.sweeper.finish=4"],
}


CONFIRMED = "hydra.sweeper.confirm_seeds=[1,2,3]"


def search(task: str, kind: str, folder: Path, model: str, trials: int, steps: int, *also: str) -> float:
    """Carries out one search; its seconds."""
    words = [*ARMS, *SIZE, LR, f"dataset={task}", f"study={task}_{kind}", f"output_root={folder}", *SEARCHED[kind]]
    words += [*also, f"model={model}", f"trainer.max_steps={steps}", f"evaluation.every_steps={max(1, steps // 10)}"]
    words += [f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.sampler=random"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", "-m", *words], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{task}, {kind}: {(done.stdout + done.stderr)[-1500:]}")
    return time.perf_counter() - began


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{RECORD}"))]


def nll(record: dict[str, Any]) -> float:
    return float(record["scores"]["validation"]["after"]["nll"])


def trained(folder: Path) -> int:
    """Steps of all trials of a study."""
    return sum(int(one["steps"]) for one in records(folder) if one["search"]["purpose"] == "trial")


def compare(task: str, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Regret of each arm by kind of search, in nats, and the standard deviation between seeds."""
    whole = [one for one in records(folder / f"{task}_whole") if one["status"] == "completed"]
    tried = [one for one in whole if one["search"]["purpose"] == "trial"]
    at_end = {(one["search"]["arm"], round(one["spec"]["optim"]["lr"], 10)): nll(one) for one in tried}
    by_arm: dict[str, list[float]] = {}
    for one in whole:
        if one["search"]["purpose"] == "confirm":
            by_arm.setdefault(one["search"]["arm"], []).append(nll(one))
    sd = statistics.mean(statistics.variance(values) for values in by_arm.values()) ** 0.5
    regret: dict[str, list[float]] = {}
    for kind in ("pruned", "finished"):
        for arm, facts in json.loads((folder / f"{task}_{kind}" / SEARCHES).read_text()).items():
            best = min(value for (name, _), value in at_end.items() if name == arm)
            regret.setdefault(kind, []).append(at_end[arm, round(facts["best"]["optim.lr"], 10)] - best)
    return regret, sd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_llama")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--also", nargs="+", default=[], metavar="OVERRIDE", help="such as dataset.max_length=96")
    args = parser.parse_args()
    print("| task | search | mean regret, seed SD | worst arm | arms that lost | steps | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for task in args.tasks:
            size = (args.model, args.trials, args.steps)
            seconds = {kind: search(task, kind, folder, *size, *args.also) for kind in SEARCHED}
            search(task, "whole", folder, *size, *args.also, CONFIRMED)
            steps = {kind: trained(folder / f"{task}_{kind}") for kind in SEARCHED}
            regret, sd = compare(task, folder)
            for kind, values in regret.items():
                units = [value / sd for value in values]
                lost = sum(value > 0 for value in values)
                print(
                    f"| {task} | {kind} | {statistics.mean(units):.2f} | {max(units):.2f} | {lost} of {len(units)} | "
                    f"{steps[kind] / steps['whole']:.2f} | {seconds[kind] / seconds['whole']:.2f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
