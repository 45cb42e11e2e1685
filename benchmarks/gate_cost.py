#!/usr/bin/env python3
"""What the gates of rank blocks cost: run-steps per second of packs without any, with one run gated, and with all.

    python -m benchmarks.gate_cost                          # on a GPU: SmolLM2-135M's shape, nine runs of rank 8
    python -m benchmarks.gate_cost --before FOLDER          # also packs without gates, of another version
    python -m benchmarks.gate_cost --device cpu --model tiny --steps 5 --batch 4 --length 32

Every pack has the same ranks in the same modules. `plain` has no gates; `mixed` has one run with blocks; `hierarchical`
has a tree of blocks in every run: a root, two groups and four tasks, half of a row's ranks open to it. Each is timed in
a process of its own, in turns, after warm-up; ratios are of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

KINDS = ("plain", "mixed", "hierarchical")
RUNS = [(placement, seed) for placement in ("attn", "ff", "full") for seed in range(3)]
TASKS = 4


def run_steps(kind: str, args: argparse.Namespace) -> float:
    """Run-steps per second of a pack, after warm-up."""
    import torch

    from benchmarks.shapes import base_model, job
    from sweeper.training.pack import Pack
    from sweeper.training.pack_config import PackConfig

    cuda = args.device == "cuda"
    base = base_model(args.model, args.device)
    jobs = [
        job(base, placement, args.rank, steps=10**6, batch=args.batch, length=args.length, seed=seed)
        for placement, seed in RUNS
    ]
    gated = {"plain": 0, "mixed": 1, "hierarchical": len(jobs)}[kind]
    jobs = [with_tree(one) if number < gated else one for number, one in enumerate(jobs)]
    capacities = [one.adapter.capacity for one in jobs]
    with Pack(base, capacities, PackConfig(batch_size=args.batch, compiled=cuda)) as pack:
        for one in jobs:
            pack.add(one)
        for _ in range(5 if cuda else 1):
            pack.step()
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(args.steps):
            pack.step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        assert all(result.loss == result.loss for result in pack.drain())
    return len(jobs) * args.steps / seconds


def with_tree(state):  # type: ignore[no-untyped-def]
    """The run with its ranks as a tree of blocks: half for the root, a quarter for two groups, a quarter for tasks."""
    from dataclasses import replace

    import numpy as np

    from sweeper.lora.blocks import Block
    from sweeper.training.mixing import Mixture

    rank = next(iter(state.adapter.ranks.values()))
    assert rank % 16 == 0, "--rank: a multiple of 16"
    tree = [(0, range(TASKS), rank // 2), (1, (0, 1), rank // 8), (1, (2, 3), rank // 8)]
    tree += [(2, (task,), rank // 16) for task in range(TASKS)]
    blocks = tuple(
        Block(
            name=str(number), level=level, acts=frozenset(tasks), trains=frozenset(tasks),
            ranks=dict.fromkeys(state.adapter.ranks, own),
        )
        for number, (level, tasks, own) in enumerate(tree)
    )  # fmt: skip
    count, per_step = len(state.examples), state.spec.trainer.batch_size
    share = [per_step // TASKS + (task < per_step % TASKS) for task in range(TASKS)]
    mixture = Mixture(
        names=tuple(map(str, range(TASKS))), task_of=np.arange(count) % TASKS, counts=np.array([share] * 64)
    )
    return replace(state, adapter=replace(state.adapter, blocks=blocks, tasks=TASKS), mixture=mixture)


def measured(kind: str, args: argparse.Namespace, root: Path | None = None) -> float:
    """`run_steps` in a fresh process; of the project in `root`, where that is another."""
    command = [sys.executable, "-m", "benchmarks.gate_cost", "--one", kind]
    for name in ("device", "model", "rank", "batch", "length", "steps"):
        command += [f"--{name}", str(getattr(args, name))]
    path = [str(root)] if root else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="a folder with another version of this project")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_steps(args.one, args)))
        return
    sides = {**({"before": ("plain", args.before.resolve())} if args.before else {}), **{k: (k, None) for k in KINDS}}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            found[name].append(measured(sides[name][0], args, sides[name][1]))
            print(f"{name:14} {found[name][-1]:9.1f} run-steps/s", flush=True)
    base = statistics.median(found["plain"])
    for name, values in found.items():
        middle = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:14} {middle:9.1f} run-steps/s ({spread}), {middle / base:.3f} of plain")


if __name__ == "__main__":
    main()
