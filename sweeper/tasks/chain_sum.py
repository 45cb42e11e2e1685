"""Sums and differences of a few whole numbers, answered with the result.

Data: the generator `chain_sum` of the package reasoning-gym (Apache-2.0), duplicates left out. Groups: the numbers of
an expression with their signs, in any order, so a test never asks for a training sum with its terms swapped.
"""

import hashlib
from functools import partial
from typing import Any

from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.package import installed_version, module_alone, require
from sweeper.tasks.split import shuffled, sizes

PACKAGE = "reasoning-gym"
OPTIONS = {
    "min_terms": "fewest numbers in an expression (2)",
    "max_terms": "most numbers in an expression (3)",
    "min_digits": "fewest digits of a number (1)",
    "max_digits": "most digits of a number (2)",
}
DEFAULTS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
TRAIN_EXAMPLES = 4000  # where train_examples is null
BUCKETS = 100  # of groups; each of validation and test has 15
HELD_OUT_BUCKETS = 15

UNIT = "the same numbers with the same signs, in any order"

version = partial(installed_version, PACKAGE)


def check(spec: DatasetSpec) -> None:
    require("reasoning_gym", PACKAGE, spec)
    found = _options(spec)
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"dataset.options.{name} must be a whole number of at least 1, got {value}")
    for what in ("terms", "digits"):
        if found[f"min_{what}"] > found[f"max_{what}"]:
            raise DataError(
                f"dataset.options.min_{what}={found[f'min_{what}']} is more than max_{what}={found[f'max_{what}']}"
            )


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """Splits by a hash of the group.

    Raises:
        DataError: there are fewer different expressions than asked for.
    """
    wanted = {split: size or TRAIN_EXAMPLES for split, size in sizes(spec).items()}
    draws = 30 * sum(wanted.values())
    module: Any = module_alone("reasoning_gym.arithmetic.chain_sum")
    source = module.ChainSumDataset(module.ChainSumConfig(seed=0, size=draws, **_options(spec)))
    found: dict[str, dict[str, Example]] = {split: {} for split in SPLITS}
    for index in range(draws):
        problem = source[index]
        expression = problem["metadata"]["expression"]
        group = _group(expression)
        part = found[_split(group, spec.split_seed)]
        part.setdefault(expression, Example(f"{index}", f"{expression} =", problem["answer"], group))
        if all(len(found[split]) >= wanted[split] for split in SPLITS):
            break
    for split in SPLITS:
        if len(found[split]) < wanted[split]:
            raise DataError(
                f"dataset.{split}_examples={wanted[split]}: only {len(found[split])} different expressions were found; "
                "allow more dataset.options.max_terms or max_digits"
            )
    return {
        split: tuple(shuffled(list(part.values())[: wanted[split]], spec.split_seed, name="id"))
        for split, part in found.items()
    }


def _options(spec: DatasetSpec) -> dict[str, Any]:
    return DEFAULTS | {name: value for name, value in spec.options.items() if name in DEFAULTS}


def _group(expression: str) -> str:
    terms = f"+ {expression}".split()
    return " ".join(sorted(sign + number for sign, number in zip(terms[::2], terms[1::2], strict=True)))


def _split(group: str, seed: int) -> str:
    bucket = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8]) % BUCKETS
    if bucket < HELD_OUT_BUCKETS:
        return "validation"
    return "test" if bucket < 2 * HELD_OUT_BUCKETS else "train"
