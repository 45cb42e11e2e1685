#!/usr/bin/env python3
"""Injects faults into real sweeps, repeats their command, and compares what is left with a sweep left alone.

    python -m tests.faults.harness --times 12 --out docs/robustness.json     # every fault twelve times
    python -m tests.faults.harness --fault "disk full" --times 3

A sweep is a search of two arms on a tiny random model, on the CPU: trials, confirmation on a fresh seed, evaluations on
the way, checkpoints ten times a second. Each start is a fork of a warm process, so that what is struck is the sweep and
not the import of its libraries. A fault counts if it struck while a run was unfinished. Afterwards the same command is
repeated until it ends well, and then nothing may be lost, counted twice or different: every run of the sweep left alone
is there once, completed, with its scores to 1e-5.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.strikes import FAULTS, Fault, by_name, outcome

COMMAND = (
    "-m", "experiment=smoke", "placement=attn,ff", "rank=4", "seed=0,1", "optim.lr=tag(log,interval(1e-4,1e-2))",
    "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler=random", "trainer.max_steps=16", "evaluation.every_steps=8",
    "hydra.sweeper.confirm_seeds=[2]", "sweep.checkpoint_seconds=0.1", "sweep.calibrate=false", "sweep.max_pack=3",
)  # fmt: skip
WARM = (
    "torch", "torch._dynamo", "optuna", "hydra", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "peft", "sweeper.api", "sweeper.study.launch", "sweeper.training.trainer",
    "sweeper.tasks.icd10_chapter", "analysis.load",
)  # fmt: skip
"""What a sweep imports; each start finds it in memory."""
STARTS = 8
"""Times that a command is repeated until it counts as not ending."""
STRUCK = "struck"


@dataclass(kw_only=True)
class Told:
    """What became of all injections of one fault."""

    fault: str
    times: int = 0
    kills: int = 0
    at_stake: int = 0
    lost: int = 0
    duplicated: int = 0
    different: int = 0
    unended: int = 0
    message: str = ""
    details: list[str] = field(default_factory=list)


class Harness:
    """Sweeps in a folder of their own, each with a copy of one warm cache."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance, self.number = root, random.Random(seed), 0
        self.cache = root / "cache"
        code = self._wait(self._start("calm", self.cache))
        if code:
            raise SystemExit(self.log("calm")[-3000:])
        began = time.monotonic()
        self._wait(self._start("again", self.cache))
        self.seconds = time.monotonic() - began  # of a sweep left alone, caches warm
        self.expected = outcome(root / "calm")

    def log(self, study: str) -> str:
        return (self.root / f"{study}.log").read_text()

    def inject(self, fault: Fault, told: Told) -> None:
        """One injection that counts, and what it left."""
        for _ in range(20):
            self.number += 1
            study, cache = f"struck{self.number}", self.root / f"cache{self.number}"
            shutil.copytree(self.cache, cache)
            struck = self._strike(fault, study, cache)
            if struck is not None:
                break
        else:
            raise SystemExit(f"{fault.name}: did not strike in 20 sweeps")
        told.times, told.at_stake, told.kills = told.times + 1, told.at_stake + struck, told.kills + fault.kills
        told.message = told.message or _last_line(self.log(study))
        starts = 0
        while (code := self._wait(self._start(study, cache))) and starts < STARTS:
            starts += 1
        self._compare(study, told, code)
        shutil.rmtree(cache)
        shutil.rmtree(self.root / study)

    def _strike(self, fault: Fault, study: str, cache: Path) -> int | None:
        """How many runs were unfinished when the fault struck; None where it did not, or none was."""
        process = self._start(study, cache, fault)
        if fault.signals:
            process.join(self.chance.uniform(0, min(1.0, self.seconds) if fault.early else 0.9 * self.seconds))
            if not process.is_alive():
                return None
            left = len(self.expected) - len(outcome(self.root / study))
            for number in fault.signals:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)
                time.sleep(0.1)
        self._wait(process)
        if not fault.signals:
            marker = self.root / f"{study}.{STRUCK}"
            if not marker.exists():
                return None
            left = len(self.expected) - int(marker.read_text())
        if left > 0 and fault.damage is not None:
            place, _, pattern = fault.what.partition(":")
            folder = self.root / study if place == "study" else cache
            files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size)
            if not files:
                return None
            fault.damage(self.chance.choice(files), self.chance)
        return left if left > 0 else None

    def _compare(self, study: str, told: Told, code: int) -> None:
        found = outcome(self.root / study)
        lost, more = self.expected.keys() - found.keys(), found.keys() - self.expected.keys()
        other = [name for name in self.expected.keys() & found.keys() if not same(self.expected[name], found[name])]
        told.lost += len(lost)
        told.duplicated += len(more)
        told.different += len(other)
        told.unended += bool(code)
        if lost or more or other or code:
            pairs = [(self.expected[name], found[name]) for name in other]
            told.details.append(
                f"{study}: exit {code}, lost {sorted(lost)}, more {sorted(more)}, different {pairs}; "
                f"{self.log(study)[-1500:]}"
            )

    def _start(self, study: str, cache: Path, fault: Fault | None = None) -> multiprocessing.Process:
        call = self.chance.randrange(1, fault.calls + 1) if fault else 0
        process = multiprocessing.get_context("fork").Process(
            target=_sweep, args=(self.root, study, cache, fault and fault.name, call)
        )
        process.start()
        return process

    def _wait(self, process: multiprocessing.Process) -> int:
        process.join(60 + 20 * getattr(self, "seconds", 60))
        if process.is_alive():
            process.kill()
            process.join()
            return 124
        return process.exitcode or 0


