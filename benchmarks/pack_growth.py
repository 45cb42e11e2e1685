#!/usr/bin/env python3
"""Run-steps per second and memory against pack size, batch and length; needs a CUDA GPU.

    python -m benchmarks.pack_growth --json growth.json      # measures; stops after --minutes, goes on when run again
    python -m benchmarks.pack_growth --plot growth.json DIR  # table (Markdown) and figure from a measurement

The arms are attn, ff and full at ranks 4, 8 and 16, repeated, in an order whose every beginning is a fair mix. The
figures are of one process in which shapes follow one another, as in a session: the first shape is compiled for itself,
the later ones share a compilation. FLOP/s are by 4 N a token, N all parameters of the base.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

ARMS = [
    ("full", 8),
    ("attn", 8),
    ("ff", 8),
    ("attn", 16),
    ("ff", 4),
    ("full", 16),
    ("full", 4),
    ("attn", 4),
    ("ff", 16),
]
SIZES = {(4, 256): (9, 1, 2, 4, 16, 32, 64, 96, 128)}
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


def measure(base, runs: int, batch: int, length: int, least_seconds: float) -> dict:
    import torch

    from benchmarks.shapes import job
    from sweeper.training.pack import Pack
    from sweeper.training.pack_config import PackConfig

    arms = (ARMS * runs)[:runs]
    jobs = [
        job(base, placement, rank, steps=10**6, batch=batch, length=length, seed=seed)
        for seed, (placement, rank) in enumerate(arms)
    ]
    size = sum(p.numel() for p in base.model.parameters())
    others = torch.cuda.memory_allocated() - 2 * size  # another base model may be there, too
    torch.cuda.reset_peak_memory_stats()
    with Pack(base, [j.adapter.ranks for j in jobs], PackConfig(batch_size=batch, compiled=True)) as pack:
        for j in jobs:
            pack.add(j)
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            pack.step()
        torch.cuda.synchronize()
        steps = min(50, max(4, round(least_seconds / (time.perf_counter() - began))))
        began = time.perf_counter()
        for _ in range(steps):
            pack.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / steps
    return {
        "runs": runs, "batch": batch, "length": length, "step_seconds": seconds, "run_steps_per_second": runs / seconds,
        "tokens_per_second": runs * batch * length / seconds,
        "tflops": 4 * size * runs * batch * length / seconds / 1e12,
        "memory_gib": (torch.cuda.max_memory_allocated() - others) / 2**30,
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.shapes import base_model

    deadline = time.monotonic() + 60 * args.minutes
    found = json.loads(args.json.read_text()) if args.json.exists() else {"torch": torch.__version__}
    here = {"peak_tflops": bf16_peak(), "device": torch.cuda.get_device_name()}
    bases = {model: base_model(model, "cuda") for model in args.models}
    for (batch, length), (model, base) in itertools.product(SHAPES, bases.items()):
        rows = found.setdefault(model, [])
        for runs in SIZES.get((batch, length), FEW):
            known = any((row["batch"], row["length"], row["runs"]) == (batch, length, runs) for row in rows)
            if known or runs * batch * length > args.most_tokens or time.monotonic() > deadline:
                continue
            try:
                rows.append(measure(base, runs, batch, length, args.seconds) | here)
            except torch.OutOfMemoryError:
                rows.append({"runs": runs, "batch": batch, "length": length, "out_of_memory": True})
            torch.cuda.empty_cache()
            print(model, json.dumps(rows[-1]), flush=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def _place(row: dict) -> tuple[int, int, int]:
    return row["batch"], row["length"], row["runs"]


def table(found: dict) -> str:
    lines = []
    for model in (name for name in found if isinstance(found[name], list)):
        lines += [f"### {model}", "", "| batch x length | runs | run-steps/s | tokens/s | GiB | of bf16 peak |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for row in sorted(found[model], key=_place):
            shape = f"| {row['batch']} x {row['length']} | {row['runs']} |"
            if row.get("out_of_memory"):
                lines.append(f"{shape} out of memory | | | |")
            else:
                share = row["tflops"] / row["peak_tflops"]
                lines.append(
                    f"{shape} {row['run_steps_per_second']:.0f} | {row['tokens_per_second']:,.0f} "
                    f"| {row['memory_gib']:.1f} | {share:.0%} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(found: dict, folder: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    models = [name for name in found if isinstance(found[name], list)]
    measures = [("run_steps_per_second", "run-steps per second", (25, 50, 100, 200, 400, 800)),
                ("memory_gib", "memory (GiB)", (1, 4, 16, 64, 128))]  # fmt: skip
    figure, axes = plt.subplots(
        2,
        len(models),
        figsize=(4.2 * len(models), 5.2),
        constrained_layout=True,
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, model in enumerate(models):
        rows = sorted((row for row in found[model] if "tflops" in row), key=_place)
        shapes = dict.fromkeys((row["batch"], row["length"]) for row in rows)
        for (batch, length), marker in zip(shapes, itertools.cycle("osD^vP"), strict=False):
            points = [row for row in rows if (row["batch"], row["length"]) == (batch, length)]
            for axis, (measure, _, _) in zip(axes[:, column], measures, strict=True):
                axis.plot([row["runs"] for row in points], [row[measure] for row in points],
                          marker=marker, markersize=4, label=f"{batch} x {length}")  # fmt: skip
        for axis, (_, title, ticks) in zip(axes[:, column], measures, strict=True):
            axis.set(xscale="log", yscale="log")
            for which, values in ((axis.xaxis, (1, 4, 16, 64)), (axis.yaxis, ticks)):
                which.set_ticks(values, [str(value) for value in values])
                which.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
            if not column:
                axis.set_ylabel(title)
        axes[0, column].set_title(model)
        axes[1, column].set_xlabel("runs in the pack")
    axes[0, 0].legend(title="batch x length", fontsize=7, title_fontsize=7)
    figure.savefig(folder / "pack_growth.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("growth.json"))
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "llama3.2-1b"])
    parser.add_argument("--seconds", type=float, default=0.7, help="time at least this long, four steps at least")
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
