#!/usr/bin/env python3
"""The first operation whose result differs between two processes that run the same command.

    python -m benchmarks.trace_bits --model smollm2 --steps 6          # a GPU, a minute or two
    python -m benchmarks.trace_bits --model tiny --steps 2 --operations 2000

Hashes the bits of everything that torch computes, uncaptured and uncompiled, and compares the hashes of one process
with those of the next. Kernels that torch does not dispatch (AdamW's and the loss's, in Triton) show in what reads
their results. Uninitialised memory is no result and is left out.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.repeatability import GRID, LONG, MODELS, patch

UNINITIALISED = ("aten.empty", "aten.new_empty", "aten.resize", "aten.empty_like", "aten.set_", "aten.record_stream")


def child(overrides: list[str], patches: list[str], out: Path, count: int) -> None:
    """The command in this process; writes the names and the hashes of its first operations on the device."""
    patch(patches)
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from sweeper.training.pack import Pack

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hashes, names = torch.zeros(count, dtype=torch.int64, device=device), []

    def hashed(tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.detach().reshape(-1)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        values = values.view(bits).long()
        return (values * (torch.arange(len(values), device=device) % 8191 + 1)).sum()

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            name = str(func)
            if any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns):
                return result  # a view may be of memory that is not written yet
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if name.startswith("sweeper.adapted_linear."):
                leaves = leaves[:-1]  # of the hidden values, the columns beyond a rank are not written
            for leaf in leaves:
                if (
                    leaf.device.type == device
                    and leaf.numel()
                    and not name.startswith(UNINITIALISED)
                    and not leaf.is_complex()
                    and len(names) < count
                ):
                    hashes[len(names)] = hashed(leaf)
                    frame = sys._getframe(1)
                    names.append(f"{name} {tuple(leaf.shape)} {str(leaf.dtype)[6:]} {_caller(frame)}")
            return result

    step = Pack.step

    def traced(pack: Pack) -> None:
        with Trace():
            step(pack)

    Pack.step = traced
    sys.argv = ["train.py", *overrides]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        out.write_text(json.dumps([names, hashes[: len(names)].tolist()]))


def _caller(frame) -> str:
    """The nearest line of this project or of a model."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/sweeper/" in path or "/transformers/models/" in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def run(overrides: list[str], patches: list[str], folder: Path, count: int) -> tuple[list[str], list[int]]:
    """Names and hashes of the operations of the command in a fresh process."""
    folder.mkdir(parents=True)
    told = json.dumps([[*overrides, f"output_root={folder}", "study=s"], patches, str(folder / "trace.json"), count])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trace_bits", "--child", told],
        env=os.environ | {"SWEEPER_CACHE": str(folder / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    names, hashes = json.loads((folder / "trace.json").read_text())
    return names, hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--patches", nargs="*", default=[], help="how torch computes, as in repeatability's variants")
    parser.add_argument("--overrides", nargs="*", default=[], help="more of the command")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        overrides, patches, out, count = json.loads(args.child)
        child(overrides, patches, Path(out), count)
        return
    command = [*GRID, *MODELS[args.model], LONG, f"trainer.max_steps={args.steps}", "sweep.compile=off"]
    command += ["sweep.calibrate=false", *args.overrides]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        places = [Path(folder) / str(i) for i in range(args.repeats)]
        traces = list(pool.map(lambda place: run(command, args.patches, place, args.operations), places))
    (first, hashes), *others = traces
    print(f"{len(first)} operations of {args.model}'s shape, {args.repeats} processes")
    for turn, (names, found) in enumerate(others, 2):
        shared = min(len(names), len(first))
        at = next((i for i in range(shared) if names[i] != first[i] or hashes[i] != found[i]), None)
        if at is None:
            print(f"process {turn}: {'the same bits' if len(names) == len(first) else f'{len(names)} operations'}")
            continue
        differ = [one != two for one, two in zip(hashes, found, strict=False)]
        print(f"process {turn} differs from operation {at} on, {sum(differ)} in all")
        for i in range(max(0, at - 6), min(shared, at + 8)):
            other = "" if names[i] == first[i] else f" / {names[i]}"
            print(f"  {'!' if differ[i] else ' '} {i} {first[i]}{other}")


if __name__ == "__main__":
    main()
