#!/usr/bin/env python3
"""Does confirmation on fresh seeds take away the winner's curse? Simulated searches, through the analysis itself.

    python -m benchmarks.winners_curse                        # 1,000 studies of two arms: a minute and a half

In every arm so many learning rates are equally good, and each is trained on the same few seeds. What a run scores on
validation and on test is its rate's true score, the luck of its seed, and a little of the split's own. `analysis.load`
reads the records and `analysis.arrange` chooses each arm's rate on validation; then that rate's runs on fresh seeds are
written beside them, and both are read again. Bias is that of the reported test score, in standard errors of a mean over
the seeds that are reported; coverage is that of the interval in the table of arms.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import load
from analysis.analyse import summarise
from analysis.arms import Arrangement, arrange
from analysis.stats import Draws
from sweeper.record import RECORD, SCHEMA_VERSION

RATES = tuple(float(f"{rate:.3g}") for rate in np.logspace(-4, -2, 8))
SEARCHED, FRESH = (0, 1, 2), (11, 12, 13, 14, 15)
LEVEL = {"attn": 0.5, "ff": 0.4}  # true NLL of every rate of an arm
SEED_SD, SPLIT_SD = 0.01, 0.003


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of the reported arms: mean bias in standard errors with its own standard error; coverage of 95% intervals."""

    bias: float
    bias_se: float
    coverage: float
    arms: int
    confirmed: bool


def write_runs(
    folder: Path, rng: np.random.Generator, *, study: int, placement: str, rates: Iterable[float], seeds: Iterable[int],
    purpose: str,
) -> None:  # fmt: skip
    """Records of one arm's runs, as the engine leaves them."""
    for rate in rates:
        for seed in seeds:
            luck = LEVEL[placement] + rng.normal(0, SEED_SD)
            scores = {split: {"after": {"nll": luck + rng.normal(0, SPLIT_SD)}} for split in ("validation", "test")}
            run_id = f"{study}-{placement}-{rate:g}-{seed}"
            spec = {
                "model": {"name": "m"}, "dataset": {"name": f"study {study}"}, "method": {"name": "lora"},
                "placement": {"name": placement}, "allocation": {"name": "uniform"}, "rank": 8, "seed": seed,
                "optim": {"lr": rate},
            }  # fmt: skip
            record: dict[str, Any] = {
                "run_id": run_id, "study": "curse", "status": "completed", "spec": spec, "scores": scores,
                "trainable_parameters": 1000, "total_parameters": 100_000, "steps": 10, "schema": SCHEMA_VERSION,
                "search": {"arm": f"{study}-{placement}", "purpose": purpose, "tuned": ["optim.lr"]},
                "finished": "2026-01-01T00:00:00+00:00",
            }  # fmt: skip
            (folder / run_id).mkdir()
            (folder / run_id / RECORD).write_text(json.dumps(record))


def judge(found: Arrangement, seeds: int) -> Found:
    """How far the table of arms is off the truth."""
    table = summarise(found, draws=Draws(100))
    truth = table["placement"].map(LEVEL).to_numpy(dtype=float)
    errors = (table["nll"].to_numpy(dtype=float) - truth) / (np.hypot(SEED_SD, SPLIT_SD) / seeds**0.5)
    inside = (table["nll_low"] <= truth) & (truth <= table["nll_high"])
    return Found(
        bias=float(errors.mean()), bias_se=float(errors.std(ddof=1) / len(errors) ** 0.5),
        coverage=float(inside.mean()), arms=len(table), confirmed=all(arm.confirmed for arm in found.arms),
    )  # fmt: skip


def measure(studies: int, folder: Path, *, seed: int = 0) -> Mapping[str, Found]:
    """Reported scores of the searches' own seeds ("search") and of fresh ones ("confirmed")."""
    rng = np.random.default_rng(seed)
    for study in range(studies):
        for placement in LEVEL:
            write_runs(
                folder, rng, study=study, placement=placement, rates=RATES, seeds=SEARCHED, purpose="trial"
            )  # fmt: skip
    searched = arrange(load(folder))
    found = {"search": judge(searched, len(SEARCHED))}
    for arm in searched.arms:
        write_runs(
            folder, rng, study=int(arm.runs["dataset"].iloc[0].removeprefix("study ")),
            placement=arm.factors["placement"], rates=[arm.trial["optim.lr"]], seeds=FRESH, purpose="confirm",
        )  # fmt: skip
    confirmed = arrange(load(folder))
    for former, arm in zip(searched.arms, confirmed.arms, strict=True):
        if arm.trial != former.trial:
            raise AssertionError(f"{arm.setting}, {arm.label}: the confirmed rate is not the chosen one")
    return found | {"confirmed": judge(confirmed, len(FRESH))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    args = parser.parse_args()
    print("| reported | arms | bias, SE | coverage |")
    print("| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for name, one in measure(args.studies, Path(folder)).items():
            print(f"| {name} | {one.arms} | {one.bias:+.2f} ± {1.96 * one.bias_se:.2f} | {one.coverage:.3f} |")


if __name__ == "__main__":
    main()
