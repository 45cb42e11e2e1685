#!/usr/bin/env python3
"""The same sweep on one worker and on several, over Ray: how its speed grows with the number of GPUs.

    python -m benchmarks.workers --workers 1 2 --out workers.json [train.py overrides]

Each sweep is started as a user does, `train.py -m hydra/launcher=ray hydra.launcher.workers=N`, in a study of its own:
random weights of a known shape, random text of a fixed length, `attn,ff,full` x ranks 4, 8, 16 x seeds, training alone,
layers compiled on CUDA however few the steps are.
Before each a sweep of the same pack takes a few steps, so that what is measured finds libraries, kernels, compiled
layers and tokens in the caches. Three rates, each against the first N:

  command   1 / seconds of the whole command: imports, Ray's start, loading, compiling, training, writing
  window    run-steps/s between the first step of any run and the last one: of this the launches of the workers, which
            do not begin at the same moment, and what a late one compiles are a part
  steady    run-steps/s while every run trains: the sum of the runs' own paces between the moment when the last of them
            had settled (step 5) and the moment when the first of them ended

A step is noted when its result is fetched, on CUDA twice a second, and a first step only once it is compiled. There is
no steady rate where runs take turns: keep --runs within what one worker packs. Without a GPU workers share the cores,
which shows that the command works and no more.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peft_today import SHAPES

ARMS = ["placement=attn,ff,full", "rank=4,8,16"]
CELLS = 9
EXAMPLES = {"train": 1024, "validation": 8, "test": 8}
PROMPT = 16  # characters, each a token; the loss falls on what follows
SETTLED = 5  # steps of a run until nothing is compiled or captured any more
FETCH = 0.1  # seconds: steps noted within them were fetched together


def write_dataset(path: Path, length: int) -> None:
    """Random letters; prompt, a space, response and the end of text are `length` tokens of a byte-level tokenizer."""
    rng = np.random.default_rng(0)

    def text(size: int) -> str:
        return "".join(map(chr, rng.integers(ord("a"), ord("z") + 1, size)))

    rows = [
        {"prompt": text(PROMPT), "response": text(length - PROMPT - 2), "split": split}
        for split, count in EXAMPLES.items()
        for _ in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_of(workers: int, study: str, steps: int, args: argparse.Namespace) -> list[str]:
    seeds = ",".join(map(str, range(args.runs // CELLS)))
    config = {**SHAPES[args.shape], "max_position_embeddings": max(512, args.length)}
    return [
        sys.executable, "train.py", "-m", "hydra/launcher=ray", f"hydra.launcher.workers={workers}", *ARMS,
        f"seed={seeds}", "model=tiny_llama", f"model.name={args.shape}",
        *(f"model.config.{key}={value}" for key, value in config.items()),
        "dataset=jsonl", f"dataset.path={data_of(args)}", "dataset.template=plain", "dataset.metrics=[]",
        f"dataset.max_length={args.length}", "evaluation=none", "optim.lr=1e-4", f"trainer.max_steps={steps}",
        f"trainer.batch_size={args.batch}", "sweep.calibrate=false", "sweep.compile=on", f"output_root={args.root}",
        f"study={study}", *args.overrides,
    ]  # fmt: skip


def data_of(args: argparse.Namespace) -> Path:
    return Path(args.root, f"random-{args.length}.jsonl")


def sweep(workers: int, args: argparse.Namespace) -> dict:
    """One sweep, started as a user does; what its records say."""
    study = f"workers-{workers}"
    if args.warm_up:
        subprocess.run(command_of(workers, f"warm-up-{workers}", args.warm_up_steps, args), check=True)
    command = command_of(workers, study, args.steps, args)
    began = time.time()
    subprocess.run(command, check=True)
    seconds = time.time() - began
    folder = Path(args.root, study)
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]
    steps = [
        [row["time"] for row in map(json.loads, path.open()) if "loss" in row]
        for path in sorted(folder.glob("*/metrics.jsonl"))
    ]
    return {"command": shlex.join(command[1:]), "workers": workers, "seconds": seconds, **measure(records, steps)}


def measure(records: list[dict], steps: list[list[float]]) -> dict:
    """What a sweep did and how fast, from its records and from the moments at which each run's steps were noted."""
    first, last = min(times[0] for times in steps), max(times[-1] for times in steps)
    workers_seconds = sum(record["efficiency"]["compile_seconds"] for record in records)
    return {
        "runs": len(records), "run_steps": sum(record["steps"] for record in records),
        "packs": sorted({record["efficiency"]["pack_runs"] for record in records}),
        "device": records[0]["environment"]["device"], "compiled": records[0]["environment"].get("compiled", False),
        "compile_worker_seconds": workers_seconds, "window_seconds": last - first,
        "window_rate": sum(at > first + FETCH for times in steps for at in times) / (last - first),
        "first_steps_apart": max(times[0] for times in steps) - first,
        "last_steps_apart": last - min(times[-1] for times in steps), **steady(steps),
    }  # fmt: skip


