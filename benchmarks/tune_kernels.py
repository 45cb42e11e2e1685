#!/usr/bin/env python3
"""Times the low-rank kernels over tile sizes, for the layer shapes of two models; needs a CUDA GPU.

    python -m benchmarks.tune_kernels [--lanes 9 32] [--rank 16]

Prints, for each kernel and number of lanes, the time of one layer (all its groups) for the best tile choices. The
defaults in `sweeper/lora/kernels.py` come from here.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing

import torch

GROUPS = {
    "smollm2-135m": [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))],
    "llama3.2-1b": [(2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)), (8192, (2048,))],
}
CHOICES = [
    (rows, cols, warps, stages)
    for (rows, cols, warps), stages in itertools.product(
        [(32, 64, 4), (32, 128, 4), (32, 256, 4), (64, 64, 4), (64, 128, 4), (64, 256, 8), (128, 64, 4), (128, 128, 4),
         (128, 128, 8), (128, 256, 8)],
        [2, 3, 4],
    )
]  # fmt: skip
KERNELS = ("shared", "shrink A", "shrink B", "expand A", "expand B", "outer")


def problem(fan_in: int, widths: tuple[int, ...], lanes: int, share: int, rank: int):
    """Tensors of one group with every slot adapted."""
    members, rows = len(widths), lanes * share
    table = torch.zeros(lanes, members, 4, dtype=torch.int32)
    offset = 0
    for slot in range(lanes):
        for member, width in enumerate(widths):
            table[slot, member] = torch.tensor([rank, offset, offset + rank * fan_in, member * max(16, rank)])
            offset += rank * (fan_in + width)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    return {
        "x": torch.randn(rows, fan_in, **bf16),
        "ys": [torch.randn(rows, width, **bf16) for width in widths],
        "h": torch.randn(rows, members * max(16, rank), **bf16),
        "work": torch.randn(offset, **bf16),
        "gradient": torch.empty(offset, device="cuda"),
        "table": table.cuda(),
        "scale": torch.ones(lanes, members, device="cuda"),
        "lanes": torch.arange(lanes, dtype=torch.int32, device="cuda"),
        "chance": (torch.zeros(lanes, device="cuda"), torch.zeros(lanes, dtype=torch.int64, device="cuda"),
                   torch.zeros(members, dtype=torch.int64, device="cuda")),
        "widths": list(widths), "share": share,
    }  # fmt: skip


def launch(name: str, choice: tuple[int, ...], p: dict) -> None:
    from sweeper.lora import kernels as k

    k.SHRINK = k.SHARED = k.EXPAND = k.OUTER = k.Tiles(*choice)
    own = k.Adapters(
        p["work"], p["table"], p["scale"], p["lanes"], *p["chance"], p["h"].shape[1], p["share"], p["share"]
    )  # fmt: skip
    {
        "shared": lambda: k.shrink(p["x"], own),
        "shrink A": lambda: k._shrink_into(p["h"], [p["x"]], own, b_side=False, drop=False),
        "shrink B": lambda: k.shrink_back(p["ys"], own),
        "expand A": lambda: k.expand_back(p["h"], p["x"], own),
        "expand B": lambda: k.expand(p["h"], p["ys"], own),
        "outer": lambda: k.outer(p["h"], p["h"], p["x"], p["ys"], p["gradient"], own),
    }[name]()


def compile_one(task: tuple) -> None:
    name, choice, group, rank = task
    try:
        launch(name, choice, problem(*group, lanes=2, share=256, rank=rank))
        torch.cuda.synchronize()
    except Exception:  # a choice that needs more shared memory than there is drops out when it is timed
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, nargs="+", default=[9, 32])
    parser.add_argument("--share", type=int, default=1024, help="token rows of one run")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--span", type=int, help="tiles of rows for which the expand kernel keeps its matrix")
    parser.add_argument("--shapes", nargs="+", default=list(GROUPS), choices=GROUPS)
    args = parser.parse_args()
    from triton.testing import do_bench

    from sweeper.lora import kernels

    if args.span:
        kernels.SPAN = args.span
    groups = [group for shape in args.shapes for group in GROUPS[shape]]
    tasks = [(n, c, g, args.rank) for n in args.kernels for c in CHOICES for g in groups[:4]]
    with concurrent.futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, tasks, chunksize=8))
    for shape, lanes in itertools.product(args.shapes, args.lanes):
        problems = [problem(*group, lanes=lanes, share=args.share, rank=args.rank) for group in GROUPS[shape]]
        for name in args.kernels:
            seconds = {}
            for choice in CHOICES:
                try:
                    seconds[choice] = [
                        1e3 * do_bench(lambda p=p, n=name, c=choice: launch(n, c, p), warmup=3, rep=12)
                        for p in problems
                    ]
                except Exception:
                    continue
            best = sorted(seconds.items(), key=lambda item: sum(item[1]))[:4]
            listed = "  ".join(f"{c} {sum(t):.0f} us {[round(v) for v in t]}" for c, t in best)
            print(f"{shape} {lanes} lanes {name}: {listed}", flush=True)


if __name__ == "__main__":
    main()