def same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Equal but for the rounding of another pack's shape."""
    if (one[0], one[1], one[3]) != (two[0], two[1], two[3]) or one[2].keys() != two[2].keys():
        return False
    return all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(one[2].values(), two[2].values(), strict=True))


def _sweep(root: Path, study: str, cache: Path, fault: str | None, call: int) -> None:
    """The child: plants the fault and runs the command as a user's shell would."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"SWEEPER_CACHE": str(cache)}
    random.seed(f"{study} {call}")
    with open(root / f"{study}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if fault is not None and (plant := by_name(fault).plant) is not None:
            plant(_once(call, root / study, root / f"{study}.{STRUCK}"))
        sys.argv = ["train.py", *COMMAND, f"output_root={root}", f"study={study}"]
        code = 1
        try:
            runpy.run_path("train.py", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except KeyboardInterrupt:
            code = 130
        finally:
            log.flush()
            os._exit(code)


def _once(call: int, study: Path, marker: Path) -> Any:
    """Says whether to strike: at the `call`-th question, once, and notes how many runs had ended."""
    asked: Counter[str] = Counter()

    def strike() -> bool:
        asked["times"] += 1
        if asked["times"] != call:
            return False
        marker.write_text(str(len(outcome(study))))
        return True

    return strike


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("error", "warning", "stopp")) or "failed" in line]
    return (said or lines or [""])[-1][:160]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The injections as Markdown."""
    head = "| fault | times | runs at stake | lost | duplicated | different | not ended | what it says |"
    rows = [
        f"| {one['fault']} | {one['times']} | {one['at_stake']} | {one['lost']} | {one['duplicated']} | "
        f"{one['different']} | {one['unended']} | {one['message'].replace('|', chr(92) + '|')} |"
        for one in found
    ]
    keys = ("times", "at_stake", "lost", "duplicated", "different", "unended")
    total = " | ".join(f"{sum(one[key] for one in found)}" for key in keys)
    return "\n".join([head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |", *rows, f"| all | {total} | |"])


def run(faults: Sequence[Fault], times: int, seed: int, out: Path | None = None) -> list[dict[str, Any]]:
    """Injects each fault so many times; `out` holds what is known so far at any time."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}  # before torch is loaded
    for name in WARM:
        importlib.import_module(name)
    told = {fault.name: Told(fault=fault.name) for fault in faults}
    with tempfile.TemporaryDirectory() as root:
        harness = Harness(Path(root), seed)
        for round_ in range(times):
            for fault in faults:
                harness.inject(fault, told[fault.name])
                if out is not None:
                    out.write_text(json.dumps([asdict(one) for one in told.values() if one.times], indent=1) + "\n")
            print(f"round {round_ + 1} of {times}: {harness.number} sweeps struck at", flush=True)
    return [asdict(one) for one in told.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="only this one")
    parser.add_argument("--times", type=int, default=12, help="of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also as JSON, after each injection")
    args = parser.parse_args()
    found = run([by_name(name) for name in args.fault] if args.fault else FAULTS, args.times, args.seed, args.out)
    print(table(found))
    for one in found:
        for detail in one["details"]:
            print(f"\n{one['fault']}: {detail}")
    if any(one[key] for one in found for key in ("lost", "duplicated", "different", "unended")):
        sys.exit(1)


if __name__ == "__main__":
    main()
