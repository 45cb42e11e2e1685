#!/usr/bin/env python3
"""A pruned learning-rate search over nine arms: its makespan against PEFT's, its choices, and how busy the GPU was.

    python -m benchmarks.search --out search.json [train.py overrides, such as model.location=...]

Three measurements on one machine: the search with pruning and without (the same trials, all run to the end), each as a
user starts it, and the yardstick (`benchmarks/peft_today.py`) at the batch shape of the dataset, extrapolated to the
same trials run to the end one after another, training alone. Busy is the mean utilisation that the driver reports,
sampled five times a second between the first step and the last. Each arm's best trial of either search then trains
again on fresh seeds, off the clock, which says how far apart their choices are against what seeds do. Needs a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

COMMAND = ["-m", "search=lr", "placement=attn,ff,full", "rank=4,8,16", "evaluation.generate=false"]
KINDS = {"pruned": "asha", "unpruned": "none"}


class Utilisation(threading.Thread):
    """Samples of (time, percent) of the first GPU until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        command = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "-i",
            "0",
            "-lms",
            "200",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.samples.append((time.time(), float(line)))

    def stop(self) -> list[tuple[float, float]]:
        self.process.kill()
        self.join()
        return self.samples


def command_of(kind: str, args: argparse.Namespace) -> list[str]:
    return [
        sys.executable, "train.py", *COMMAND, f"hydra.sweeper.n_trials={args.trials}", f"study=search-{kind}",
        f"hydra.sweeper.pruner={KINDS[kind]}", f"trainer.max_steps={args.steps}",
        f"evaluation.every_steps={args.every}", f"output_root={args.root}", *args.overrides,
    ]  # fmt: skip


def search(kind: str, args: argparse.Namespace) -> dict:
    """One search, started as a user does; what its records say."""
    command = command_of(kind, args)
    sampler = Utilisation()
    sampler.start()
    began = time.time()
    subprocess.run(command, check=True)
    seconds = time.time() - began
    samples = sampler.stop()
    folder = Path(args.root, f"search-{kind}")
    records = [json.loads(path.read_text()) for path in folder.glob("*/record.json")]
    times = [
        row["time"] for path in folder.glob("*/metrics.jsonl") for row in map(json.loads, path.open()) if "time" in row
    ]
    busy = [percent for at, percent in samples if min(times) <= at <= max(times)]
    return {
        "command": " ".join(command[1:]), "seconds": seconds, "trials": len(records),
        "run_steps": sum(record["steps"] for record in records),
        "pruned": sum(record["status"] == "pruned" for record in records),
        "training_seconds": max(times) - min(times), "busy": statistics.mean(busy) / 100, "chosen": chosen(records),
        "length": statistics.mean(
            record["efficiency"]["train_tokens"] / max(record["steps"], 1) for record in records
        ) / records[0]["spec"]["trainer"]["batch_size"],
        "batch": records[0]["spec"]["trainer"]["batch_size"],
    }  # fmt: skip


def chosen(records: list[dict]) -> dict[str, dict]:
    """Per arm the trial with the best validation NLL: its learning rate and test NLL."""
    best: dict[str, dict] = {}
    for record in records:
        if record["status"] != "completed":
            continue
        spec, scores = record["spec"], record["scores"]
        arm = f"{spec['placement']['name']} r{spec['rank']}"
        found = {
            "lr": spec["optim"]["lr"], "validation": scores["validation"]["after"]["nll"],
            "test": scores["test"]["after"]["nll"],
        }  # fmt: skip
        if arm not in best or found["validation"] < best[arm]["validation"]:
            best[arm] = found
    return dict(sorted(best.items()))


def confirm(kind: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Arm -> test NLL of its chosen learning rate on each fresh seed."""
    seeds = ",".join(map(str, args.seeds))
    subprocess.run([*command_of(kind, args), f"hydra.sweeper.confirm_seeds=[{seeds}]"], check=True)
    found: dict[str, list[float]] = {}
    for path in Path(args.root, f"search-{kind}").glob("*/record.json"):
        record = json.loads(path.read_text())
        if record["search"].get("purpose") == "confirm" and record["status"] == "completed":
            spec = record["spec"]
            arm = f"{spec['placement']['name']} r{spec['rank']}"
            found.setdefault(arm, []).append(record["scores"]["test"]["after"]["nll"])
    return dict(sorted(found.items()))


def yardstick(batch: int, length: int, steps: int) -> dict:
    command = [
        sys.executable, "-m", "benchmarks.peft_today", "--mode", "trainer", "--steps", str(steps),
        "--batch", str(batch), "--length", str(length),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("search.json"))
    parser.add_argument("--root", default="outputs")
    parser.add_argument("--trials", type=int, default=8, help="of each of the nine arms")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps between two looks of the pruner")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[1, 2], help="fresh ones, for the chosen learning rates"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--yardstick-steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    found: dict = {}
    for kind in args.kinds:
        found[kind] = search(kind, args)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    first = found[args.kinds[0]]
    length = -(-round(first["length"]) // 8) * 8
    found["yardstick"] = yardstick(first["batch"], length, args.yardstick_steps)
    run_steps = args.trials * 9 * args.steps
    extrapolated = run_steps / found["yardstick"]["run_steps_per_second"]
    found["extrapolated_seconds"] = extrapolated
    for kind in args.kinds:
        found[kind]["makespan_ratio"] = extrapolated / found[kind]["seconds"]
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    report(found, f"{first['batch']} x {length}")
    for kind in args.kinds if args.seeds else ():
        found[kind]["confirmed"] = confirm(kind, args)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        for arm, values in found[kind]["confirmed"].items():
            print(f"{kind}: {arm:10} test on fresh seeds " + "  ".join(f"{value:.4f}" for value in values))
    if all("confirmed" in found.get(kind, {}) for kind in KINDS):
        compare(found["pruned"]["confirmed"], found["unpruned"]["confirmed"])


def report(found: dict, shape: str) -> None:
    rate = found["yardstick"]["run_steps_per_second"]
    print(
        f"Trainer + PEFT, the trials run to the end one after another: {found['extrapolated_seconds']:,.0f} s "
        f"({rate:.2f} run-steps/s at {shape})"
    )
    for kind in (name for name in KINDS if name in found):
        one = found[kind]
        print(
            f"{kind}: {one['seconds']:.1f} s ({one['makespan_ratio']:.0f}x), {one['trials']} trials, {one['pruned']} "
            f"pruned, {one['run_steps']:,} run-steps, GPU busy {one['busy']:.0%} of {one['training_seconds']:.1f} s"
        )
        for arm, best in one["chosen"].items():
            print(f"  {arm:10} lr {best['lr']:.2e}  validation {best['validation']:.4f}  test {best['test']:.4f}")


def compare(pruned: dict[str, list[float]], unpruned: dict[str, list[float]]) -> None:
    """Test NLL of what the two searches chose, over fresh seeds, beside the spread of seeds within an arm."""
    means = [{arm: statistics.mean(values) for arm, values in found.items()} for found in (pruned, unpruned)]
    gaps = [means[0][arm] - means[1][arm] for arm in means[0]]
    spread = statistics.mean(statistics.stdev(values) for found in (pruned, unpruned) for values in found.values())
    print(
        f"test NLL of the choices on fresh seeds: pruned {statistics.mean(means[0].values()):.4f}, unpruned "
        f"{statistics.mean(means[1].values()):.4f}; arm by arm {statistics.mean(gaps):+.4f} "
        f"({min(gaps):+.4f} to {max(gaps):+.4f}); standard deviation over seeds {spread:.4f}"
    )


if __name__ == "__main__":
    main()
