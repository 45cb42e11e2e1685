#!/usr/bin/env python3
"""Where the same command twice parts from itself: at which step, in the loss or in the gradient norm, and why.

    python -m benchmarks.repeatability                    # a GPU, under four minutes
    python -m benchmarks.repeatability --models tiny --steps 4 --variants "as it is" "no clipping"

Runs a small grid in fresh processes, twice for each variant of how it is computed, and compares every bit of losses,
norms and scores. A variant that repeats where another does not names the cause: without clipping the norm decides
nothing, plain attention has no atomic sums in its backward pass, uncaptured steps need no recordings, and so on. The
last column compares a variant's first run with that of the command as it is.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

GRID = [
    "-m", "experiment=smoke", "placement=attn,full", "rank=4,16", "optim.lr=3e-3", "trainer.batch_size=8",
    "dataset.train_examples=256", "dataset.validation_examples=32", "dataset.test_examples=64",
    "dataset.max_length=512",
]  # fmt: skip
MODELS = {
    "tiny": [],
    "smollm2": [
        "model.config.hidden_size=576", "model.config.intermediate_size=1536", "model.config.num_hidden_layers=30",
        "model.config.num_attention_heads=9", "model.config.num_key_value_heads=3", "model.config.vocab_size=8192",
        "model.config.max_position_embeddings=2048",
    ],
}  # fmt: skip
# rows of several hundred tokens for the models' tokenizer of bytes: attention then adds up over several tiles
LONG = "dataset.system=" + "Answer with care and in full. " * 12
VARIANTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "as it is": ([], ()),
    "not measured before": (["sweep.calibrate=false"], ()),
    "no clipping": (["optim.max_grad_norm=null"], ()),
    "plain attention": ([], ("math",)),
    "no cuDNN attention": ([], ("no cudnn",)),
    "plain attention, no clipping": (["optim.max_grad_norm=null"], ("math",)),
    "deterministic": (["trainer.deterministic=true"], ()),
    "one work space for products": ([], ("workspace",)),
    "every kernel waited for": ([], ("blocking",)),
    "not captured": (["sweep.compile=off"], ()),
    "one run at a time": (["sweep.max_pack=1"], ()),
    "float32": (["trainer.precision=float32"], ()),
    "compiled": (["sweep.compile=on"], ()),
}


@dataclass
class Outcome:
    """Of every run of a grid: losses and norms by step, and the NLL of every split."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)


def patch(names: list[str]) -> None:
    """Some of torch's settings, before anything is computed."""
    if "workspace" in names:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if "blocking" in names:
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    import torch

    for kernel in ("flash", "mem_efficient", "cudnn"):
        if "math" in names or f"no {kernel}" in names:
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)


def child(overrides: list[str], patches: list[str]) -> None:
    """The command in this process, with some of torch's settings."""
    patch(patches)
    sys.argv = ["train.py", *overrides]
    runpy.run_path("train.py", run_name="__main__")


def run(overrides: list[str], patches: tuple[str, ...], folder: Path, cache: Path) -> Outcome:
    """The command in a fresh process."""
    told = json.dumps([[*overrides, f"output_root={folder}", "study=s"], patches])
    command = [sys.executable, "-m", "benchmarks.repeatability", "--child", told]
    done = subprocess.run(command, env=os.environ | {"SWEEPER_CACHE": str(cache)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(overrides)}\n{(done.stdout + done.stderr)[-3000:]}")
    found = Outcome()
    for path in sorted((folder / "s").glob("*/record.json")):
        record = json.loads(path.read_text())
        spec = record["spec"]
        name = f"{spec['placement']['name']} r{spec['rank']}"
        rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        found.losses[name] = [row["loss"] for row in rows if "loss" in row]
        found.norms[name] = [row["grad_norm"] for row in rows if "loss" in row]
        found.scores[name] = [score["nll"] for at in record["scores"].values() for score in at.values()]
    return found


def first_difference(one: dict[str, list[float]], two: dict[str, list[float]]) -> str:
    """The first step (from 1) at which any run differs."""
    steps = [next((i for i, (a, b) in enumerate(zip(one[k], two[k], strict=True), 1) if a != b), None) for k in one]
    known = [step for step in steps if step is not None]
    return f"step {min(known)}, {len(known)} of {len(steps)} runs" if known else "none"


def apart(one: Outcome, two: Outcome) -> str:
    """The largest relative difference of an NLL."""
    pairs = [pair for name in one.scores for pair in zip(one.scores[name], two.scores[name], strict=True)]
    most = max(abs(a - b) / abs(a) for a, b in pairs)
    return f"{most:.1e}" if most else "same bits"


def rows(model: str, args: argparse.Namespace, folder: Path) -> Iterator[str]:
    common = [*GRID, *MODELS[model], LONG, f"trainer.max_steps={args.steps}"]
    with ThreadPoolExecutor(args.at_once) as pool:
        places = {name: folder / model / str(i) for i, name in enumerate(VARIANTS)}
        begun = {
            name: [
                pool.submit(run, [*common, *more], patches, places[name] / str(turn), places[name] / f"cache{turn}")
                for turn in range(args.repeats)
            ]
            for name, (more, patches) in VARIANTS.items()
            if name in args.variants
        }
        found = {name: [each.result() for each in turns] for name, turns in begun.items()}
    cached = places["as it is"]
    found["as it is, caches warm"] = [
        found["as it is"][0], run(common, (), cached / "again", cached / "cache0"),
    ]  # fmt: skip
    for name, turns in found.items():
        first, *_ = turns
        pairs = list(pairwise(turns))
        parted = [
            next((text for one, two in pairs if (text := compare(one, two)) not in ("none", "same bits")), end)
            for compare, end in (
                (lambda one, two: first_difference(one.losses, two.losses), "none"),
                (lambda one, two: first_difference(one.norms, two.norms), "none"),
                (apart, "same bits"),
            )
        ]
        yield f"| {name} | {' | '.join(parted)} | {apart(first, found['as it is'][0])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--at-once",
        type=int,
        default=4,
        help="processes beside one another; more share its memory, and packs are planned by what is free",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    args.variants = {"as it is", *args.variants}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            print(
                f"\n### {model}\n\n| variant | loss parts at | norm parts at | NLL apart | from the command as it is |"
            )
            print("| --- | --- | --- | --- | --- |")
            for row in rows(model, args, Path(folder)):
                print(row, flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
