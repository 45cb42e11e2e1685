"""Grade-school maths word problems from templates (Mirzadeh et al. 2024), answered step by step up to `#### number`.

Data: the generators of `gsm_symbolic` in the package reasoning-gym (Apache-2.0). Of its 100 templates the 15 that the
package itself lists as in need of repair are left out (one raises, others give fractional people). Groups: templates,
so a test problem tells a story that training never told. Examples are drawn from the templates in turn.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from random import Random
from typing import Any

from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Example
from sweeper.tasks.package import installed_version, module_alone, require
from sweeper.tasks.split import round_robin, shuffled, sizes

PACKAGE = "reasoning-gym"
OPTIONS = {
    "validation_templates": "templates held out for validation (15% of them)",
    "test_templates": "templates held out for test (15% of them)",
}
HELD_OUT_TEMPLATES = 0.15
PER_TEMPLATE = 100  # where train_examples is null; also the number of variants a template is sure to have
NEEDS_REPAIR = frozenset({32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98})

Generator = Callable[[Random, float], dict[str, Any]]

UNIT = "template"

version = partial(installed_version, PACKAGE)


def check(spec: DatasetSpec) -> None:
    require("reasoning_gym", PACKAGE, spec)
    for split, held in _parts(spec, range(100)).items():
        wanted = sizes(spec)[split] or 0
        if wanted > PER_TEMPLATE * len(held):
            raise DataError(
                f"dataset.{split}_examples={wanted}: the {len(held)} templates of this split give at most "
                f"{PER_TEMPLATE * len(held)}"
            )


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """Splits by template; `train_examples` null means 100 of each training template."""
    generators = _generators()
    splits = {}
    for split, templates in _parts(spec, generators).items():
        size = sizes(spec)[split] or PER_TEMPLATE * len(templates)
        each = -(-size // len(templates))
        problems = [_problems(generators[t], t, each, spec.split_seed) for t in templates]
        splits[split] = tuple(shuffled(round_robin(problems)[:size], spec.split_seed, name="id"))
    return splits


def _parts(spec: DatasetSpec, templates: Iterable[int]) -> dict[str, list[int]]:
    order = shuffled((t for t in templates if t not in NEEDS_REPAIR), spec.split_seed)
    held_out = round(HELD_OUT_TEMPLATES * len(order))
    validation, test = (
        _count(spec, f"{split}_templates", default=held_out, most=len(order)) for split in ("validation", "test")
    )
    if validation + test >= len(order):
        raise DataError(
            f"dataset.options: validation_templates={validation} and test_templates={test} leave none of the "
            f"{len(order)} templates for train"
        )
    return {
        "validation": order[:validation],
        "test": order[validation : validation + test],
        "train": order[validation + test :],
    }


def _count(spec: DatasetSpec, option: str, *, default: int, most: int) -> int:
    found = spec.options.get(option)
    if found is None:
        return default
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found < most:
        raise DataError(f"dataset.options.{option} must be a whole number from 1 to {most - 1}, got {found}")
    return found


def _problems(generator: Generator, template: int, count: int, seed: int) -> list[Example]:
    found: dict[str, Example] = {}
    for draw in range(20 * count):
        problem = generator(Random(f"{seed}/{template}/{draw}"), 1.0)
        steps, _, _ = problem["metadata"]["answer_cot"].rpartition("####")
        response = f"{steps.strip()}\n#### {problem['answer']}"
        example = Example(f"{template}-{draw}", problem["question"].strip(), response, f"template-{template}")
        found.setdefault(example.prompt, example)
        if len(found) == count:
            break
    return list(found.values())


@cache
def _generators() -> dict[int, Generator]:
    folder = "reasoning_gym.arithmetic.gsm_symbolic"
    modules = [module_alone(f"{folder}.{name}") for name in ("generators_00_49", "generators_50_99")]
    found = {
        int(name.removeprefix("generate_")): getattr(module, name)
        for module in modules
        for name in vars(module)
        if name.startswith("generate_")
    }
    return dict(sorted(found.items()))
