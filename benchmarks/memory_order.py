#!/usr/bin/env python3
"""Whether a run's solo memory depends on which runs were measured before it in the same process.

    python -m benchmarks.memory_order                      # tiny_llama; on a GPU, half a minute
    python -m benchmarks.memory_order --model smollm2_135m

Measures every arm in two orders, each in a fresh process, as a sweep does; `cold` is how it was measured once: the
first pass of each arm, in blocks of the allocator. Fails where the orders differ in any byte.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ARMS = [("attn", 4), ("attn", 8), ("attn", 16), ("ff", 4), ("full", 4), ("full", 16)]
BATCH, LENGTH = 4, 64


def measured(args: argparse.Namespace) -> dict[str, int]:
    """Solo peak memory of each arm in the order that was asked for, in this process."""
    import torch
    import yaml

    from benchmarks.shapes import job
    from sweeper import models
    from sweeper.spec import ModelSpec, from_mapping
    from sweeper.training import calibrate

    def cold_peak(step, memory) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.cold and device.type == "cuda":
        calibrate.warm_peak = cold_peak
    spec = from_mapping(ModelSpec, yaml.safe_load(Path(f"conf/model/{args.model}.yaml").read_text()))
    base = models.load(spec, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    found = {}
    options = {"batch_size": BATCH, "compiled": False, "captured": True}
    with tempfile.TemporaryDirectory() as cache:
        for placement, rank in ARMS[::-1] if args.backwards else ARMS:
            one = job(base, placement, rank, steps=4, batch=BATCH, length=LENGTH)
            found[f"{placement} r{rank}"] = calibrate.measure(base, one, options, Path(cache)).peak_memory_bytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_llama", help="an option of the group model")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--backwards", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args)))
        return
    modes = {f"{how}, {order}": [f"--{word}" for word in (how, order) if word in ("cold", "backwards")]
             for how in ("cold", "warm") for order in ("forwards", "backwards")}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.memory_order", "--model", args.model, "--child"]
    started = {
        name: subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) for name, flags in modes.items()
    }
    found = {name: json.loads(process.communicate()[0].splitlines()[-1]) for name, process in started.items()}
    print("| arm | " + " | ".join(f"{name}, MiB" for name in found) + " |")
    print("| --- | " + " | ".join("---:" for _ in found) + " |")
    for placement, rank in ARMS:
        arm = f"{placement} r{rank}"
        print(f"| {arm} | " + " | ".join(f"{figures[arm] / 2**20:.3f}" for figures in found.values()) + " |")
    for how in ("cold", "warm"):
        apart = max(abs(found[f"{how}, forwards"][arm] - figure) for arm, figure in found[f"{how}, backwards"].items())
        print(f"{how}: the two orders {f'differ by up to {apart / 2**20:.2f} MiB' if apart else 'agree to the byte'}")
        if how == "warm" and apart:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
