#!/usr/bin/env python3
"""Whether a change to the code changes a result: a fixed grid in two checkouts, ids, records, curves, weights compared.

    git worktree add ../before main
    python -m benchmarks.same_records ../before .

All methods on two placements in float32 on the CPU, with scores on the way, dropout, noise, averages, penalties, early
stopping, accumulation, importance and a search. Times, versions and places are not results and are left out. Bits are
compared, so both sides must run on the same machine.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.before_after import run

SMOKE = ["-m", "experiment=smoke", "trainer.precision=float32", "trainer.max_steps=6", "evaluation.every_steps=2",
         "sweep.calibrate=false"]  # fmt: skip
EVERY = "lora,rslora,lora_plus,lora_fa,dora,pissa,olora,vera,sparse,full_ft,bitfit,adalora,qlora"
COMMANDS = {
    "methods": [f"method={EVERY}", "placement=attn,full", "rank=4"],
    "relora": ["method=relora", "placement=attn,full", "rank=4", "trainer.max_steps=20"],
    "peft": ["method=peft", "method.options.tuner=LOHA,MISS", "placement=attn", "rank=4"],
    "ranks": ["placement=attn,ff,all", "rank=2,8", "seed=0,1", "evaluation.generate=true"],
    "options": ["method.dropout=0.1", "trainer.neftune_alpha=5", "trainer.ema_decay=0.9", "optim.update_penalty=0.01",
                "optim.orthogonality_penalty=0.01", "trainer.accumulation=2", "method=lora,sparse"],
    "unpacked": ["method=dora,vera", "method.dropout=0.1", "trainer.neftune_alpha=5", "trainer.ema_decay=0.9"],
    "forms": ["method=dora,vera,relora,sparse", "trainer.max_steps=20", "trainer.ema_decay=0.9", "trainer.patience=2",
              "optim.update_penalty=0.01", "trainer.accumulation=2"],
    "patience": ["trainer.patience=1", "trainer.max_steps=12", "optim.lr=0.1,1e-3"],
    "importance": ["allocation=importance,matched", "placement=full", "rank=4"],
    "search": ["placement=attn,ff", "'optim.lr=tag(log, interval(1e-4, 1e-2))'", "hydra.sweeper.n_trials=4",
               "hydra.sweeper.pruner=median"],
}  # fmt: skip
NO_RESULTS = {"environment", "started", "finished", "study", "seconds", "time"}
TIMED = ("seconds", "per_second", "peak_memory", "memory_measured")


def results(content: Any) -> Any:
    """A record or a row of a curve without what two runs of one command may differ in."""
    if isinstance(content, dict):
        return {
            key: results(value)
            for key, value in content.items()
            if key not in NO_RESULTS and not any(word in key for word in TIMED)
        }
    return [results(value) for value in content] if isinstance(content, list) else content


def found(study: Path) -> dict[str, dict[str, Any]]:
    """Of every run of a study: its record, curve and predictions, and the digest of every other file."""
    runs = {}
    for folder in sorted(path.parent for path in study.glob("*/record.json")):
        files: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.suffix == ".json" and path.name == "record.json":
                files[name] = results(json.loads(path.read_text()))
            elif path.suffix == ".jsonl":
                files[name] = [results(json.loads(line)) for line in path.read_text().splitlines()]
            elif path.is_file() and path.suffix not in (".log", ".md"):
                files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        runs[folder.name] = files
    return runs


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Every place where two results differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inside = f"{where}/{key}".lstrip("/")
            if key not in before or key not in after:
                yield f"{inside}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], inside)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif before != after and not (before != before and after != after):
        yield f"{where}: {before} / {after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--keep", type=Path, help="folder for what BEFORE gives, which the next call reads from there")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            sides = []
            for side, checkout in zip(("before", "after"), (args.before, args.after), strict=True):
                root = args.keep if args.keep and side == "before" else Path(scratch, side)
                if not (root / name).exists():
                    command = ["train.py", *SMOKE, *(word.strip("'") for word in COMMANDS[name])]
                    run(checkout.resolve(), root, [*command, f"output_root={root.resolve()}", f"study={name}"])
                sides.append(found(root / name))
            apart = list(differences(*sides))
            files = sum(map(len, sides[1].values()))
            told = f"{len(apart)} differences" if apart else "the same"
            print(f"{name}: {len(sides[1])} runs, {files} files: {told}", flush=True)
            for line in apart[:20]:
                print(f"  {line[:200]}")
            wrong += bool(apart)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
