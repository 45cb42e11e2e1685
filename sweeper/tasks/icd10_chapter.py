"""Medical coding: the text of an ICD-10-CM diagnosis -> the chapter of the classification it belongs to.

Data: the leaf codes of the package simple-icd-10-cm (MIT; the classification itself is in the public domain).
Groups: three-character categories, so "left ulna" and "right ulna" of one fracture are never on two sides.
Balance: chapter 19 (injury) holds 55% of the leaves, so each chapter gives the same number of examples, taken from
its categories in turn. Chapter 22 (codes for special purposes) has 3 leaves in 2 categories, too few for three splits:
it is left out. The 21 others are the classes; the majority class therefore scores 1/21.
"""

import warnings
from collections import defaultdict
from functools import cache, partial
from typing import Any

from sweeper.spec import DatasetSpec
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.package import imported, installed_version, require
from sweeper.tasks.split import balanced, prompt_key, round_robin, shuffled, sizes

PACKAGE = "simple-icd-10-cm"
OPTIONS: dict[str, str] = {}
HELD_OUT_CATEGORIES = 0.15

CHAPTERS = {
    "1": "infectious",
    "2": "neoplasms",
    "3": "blood",
    "4": "endocrine",
    "5": "mental",
    "6": "nervous",
    "7": "eye",
    "8": "ear",
    "9": "circulatory",
    "10": "respiratory",
    "11": "digestive",
    "12": "skin",
    "13": "musculoskeletal",
    "14": "genitourinary",
    "15": "pregnancy",
    "16": "perinatal",
    "17": "congenital",
    "18": "symptoms",
    "19": "injury",
    "20": "external causes",
    "21": "health services",
}

UNIT = "three-character category"

check = partial(require, "simple_icd_10_cm", PACKAGE)
version = partial(installed_version, PACKAGE)


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """Balanced splits; `train_examples` null means as many as the smallest chapter allows.

    A size that is no multiple of 21 gives some chapters one example more. A chapter with fewer leaves than its share
    gives all it has.
    """
    queues: dict[str, list[list[Example]]] = {split: [] for split in SPLITS}
    for chapter, categories in _leaves().items():
        order = shuffled(categories, spec.split_seed, chapter)
        held_out = max(1, round(HELD_OUT_CATEGORIES * len(order)))
        parts = {
            "validation": order[:held_out],
            "test": order[held_out : 2 * held_out],
            "train": order[2 * held_out :],
        }
        for split, names in parts.items():
            leaves = [shuffled(categories[name], spec.split_seed, name="id") for name in names]
            queues[split].append(round_robin(leaves))
    return {split: balanced(queues[split], size, spec.split_seed, split) for split, size in sizes(spec).items()}


@cache
def _leaves() -> dict[str, dict[str, list[Example]]]:
    """Chapter -> category -> leaves. Of near-duplicate descriptions in two categories only the first is kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own, about how it opens its file
        icd: Any = imported("simple_icd_10_cm")

    chapters: dict[str, dict[str, list[Example]]] = {chapter: defaultdict(list) for chapter in CHAPTERS}
    owner: dict[str, str] = {}
    for chapter in CHAPTERS:
        for code in icd.get_descendants(chapter):
            category = code[:3]
            if not icd.is_leaf(code) or icd.is_block(code):
                continue
            description = icd.get_description(code)
            if owner.setdefault(prompt_key(description), category) == category:
                prompt = f"Diagnosis: {description}\nChapter:"
                made = Example(code, prompt, CHAPTERS[chapter], category, choices=tuple(CHAPTERS.values()))
                chapters[chapter][category].append(made)
    return chapters
