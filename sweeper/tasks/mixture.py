"""Several tasks as one: their examples side by side, each in its own template, scored by its own metrics.

`dataset.parts` are the tasks, by name (`[icd10_chapter, gsm_symbolic]`) or with fields of their own
(`[{icd10_chapter: {train_examples: 500}}, codeio]`). A step has examples of the tasks in proportion to their sizes, as
many of each, or in proportion to size^(1 / temperature).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sweeper.content import Content
from sweeper.errors import SpecError, unknown
from sweeper.spec import OF_FILES, DatasetSpec
from sweeper.tasks.example import EncodedSplit, Example

OPTIONS = {
    "sampling": "proportional, equal or temperature: whose examples a step has",
    "temperature": "1 is proportional, and the higher, the more alike (temperature, above 0)",
    "unseen": "tasks that are scored and not trained on, as a list of their names ([])",
    "weights": "uniform: the sum of the tasks' mean losses; size: each by its examples; tokens: the mean of all "
    "tokens; uncertainty: learnt",
    "surgery": "none, or pcgrad: a task's gradient loses what goes against another's",
}
UNIT = "that of each of its tasks"
SAMPLINGS = ("proportional", "equal", "temperature")
LEARNT = "uncertainty"
WEIGHTS = ("uniform", "size", "tokens", LEARNT)
ORDERS = ("given", "seed")
SURGERIES = ("none", "pcgrad")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How the tasks of a dataset are mixed: `sequence` is one after another, with a share of `replay`."""

    sampling: str = "proportional"
    temperature: float = 1.0
    weights: str = "uniform"
    surgery: str = "none"
    sequence: bool = False
    replay: float = 0.0
    order: str = "given"
    unseen: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: DatasetSpec) -> "Mixing":
        """What the options of a dataset ask for.

        Raises:
            SpecError: an option that cannot be used.
        """
        given = {name: value for name, value in spec.options.items() if name in cls.__slots__}
        unseen = given.pop("unseen", ())
        found = cls(**given, unseen=_names(unseen, spec), sequence=spec.family == "sequence")
        named = {"sampling": SAMPLINGS, "weights": WEIGHTS, "surgery": SURGERIES, "order": ORDERS}
        for name, known in named.items():
            if getattr(found, name) not in known:
                raise SpecError(unknown(f"dataset.options.{name}", str(getattr(found, name)), known))
        if not (_number(found.temperature) and found.temperature > 0):
            raise SpecError(field="dataset.options.temperature", wanted="above 0", got=found.temperature)
        if found.temperature != 1 and found.sampling != "temperature":
            raise SpecError("dataset.options.temperature is for dataset.options.sampling=temperature")
        if not (_number(found.replay) and 0 <= found.replay < 1):
            raise SpecError(field="dataset.options.replay", wanted="in [0, 1)", got=found.replay)
        return found


def check(spec: DatasetSpec) -> None:
    """Whether it has several tasks with names of their own, and options that can be used; the tasks check themselves.

    Raises:
        SpecError: it has not.
    """
    names = [part.name for part in spec.parts]
    if len(names) < 2:
        example = f"dataset={spec.name} 'dataset.parts=[icd10_chapter,gsm_symbolic]'"
        raise SpecError(f"dataset.parts: dataset={spec.name} is made of two tasks or more: give {example}")
    for name in names:
        if names.count(name) > 1:
            raise SpecError(
                f"dataset.parts: {name} is there twice; a second one needs a name, as in "
                f"'dataset.parts=[{name},{{{name}: {{name: other}}}}]'"
            )
    for part in spec.parts:
        if part.parts:
            raise SpecError(f"dataset.parts: {part.name} is made of several tasks itself; give those")
    Mixing.of(spec)


def version(spec: DatasetSpec) -> str:
    """Nothing of its own: its tasks are encoded by themselves."""
    return ""


def of_parts(spec: DatasetSpec, content: Callable[[DatasetSpec], Content]) -> Content:
    """A digest of what lies behind all its tasks."""
    found = [content(part) for part in spec.parts]
    if all(one.text is None for one in found):
        return Content(first="; ".join(one.told or "" for one in found) or None)
    text = json.dumps([one.told for one in found])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Content(f"{OF_FILES}{digest}", max(one.changed for one in found))


def joined(parts: Mapping[str, Mapping[str, tuple[Example, ...]]]) -> dict[str, tuple[Example, ...]]:
    """The splits of several tasks side by side; ids and groups begin with the task's name."""
    names = next(iter(parts.values())).keys()
    return {
        split: tuple(
            replace(example, id=f"{part}/{example.id}", group=f"{part}/{example.group}")
            for part, splits in parts.items()
            for example in splits[split]
        )
        for split in names
    }


def combined(parts: Mapping[str, Mapping[str, EncodedSplit]]) -> dict[str, EncodedSplit]:
    """The encoded splits of several tasks side by side, in their order."""
    names = next(iter(parts.values())).keys()
    return {split: _side_by_side({part: splits[split] for part, splits in parts.items()}) for split in names}


def _side_by_side(parts: Mapping[str, EncodedSplit]) -> EncodedSplit:
    every = parts.values()
    return EncodedSplit(
        examples=tuple(example for one in every for example in one.examples),
        truncated=sum(one.truncated for one in every),
        dropped=tuple(f"{part}/{one}" for part, split in parts.items() for one in split.dropped),
        apart=sum(one.apart for one in every),
        parts=dict(parts),
    )


def by_part(splits: Mapping[str, EncodedSplit]) -> dict[str, EncodedSplit]:
    """The splits, and after each those of its tasks, as SPLIT/TASK."""
    return dict(_by_part(splits))


def _by_part(splits: Mapping[str, EncodedSplit]) -> Iterator[tuple[str, EncodedSplit]]:
    for name, split in splits.items():
        yield name, split
        yield from ((f"{name}/{part}", one) for part, one in split.parts.items())


def _names(given: Any, spec: DatasetSpec) -> tuple[str, ...]:
    """Tasks that are scored and not trained on.

    Raises:
        SpecError: they are no list of names of tasks, or leave none to train on.
    """
    known = [part.name for part in spec.parts]
    if not isinstance(given, list | tuple):
        raise SpecError(f"dataset.options.unseen must be a list, got {given}: write 'dataset.options.unseen=[{given}]'")
    for name in given:
        if name not in known:
            raise SpecError(unknown("dataset.options.unseen", str(name), known))
    if given and not set(known) - set(given):
        raise SpecError("dataset.options.unseen has every task: one at least is to be trained on")
    return tuple(given)


def unseen(spec: DatasetSpec) -> frozenset[str]:
    """The tasks of a dataset that its runs are scored on and do not train on."""
    return frozenset(spec.options.get("unseen", ()))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
