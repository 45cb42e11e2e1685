#!/usr/bin/env python3
"""The placement x rank grid with PEFT and as packs, on this machine, and the ratios.

    python -m benchmarks.packed_vs_peft                      # what the GPU figures in docs/performance.md come from
    python -m benchmarks.packed_vs_peft --device cpu --modes loop --steps 4 --batch 8 --length 24 --precision bfloat16

PEFT as people run it (`trainer`, a bare `loop`, nine `processes`), and as an expert would: a `graph`, nine `graphs`.
Each side runs in a process of its own, one after another. Training only: fixed-length random tokens, no evaluation.
The packs are timed after warm-up (compiling and capturing, reported apart); the yardstick's own warm-up is small.
"""

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

STRONG = {"graph": (), "graphs": ("--concurrent", "9")}  # of benchmarks.strong_peft: one after another, nine at once
GRID = [(placement, rank) for placement in ("attn", "ff", "full") for rank in (4, 8, 16)]


def yardstick(mode: str, args: argparse.Namespace) -> dict:
    shape = ["--model", args.model, "--batch", str(args.batch), "--length", str(args.length), "--device", args.device]
    if mode in STRONG:
        command = [sys.executable, "-m", "benchmarks.strong_peft", *shape, *STRONG[mode]]
    else:
        script = Path(__file__).with_name("peft_today.py")
        command = [sys.executable, str(script), *shape, "--mode", mode, "--steps", str(args.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def packed(runs: list[tuple[str, int]], args: argparse.Namespace) -> dict:
    """Run-steps per second of one pack that holds `runs`, after warm-up."""
    import torch

    from benchmarks.shapes import base_model, job
    from sweeper.training.pack import Pack
    from sweeper.training.pack_config import PackConfig

    base = base_model(args.model, args.device, getattr(torch, args.precision) if args.precision else None)
    jobs = [
        job(base, placement, rank, steps=10**6, batch=args.batch, length=args.length, seed=seed)
        for seed, (placement, rank) in enumerate(runs)
    ]

    def wait() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    with Pack(
        base, [j.adapter.ranks for j in jobs], PackConfig(batch_size=args.batch, compiled=args.device == "cuda")
    ) as pack:
        for j in jobs:
            pack.add(j)
        began = time.perf_counter()
        for _ in range(3 if args.device == "cuda" else 1):
            pack.step()
        wait()
        warm = time.perf_counter() - began
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = args.packed_steps
        began = time.perf_counter()
        for _ in range(steps):
            pack.step()
        wait()
        seconds = time.perf_counter() - began
        losses = [result.loss for result in pack.drain()]
    assert all(loss == loss for loss in losses)
    memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return {
        "runs": len(runs), "steps": steps, "batch": args.batch, "length": args.length,
        "warm_up_seconds": round(warm, 2), "train_seconds": round(seconds, 3),
        "run_steps_per_second": round(len(runs) * steps / seconds, 2), "peak_memory_bytes": memory,
    }  # fmt: skip


def ours(runs: list[tuple[str, int]], args: argparse.Namespace) -> dict:
    """`packed` in a fresh process, so that neither side finds the other's memory or warmth."""
    command = [sys.executable, "-m", "benchmarks.packed_vs_peft", *sys.argv[1:], "--child", json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"packed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alone(args: argparse.Namespace) -> dict:
    """Every placement at rank 16 as a pack of one; the mean time of a step."""
    singles = [ours([(placement, 16)], args) for placement in ("attn", "ff", "full")]
    rate = len(singles) / sum(1 / single["run_steps_per_second"] for single in singles)
    return {**singles[-1], "run_steps_per_second": round(rate, 2)}


def device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from sweeper.device import processor

    return f"{processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=["smollm2-135m", "llama3.2-1b", "tiny"])
    parser.add_argument("--modes", nargs="+", default=["trainer", "loop", "processes", *STRONG])
    parser.add_argument("--steps", type=int, default=30, help="of the yardstick")
    parser.add_argument("--packed-steps", type=int, default=None, help="of the packs; default 100, on a CPU --steps")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--saturated", type=int, default=36, help="runs in the large pack; 0 leaves it out")
    parser.add_argument("--device", default=None)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="of the packs; default the yardstick's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.packed_steps = args.packed_steps or (args.steps if args.device == "cpu" else 100)
    if args.child:
        with contextlib.redirect_stdout(sys.stderr):
            found = packed([tuple(run) for run in json.loads(args.child)], args)
        print(json.dumps(found))
        return
    measures = {"packed, 9 runs": lambda: ours(GRID, args), "one run alone": lambda: alone(args)}
    if args.saturated and args.device == "cuda":
        many = (GRID * args.saturated)[: args.saturated]
        measures[f"packed, {args.saturated} runs"] = lambda: ours(many, args)
    measures |= {f"PEFT {mode}": functools.partial(yardstick, mode, args) for mode in args.modes}
    print(f"{device()}: {args.model}, batch {args.batch} x {args.length}, arms attn,ff,full x 4,8,16", flush=True)
    rows, rate = {}, {}
    for name, measure in measures.items():  # each is told and kept at once: a machine may be lent for a while only
        rows[name] = measure()
        rate[name] = value = rows[name]["run_steps_per_second"]
        per_second = value * args.batch * args.length
        print(f"  {name:22s} {value:9.2f} run-steps/s  {per_second:12,.0f} tokens/s", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"device": device(), "model": args.model, "rows": rows}, indent=1) + "\n")
    for mode in args.modes:
        print(f"  packed, 9 runs / PEFT {mode}: {rate['packed, 9 runs'] / rate[f'PEFT {mode}']:.1f}x")
    if "loop" in args.modes:
        print(f"  one run alone / PEFT loop: {rate['one run alone'] / rate['PEFT loop']:.1f}x")


if __name__ == "__main__":
    main()
