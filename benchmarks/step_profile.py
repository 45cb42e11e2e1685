#!/usr/bin/env python3
"""Which kernels a step of a pack runs, how many and for how long; needs a CUDA GPU.

    python -m benchmarks.step_profile                        # nine runs of SmolLM2's shape, 4 x 256
    python -m benchmarks.step_profile --rows icd10_chapter --runs 36 --stock

Random weights and tokens. `--rows` takes the lengths of a task's rows (`benchmarks.token_lengths`), batch 8; `--stock`
runs the model's own layers, compiled where rows are of one length. Prints a JSON line with the step's time, without and
with the profiler, and its kernels by kind.
"""

import argparse
import json
import re
import time
from collections import defaultdict

import torch

from benchmarks.packed_vs_peft import GRID
from benchmarks.shapes import base_model, jobs_of
from benchmarks.turns import wait_for_turn
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig

KINDS = {
    "product": r"gemm|nvjet|cutlass|splitK|cublas",
    "attention": r"flash|fmha|attention|^_forward$|^_backward$|cudnn",
    "low rank": r"shrink|expand|outer",
    "low rank and more": r"^turn|close_gate|open_gate|add_on|head_gradients",
    "norm": r"^norm|rms|RMS",
    "loss": r"loss|softmax|nll",
    "optimiser": r"adamw|squares|add_up",
}


def kind(kernel: str) -> str:
    return next((name for name, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", help="a task whose rows' lengths are taken")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64, help="that are timed; as many go before")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=14, help="kernels that are named, by time")
    args = parser.parse_args()
    batch = args.batch or (8 if args.rows else 4)
    base = base_model(args.model, "cuda", torch.bfloat16)
    runs = (GRID * args.runs)[: args.runs]
    config = PackConfig(
        batch_size=batch, compiled=True, fused=not args.stock, fp8=args.fp8, lengths_vary=args.rows is not None
    )  # fmt: skip
    made = [jobs_of(base, runs, steps=10**6, batch=batch, length=args.length, rows=args.rows) for _ in range(3)]
    with Pack(base, [job.adapter.ranks for job in made[0]], config) as pack:
        first = timed(pack, made[0], args.steps)
        wait_for_turn(args.turn)
        second = timed(pack, made[1], args.steps)
        for job in made[2]:
            pack.add(job)
        for _ in range(2):
            pack.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            pack.step()
            torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated()
    counts, spent = defaultdict(int), defaultdict(float)
    named, times = defaultdict(int), defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[kind(event.name)] += 1
            spent[kind(event.name)] += event.device_time / 1e3
            named[event.name[:60]] += 1
            times[event.name[:60]] += event.device_time / 1e3
    for name in sorted(times, key=times.__getitem__, reverse=True)[: args.most]:
        print(f"  {times[name]:8.3f} ms {named[name]:5d} x {name}")
    print(json.dumps({
        "model": args.model, "rows": args.rows or f"{batch}x{args.length}", "runs": args.runs,
        "fused": not args.stock, "fp8": args.fp8,
        "first_seconds": round(first, 2), "step_ms": round(second / args.steps * 1e3, 3),
        "run_steps_per_second": round(args.runs * args.steps / second, 1), "kernels": sum(counts.values()),
        "profiled_ms": round(sum(spent.values()), 3), "gib": round(memory / 2**30, 1),
        "by_kind": {name: [counts[name], round(spent[name], 2)] for name in sorted(spent, key=spent.__getitem__)},
    }))  # fmt: skip


def timed(pack: Pack, jobs: list, steps: int) -> float:
    """Seconds of so many steps of these runs, from their first; afterwards the pack is empty."""
    slots = [pack.add(job) for job in jobs]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        pack.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    losses = [result.loss for result in pack.drain()]
    assert all(loss == loss for loss in losses)
    for slot in slots:
        pack.remove(slot)
    return seconds


if __name__ == "__main__":
    main()