def steady(steps: list[list[float]]) -> dict:
    """Seconds in which every run trains and has settled, and the sum of the runs' own paces in them."""
    begin = max(times[min(SETTLED, len(times)) - 1] for times in steps)
    end = min(times[-1] for times in steps)
    rate = 0.0
    for times in steps:
        inside = [at for at in times if begin <= at <= end]
        noted = sum(at > inside[0] + FETCH for at in inside) if inside else 0
        if not noted:
            return {"steady_seconds": 0.0, "steady_rate": None}
        rate += noted / (inside[-1] - inside[0])
    return {"steady_seconds": end - begin, "steady_rate": rate}


def ratios(found: dict[str, dict]) -> None:
    """Adds to every sweep what it is against the first."""
    base = next(iter(found.values()))
    for one in found.values():
        one["command_ratio"] = base["seconds"] / one["seconds"]
        for name in ("window", "steady"):
            both = base[f"{name}_rate"], one[f"{name}_rate"]
            one[f"{name}_ratio"] = both[1] / both[0] if all(both) else None


def report(found: dict[str, dict]) -> None:
    def pace(one: dict, name: str) -> str:
        rate = one[f"{name}_rate"]
        return "-" if rate is None else f"{rate:.1f}/s in {one[f'{name}_seconds']:.1f} s"

    base = next(iter(found))
    print(f"{'workers':>7} {'command':>10} {'window':>22} {'steady':>22}   against {base}: command, window, steady")
    for workers, one in found.items():
        times = [one[f"{name}_ratio"] for name in ("command", "window", "steady")]
        against = ", ".join("-" if value is None else f"{value:.2f}" for value in times)
        paces = f"{pace(one, 'window'):>22} {pace(one, 'steady'):>22}"
        print(f"{workers:>7} {one['seconds']:>8.1f} s {paces}   {against}")
    for workers, one in found.items():
        print(
            f"{workers} worker{'s' if one['workers'] > 1 else ''} ({one['device']}): {one['runs']} runs in packs of "
            f"{', '.join(map(str, one['packs']))}, {one['run_steps']:,} run-steps; compiling and capturing "
            f"{one['compile_worker_seconds'] / one['workers']:.1f} s a worker; first steps of runs at most "
            f"{one['first_steps_apart']:.1f} s apart, last ones {one['last_steps_apart']:.1f} s"
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="how many; the first is the yardstick")
    parser.add_argument("--out", type=Path, default=Path("workers.json"))
    parser.add_argument("--root", default="outputs/workers", help="of the data and the studies; must hold none yet")
    parser.add_argument("--runs", type=int, default=54, help=f"a multiple of {CELLS}: the arms times the seeds")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="examples in a step of a run")
    parser.add_argument("--length", type=int, default=256, help="tokens of each example")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="measure with caches as they are")
    parser.add_argument("--warm-up-steps", type=int, default=4)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.runs < CELLS or args.runs % CELLS:
        parser.error(f"--runs must be a multiple of {CELLS}, got {args.runs}")
    if args.length <= PROMPT + 2 or args.steps <= SETTLED:
        parser.error(f"--length must be above {PROMPT + 2} and --steps above {SETTLED}")
    for study in [f"{name}-{workers}" for name in ("warm-up", "workers") for workers in args.workers]:
        if Path(args.root, study).exists():
            parser.error(f"--root {args.root} holds {study} already, whose runs would not train again")
    return args


def main() -> None:
    args = parsed()
    write_dataset(data_of(args), args.length)
    found: dict[str, dict] = {}
    for workers in args.workers:
        found[str(workers)] = sweep(workers, args)
        ratios(found)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    report(found)


if __name__ == "__main__":
    main()
