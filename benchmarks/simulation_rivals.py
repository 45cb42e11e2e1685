#!/usr/bin/env python3
"""Other tests and intervals on the studies of `benchmarks.simulation`: what was tried instead of the analysis' own.

python -m benchmarks.simulation_rivals tests          # family-wise error and power: wild bootstrap, max-T, former
python -m benchmarks.simulation_rivals mixed          # the same beside linear mixed models (statsmodels; slow)
python -m benchmarks.simulation_rivals intervals      # coverage and width: bootstrap-t, BCa, wild bootstrap
python -m benchmarks.simulation_rivals guards         # rules for an arm whose seeds spread wider
python -m benchmarks.simulation_rivals command        # `python -m analysis` itself on written records
"""

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from analysis import stats
from benchmarks import simulation
from benchmarks.rival_rules import GUARDS, arm_half_widths, ruled
from benchmarks.rivals import MIXED, MOST_WILD, RIVALS, Drawn
from benchmarks.simulation import Cell, arrangement, cells, draw, others, ours, weights

Task = tuple[str, Cell, float, int, int, tuple[str, ...]]
"""Table, cell, the difference that power is of, studies, number of the part, which seeds it, and tests (empty: all)."""


def test_part(task: Task) -> dict[str, float]:
    """Sums of false positives and of true ones found over `count` studies."""
    table, cell, shift, count, number, only = task
    rng = np.random.default_rng(5000 + number)
    out: dict[str, float] = {}
    for _ in range(count):
        x_ARE, w_E = draw(cell, rng), weights(cell, rng)
        moved = x_ARE.copy()
        moved[0] -= shift
        for name, test in (RIVALS if table == "tests" else MIXED).items():
            if (name.startswith("wild") and cell.arms > MOST_WILD) or (only and name not in only):
                continue
            null = test(Drawn.of(cell, x_ARE, w_E, rng))
            out[f"false {name}"] = out.get(f"false {name}", 0) + (min(null.values()) < 0.05)
            hits = [p < 0.05 for (a, _), p in test(Drawn.of(cell, moved, w_E, rng)).items() if a == 0]
            out[f"power {name}"] = out.get(f"power {name}", 0) + sum(hits) / len(hits)
    return out


def interval_part(task: Task) -> dict[str, float]:
    """Sums over `count` studies of arms whose interval holds 0, by arm, and of half widths."""
    _, cell, _, count, number, _ = task
    rng = np.random.default_rng(7000 + number)
    out: dict[str, float] = {}
    for _ in range(count):
        x_ARE, w_E = draw(cell, rng), weights(cell, rng)
        found = arrangement(cell, x_ARE, w_E)
        for arm in range(cell.arms):
            mean = float((x_ARE[arm] @ w_E / w_E.sum()).mean())
            for name, (low, high) in arm_half_widths(found, arm, rng).items():
                key = f"arm {arm} {name}"
                out[key] = out.get(key, 0) + (mean - low <= 0 <= mean + high)
                out[f"width {name}"] = out.get(f"width {name}", 0) + min(low + high, 1e3) / 2 / cell.arms
    return out


def guard_part(task: Task) -> dict[str, float]:
    """As `test_part`, of our tests with each rule; coverage and width of intervals too."""
    _, cell, shift, count, number, _ = task
    rng = np.random.default_rng(9000 + number)
    out: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        out[name] = out.get(name, 0.0) + value

    for _ in range(count):
        x_ARE, w_E = draw(cell, rng), weights(cell, rng)
        moved = x_ARE.copy()
        moved[0] -= shift
        pooled_t = others(moved, w_E, cell.each)["pooled t"]
        add("power pooled t", np.mean([p < 0.05 for (a, _), p in pooled_t.items() if a == 0]))
        for name, rule in GUARDS.items():
            null, shifted = (ruled(arrangement(cell, x, w_E), rule) for x in (x_ARE, moved))
            add(f"false {name}", min(ours(null).values()) < 0.05)
            add(f"power {name}", np.mean([p < 0.05 for (a, _), p in ours(shifted).items() if a == 0]))
            for i, arm in enumerate(null.arms):
                one = arm.scores["score"]
                found = stats.interval(one.x_RE, one.w_E, groups=one.groups, seed_variance=one.seed_variance)
                add(f"arm {i} {name}", found.low <= 0 <= found.high)
    return out


