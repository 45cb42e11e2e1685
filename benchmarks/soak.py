#!/usr/bin/env python3
"""What a long sweep of tiny runs holds: resident memory, open handles, threads and child processes over time.

    python -m benchmarks.soak --runs 2000 --json soak.json --figure soak.png    # half an hour on two cores
    python -m benchmarks.soak --plot soak.json soak.png                         # the figure of a former one

One command trains that many runs (six placements, five ranks, seeds) of a tiny random model on the CPU. Another process
reads /proc of the command's process, so that what is measured does not measure. Fails unless every run completed.
Memory rises while a pack is scored and falls again: it is flat where the floor of each tenth of the runs is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLACEMENTS, RANKS = ("attn", "ff", "full", "attn_qv", "ff_in", "ff_out"), (1, 2, 4, 8, 16)


def command(root: Path, seeds: int, more: list[str]) -> list[str]:
    """The sweep, typed."""
    axes = [f"placement={','.join(PLACEMENTS)}", f"rank={','.join(map(str, RANKS))}", f"seed=range({seeds})"]
    return [
        sys.executable, "train.py", "-m", "experiment=smoke", *axes, f"output_root={root}", "study=soak",
        "sweep.calibrate=false", *more,
    ]  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that a process has started and that have not been waited for, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            own = [int(one) for one in (task / "children").read_text().split()]
        except OSError:  # the thread has ended
            continue
        found += own
        for one in own:
            found += children(one) if Path(f"/proc/{one}/task").exists() else []
    return found


def look(pid: int, study: Path) -> dict[str, Any]:
    """One sample of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    done = 0
    if study.exists():
        done = sum(1 for one in os.scandir(study) if os.path.exists(f"{one.path}/record.json"))
    return {
        "runs": done,
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "anonymous_mb": round(int(status["RssAnon"].split()[0]) / 1024, 1),
        "handles": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "children": len(children(pid)),
    }


def watch(typed: list[str], study: Path, every: float, log: Path) -> tuple[list[dict[str, Any]], int]:
    """Samples of a command from its start to its end, and its exit code."""
    samples: list[dict[str, Any]] = []
    began = time.monotonic()
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    with log.open("w") as out, subprocess.Popen(typed, stdout=out, stderr=subprocess.STDOUT, env=env) as process:
        while process.poll() is None:
            try:
                samples.append({"seconds": round(time.monotonic() - began, 1)} | look(process.pid, study))
            except (OSError, KeyError):  # it has ended meanwhile
                break
            try:
                process.wait(every)
            except subprocess.TimeoutExpired:
                continue
    return samples, process.returncode


def floors(samples: list[dict[str, Any]], parts: int = 10) -> list[float]:
    """The least resident memory in each part of the runs, in MB: what is held between the peaks of evaluations."""
    runs = samples[-1]["runs"]
    found = []
    for part in range(parts):
        own = [one["rss_mb"] for one in samples if part * runs <= parts * one["runs"] < (part + 1) * runs]
        found += [min(own)] if own else []
    return found


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What a soak comes to; counts are of the time in which most runs trained, its start and end left out."""
    runs = samples[-1]["runs"]
    warm = [one for one in samples if runs / 10 <= one["runs"] < runs]
    fields = ("handles", "threads", "children")
    return {
        "runs": runs,
        "seconds": samples[-1]["seconds"],
        "peak_rss_mb": max(one["rss_mb"] for one in samples),
        "floor_rss_mb_by_tenth": floors(samples)[1:],
        "least": {field: min(one[field] for one in warm) for field in fields},
        "most": {field: max(one[field] for one in warm) for field in fields},
    }


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from analysis.style import RC

    samples = found["samples"]
    runs = [one["runs"] for one in samples]
    with plt.rc_context(RC):
        figure, (memory, counts) = plt.subplots(1, 2, figsize=(6.6, 2.4), constrained_layout=True)
        memory.plot(runs, [one["rss_mb"] / 1024 for one in samples], color="#0072B2", linewidth=0.8, label="now")
        if former := found.get("former"):
            memory.plot(
                [one["runs"] for one in former["samples"]], [one["rss_mb"] / 1024 for one in former["samples"]],
                color="#D55E00", linewidth=0.8, label="before (freed memory not returned)",
            )  # fmt: skip
            memory.legend()
        memory.set(xlabel="runs with a record", ylabel="resident memory (GiB)", ylim=(0, None))
        styles = (("handles", "#0072B2", "-"), ("threads", "#D55E00", (0, (4, 1.5))),
                  ("children", "#009E73", (0, (1, 1))))  # fmt: skip
        for field, colour, line in styles:
            counts.plot(
                runs, [one[field] for one in samples], color=colour, linestyle=line, linewidth=0.8, label=field
            )  # fmt: skip
        counts.set(xlabel="runs with a record", ylabel="count", ylim=(0, 90))
        counts.legend(ncols=3, loc="upper center")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="at least so many (2000)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--json", type=Path, help="write samples and summary here")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--root", type=Path, help="keep the study in this folder")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "FIGURE"), help="draw a former one; run nothing")
    parser.add_argument("more", nargs="*", help="further overrides of the sweep")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(args.plot[0].read_text()), args.plot[1])
        return
    seeds = -(-args.runs // (len(PLACEMENTS) * len(RANKS)))
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        typed = command(root, seeds, args.more)
        samples, code = watch(typed, root / "soak", args.every, root / "soak.log")
        wanted = seeds * len(PLACEMENTS) * len(RANKS)
        statuses = [json.loads(path.read_text())["status"] for path in (root / "soak").glob("*/record.json")]
        if code or statuses != ["completed"] * wanted:
            told = (root / "soak.log").read_text()[-3000:]
            raise SystemExit(f"exit {code}, {statuses.count('completed')} of {wanted} runs completed: {told}")
        samples[-1]["runs"] = wanted
    found = {"summary": summary(samples), "cores": os.cpu_count(), "samples": samples}
    print(json.dumps(found["summary"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    if args.figure:
        plot(found, args.figure)


if __name__ == "__main__":
    main()
