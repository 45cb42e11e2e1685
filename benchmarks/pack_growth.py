#!/usr/bin/env python3
"""Run-steps per second and memory against pack size, batch and length; needs a CUDA GPU.

    python -m benchmarks.pack_growth --json growth.json      # measures; stops cleanly after --minutes
    python -m benchmarks.pack_growth --plot growth.json DIR  # table (Markdown) and figure from a measurement

The arms are attn, ff and full at ranks 4, 8 and 16, repeated. The figures are of one process in which shapes follow
one another, as in a session: the first shape is compiled for itself, the later ones share a compilation.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

SIZES = {(4, 256): (1, 2, 4, 8, 16, 32, 64)}
FEW = (1, 4, 16, 64)
SHAPES = [(4, 256), (4, 128), (4, 512), (16, 128), (16, 256), (16, 512)]


def bf16_peak(size: int = 8192) -> float:
    """TFLOP/s of a large bfloat16 matrix product on random data: the card's measured matrix peak."""
    import torch

    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        left @ right
    stop.record()
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (start.elapsed_time(stop) / 1e3) / 1e12


def measure(base, runs: int, batch: int, length: int, steps: int) -> dict:
    import torch

    from benchmarks.packed_vs_peft import GRID
    from benchmarks.shapes import job
    from sweeper import budget
    from sweeper.engine.pack import Pack

    arms = (GRID * runs)[:runs]
    jobs = [
        job(base, placement, rank, steps=10**6, batch=batch, length=length, seed=seed)
        for seed, (placement, rank) in enumerate(arms)
    ]
    by_name = {target.name: target for target in base.targets}
    flops = sum(
        budget.train_flops(
            base.targets, {by_name[n]: r for n, r in j.adapter.ranks.items()}, length=length, tokens=batch * length
        )
        for j in jobs
    )
    torch.cuda.reset_peak_memory_stats()
    with Pack(base, [j.adapter.ranks for j in jobs], batch_size=batch, compiled=True) as pack:
        for j in jobs:
            pack.add(j)
        for _ in range(3):
            pack.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            pack.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / steps
    return {
        "runs": runs, "batch": batch, "length": length, "step_seconds": seconds, "run_steps_per_second": runs / seconds,
        "tokens_per_second": runs * batch * length / seconds, "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tflops": flops / seconds / 1e12,
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.shapes import base_model

    deadline = time.monotonic() + 60 * args.minutes
    found: dict = {"device": torch.cuda.get_device_name(), "peak_tflops": bf16_peak(), "torch": torch.__version__}
    for model in args.models:
        base = base_model(model, "cuda")
        rows = found.setdefault(model, [])
        for batch, length in SHAPES:
            for runs in SIZES.get((batch, length), FEW):
                if runs * batch * length > args.most_tokens or time.monotonic() > deadline:
                    continue
                try:
                    rows.append(measure(base, runs, batch, length, args.steps))
                except torch.OutOfMemoryError:
                    rows.append({"runs": runs, "batch": batch, "length": length, "out_of_memory": True})
                torch.cuda.empty_cache()
                print(model, json.dumps(rows[-1]), flush=True)
                args.json.write_text(json.dumps(found, indent=1) + "\n")
        del base
        torch.cuda.empty_cache()


def table(found: dict) -> str:
    lines = []
    for model in (name for name in found if isinstance(found[name], list)):
        lines += [f"### {model}", "", "| batch x length | runs | run-steps/s | tokens/s | GiB | of bf16 peak |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for row in found[model]:
            shape = f"| {row['batch']} x {row['length']} | {row['runs']} |"
            if row.get("out_of_memory"):
                lines.append(f"{shape} out of memory | | | |")
            else:
                share = row["tflops"] / found["peak_tflops"]
                lines.append(
                    f"{shape} {row['run_steps_per_second']:.0f} | {row['tokens_per_second']:,.0f} "
                    f"| {row['memory_gib']:.1f} | {share:.0%} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(found: dict, folder: Path) -> None:
    import matplotlib.pyplot as plt

    models = [name for name in found if isinstance(found[name], list)]
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.2), constrained_layout=True, squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        rows = [row for row in found[model] if "tflops" in row]
        shapes = dict.fromkeys((row["batch"], row["length"]) for row in rows)
        for (batch, length), marker in zip(shapes, itertools.cycle("osD^vP"), strict=False):
            points = [row for row in rows if (row["batch"], row["length"]) == (batch, length)]
            axis.plot([row["runs"] for row in points], [row["run_steps_per_second"] for row in points],
                      marker=marker, markersize=4, label=f"{batch} x {length}")  # fmt: skip
        axis.set(xscale="log", yscale="log", title=model, xlabel="runs in the pack", ylabel="run-steps per second")
        axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axis.grid(alpha=0.3)
        axis.legend(title="batch x length", fontsize=7, title_fontsize=7)
    figure.savefig(folder / "pack_growth.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("growth.json"))
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "llama3.2-1b"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--most-tokens", type=int, default=131072, help="largest batch, in tokens")
    parser.add_argument("--plot", nargs=2, metavar=("JSON", "DIR"))
    args = parser.parse_args()
    if args.plot:
        found, folder = json.loads(Path(args.plot[0]).read_text()), Path(args.plot[1])
        plot(found, folder)
        print(table(found))
    else:
        run(args)


if __name__ == "__main__":
    main()