def command_part(task: Task) -> dict[str, float]:
    """Studies as record folders through `python -m analysis`: any pair of equal arms called different, and coverage."""
    from analysis.__main__ import main as command
    from tests.analysis.synthetic import Truth, write_study

    _, cell, _, count, number, _ = task
    truth = Truth(
        placements=dict.fromkeys(("attn", "ff", "full", "attn_qv"), 0.6), seed_sd=cell.seed_sd[0],
        example_sd=cell.shared_sd, arm_example_sd=cell.example_sd, cell_sd=cell.cell_sd,
    )  # fmt: skip
    out = {"false": 0.0, "coverage": 0.0}
    for i in range(count):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_study(
                folder / "study", truth=truth, ranks=(8,), seeds=range(cell.seeds), examples=cell.groups * cell.each,
                steps=2, modules=False, seed=1000 * number + i, groups=cell.groups if cell.each > 1 else None,
                group_sd=cell.group_sd,
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                status = command([str(folder / "study"), "--out", str(folder / "out"), "--no-figures"])
            if status:
                raise RuntimeError(f"the analysis ended with {status}")
            tests = pd.read_csv(folder / "out/tables/tests.csv")
            tests = tests[(tests["family"] == "placement") & (tests["metric"] == "nll")]
            arms = pd.read_csv(folder / "out/tables/arms.csv")
            arms = arms[arms["arm"] != "base model"]
            if len(tests) != 6 or len(arms) != 4:
                raise RuntimeError(f"{len(tests)} tests of {len(arms)} arms where there are 6 of 4")
            out["false"] += bool((tests["p_holm"] < 0.05).any())
            out["coverage"] += float(((arms["nll_low"] <= 0.6) & (arms["nll_high"] >= 0.6)).mean())
    return out


def summed(parts: Iterator[dict[str, float]], count: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / count for name, value in sums.items()}


def small(name: str, groups: int = 20) -> Cell:
    """A cell with few groups of one example: dense mixed models of hundreds of groups take minutes."""
    return replace(cells()[name], name=f"{name}, {groups} groups", groups=groups, each=1)


def cells_of(table: str) -> list[Cell]:
    known = cells()
    if table == "mixed":
        names = ("20 groups of 10, 3 seeds", "10 groups of 20, 3 seeds", "13 groups of 16, 5 seeds")
        return [*(known[name] for name in names), small("normal"), small("seeds alone")]
    if table == "command":
        return [replace(known["normal"], each=1), known["20 groups of 10, 5 seeds"]]
    names = {
        "tests": ("seeds alone", "10 groups of 20, 3 seeds", "10 groups of 20, 5 seeds",
                  "13 groups of 16, 5 seeds", "20 groups of 10, 3 seeds", "skewed seeds, 3 seeds",
"one arm's seeds eight times as wide", "twelve arms"),
        "intervals": ("skewed seeds, 3 seeds", "skewed seeds, 5 seeds", "skewed seeds, 10 seeds",
                      "10 groups of 20, 3 seeds", "10 groups of 20, 5 seeds", "13 groups of 16, 5 seeds"),
        "guards": ("seeds alone", "seeds alone, 5 seeds", "one arm's seeds twice as wide",
                   "one arm's seeds eight times as wide", "seeds 1, 2, 4, 8, 5 seeds"),
    }[table]  # fmt: skip
    return [known[name] for name in names]


PARTS: Mapping[str, Callable[[Task], dict[str, float]]] = {
    "tests": test_part, "mixed": test_part, "intervals": interval_part, "guards": guard_part, "command": command_part,
}  # fmt: skip
REPLICATES = {"tests": 500, "mixed": 100, "intervals": 500, "guards": 500, "command": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(PARTS))
    parser.add_argument("--replicates", type=int, help=f"by default {REPLICATES}")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cells", nargs="+", help="of the table's own, by name")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEST", help="of `tests` and `mixed`: these columns")
    args = parser.parse_args()
    only = tuple(args.only)
    replicates = args.replicates or REPLICATES[args.table]
    chosen = [cell for cell in cells_of(args.table) if args.cells is None or cell.name in args.cells]
    if not chosen:
        parser.error(f"--cells: choose from {', '.join(cell.name for cell in cells_of(args.table))}")
    names = list(MIXED if args.table == "mixed" else GUARDS if args.table == "guards" else RIVALS)
    if args.table in ("tests", "mixed"):
        heads = ["cell", *(f"FWER {name}" for name in names), *(f"power {name}" for name in names)]
    else:
        heads = {
            "intervals": ["cell", "interval", "coverage", "worst", "width over ours"],
            "guards": ["cell", "rule", "FWER", "coverage of the first arm", "power over pooled t's"],
            "command": ["cell", "studies", "FWER", "coverage"],
        }[args.table]
    print("| " + " | ".join(heads) + " |\n| " + " | ".join(["---", *["---:"] * (len(heads) - 1)]) + " |", flush=True)
    with Pool(args.workers) as pool:
        for cell in chosen:
            pooled_df = (cell.arms - 1) * (cell.seeds - 1)
            critical = -special.stdtrit(pooled_df, 0.025 / (cell.arms * (cell.arms - 1) / 2))
            _, _, sd = simulation.truth_of(cell, np.random.default_rng(99))
            parts = max(1, replicates // 50)
            tasks = [(args.table, cell, float(critical * sd), replicates // parts, i, only) for i in range(parts)]
            found = summed(pool.imap_unordered(PARTS[args.table], tasks), replicates // parts * parts)
            for row in rows_of(args.table, cell, names, found, replicates // parts * parts):
                print(f"| {cell.name} | {' | '.join(row)} |", flush=True)


def rows_of(table: str, cell: Cell, names: Sequence[str], found: dict[str, float], count: int) -> Iterator[list[str]]:
    if table in ("tests", "mixed"):
        digits = {"false": 3, "power": 2}
        keys = [(kind, f"{kind} {name}") for kind in digits for name in names]
        yield [f"{found[key]:.{digits[kind]}f}" if key in found else "" for kind, key in keys]
    elif table == "command":
        yield [str(count), f"{found['false']:.3f}", f"{found['coverage']:.3f}"]
    elif table == "guards":
        for name in names:
            power = found[f"power {name}"] / found["power pooled t"]
            yield [name, f"{found[f'false {name}']:.3f}", f"{found[f'arm 0 {name}']:.3f}", f"{power:.2f}"]
    else:
        for name in [key.removeprefix("width ") for key in found if key.startswith("width ")]:
            covered = [found[f"arm {i} {name}"] for i in range(cell.arms)]
            width = found[f"width {name}"] / found["width ours"]
            wide = "over 100" if width > 100 else f"{width:.2f}"
            yield [name, f"{np.mean(covered):.3f}", f"{min(covered):.3f}", wide]


if __name__ == "__main__":
    main()
