#!/usr/bin/env python3
"""Packs beside the best that an expert builds of stock PEFT, every row's sides in one run on one GPU.

    python -m benchmarks.ahead                               # what docs/performance.md quotes; about seven minutes
    python -m benchmarks.ahead --rows smollm2-135m-4x256 icd10_chapter

The expert's side is `benchmarks.strong_peft`, ours `benchmarks.step_profile`; the sides of a group get ready at the
same time and are measured one after another. Rates are run-steps per second, of training alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.turns import measured

STRONG, OURS = "benchmarks.strong_peft", "benchmarks.step_profile"
BIG = ("--length", "512")
SMALL_STEPS, BIG_STEPS = ("--steps", "30"), ("--steps", "12")
TASKS = ("icd10_chapter", "gsm_symbolic", "hpo_term")


def of_task(task: str) -> dict[str, tuple[str, ...]]:
    return {
        "expert": (STRONG, "--rows", task, "--concurrent", "9"), "9 runs": (OURS, "--rows", task),
        **({"36 runs": (OURS, "--rows", task, "--runs", "36")} if task == TASKS[0] else {}),
    }  # fmt: skip


def of_model(model: str) -> dict[str, tuple[str, ...]]:
    return {
        "expert": (STRONG, "--model", model, *BIG), "expert, fp8": (STRONG, "--model", model, *BIG, "--fp8"),
        "9 runs": (OURS, "--model", model, *BIG, *BIG_STEPS),
        "9 runs, fp8": (OURS, "--model", model, *BIG, *BIG_STEPS, "--fp8"),
    }  # fmt: skip


ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "smollm2-135m-4x256": {"expert": (STRONG, "--concurrent", "9"), "9 runs": (OURS, *SMALL_STEPS)},
    **{task: of_task(task) for task in TASKS},
    "smollm2-135m-4x256-64": {
        "64 runs": (OURS, "--runs", "64", *SMALL_STEPS), "64 runs, fp8": (OURS, "--runs", "64", *SMALL_STEPS, "--fp8"),
    },
    "llama3.2-1b-4x512": of_model("llama3.2-1b"),
    "llama3.1-8b-4x512": of_model("llama3.1-8b"),
}  # fmt: skip
GROUPS = (("smollm2-135m-4x256", *TASKS), ("smollm2-135m-4x256-64",), ("llama3.2-1b-4x512",))  # that fit side by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    args = parser.parse_args()
    sides = {(row, side): command for row in args.rows for side, command in ROWS[row].items()}
    together = [[one for one in sides if one[0] in group] for group in GROUPS]
    alone = [[one] for one in sides if not any(one[0] in group for group in GROUPS)]
    found: dict[str, dict[str, Any]] = {}
    for group in [*together, *alone]:
        for (row, side), result in zip(group, measured([sides[one] for one in group]), strict=True):
            found.setdefault(row, {})[side] = result
            print(f"{row:24s} {side:14s} {json.dumps(result)}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    for row, results in found.items():
        rates = {side: result["run_steps_per_second"] for side, result in results.items() if "error" not in result}
        for side, rate in rates.items():
            if "expert" in rates and not side.startswith("expert"):
                print(f"{row}: {side} / expert {rate / rates['expert']:.2f}")


if __name__ == "__main__":
    main()
