"""Legal text: a licence notice, or the beginning of a licence -> the category of the licence.

Data: the rules and licences of the package licensedcode-data (ScanCode's licence database, CC-BY-4.0). Notices of
`MIN_WORDS` words and more that name a single licence are kept, each cut to `MAX_WORDS`. Groups: licence keys without
their version, so that GPL 2.0 and GPL 3.0 stay together. Classes: ScanCode's categories; its four for restricted use
(proprietary free, commercial, free restricted, source-available) are one, and those with too few licences are left
out. Balance: every class gives the same number of examples, taken from its licences in turn.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from sweeper.spec import DatasetSpec
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.package import folder, installed_version, require
from sweeper.tasks.split import balanced, prompt_key, round_robin, shuffled, sizes, without_near_duplicates

PACKAGE = "licensedcode-data"
OPTIONS: dict[str, str] = {}
HELD_OUT_LICENCES = 0.2
MIN_WORDS, MAX_WORDS = 8, 80
CATEGORIES = {
    "Permissive": "permissive",
    "Copyleft Limited": "weak copyleft",
    "Copyleft": "copyleft",
    "Proprietary Free": "restricted",
    "Commercial": "restricted",
    "Free Restricted": "restricted",
    "Source-available": "restricted",
}
CLASSES = tuple(dict.fromkeys(CATEGORIES.values()))
FIELD = re.compile(r"^(category|license_expression|is_license_notice|is_deprecated): (.*)$", re.MULTILINE)

UNIT = "licence, all its versions"

check = partial(require, "licensedcode", PACKAGE)
version = partial(installed_version, PACKAGE)


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """Balanced splits by licence; `train_examples` null means as many of each class as the smallest one has."""
    notices = _notices()
    side = _sides(notices, spec.split_seed)
    queues: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for category, licences in notices.items():
        for split in SPLITS:
            names = [name for name in shuffled(licences, spec.split_seed, category) if side[name] == split]
            queues[split] += round_robin([shuffled(licences[name], spec.split_seed, name="id") for name in names])
    kept = without_near_duplicates({split: tuple(queue) for split, queue in queues.items()})
    return {
        split: balanced(
            [[e for e in kept[split] if e.response == name] for name in CLASSES], size, spec.split_seed, split
        )
        for split, size in sizes(spec).items()
    }


def _sides(notices: dict[str, dict[str, list[Example]]], seed: int) -> dict[str, str]:
    """Licence -> split. A licence whose versions are of several classes counts with the one it has most texts of."""
    home: dict[str, str] = {}
    for category, licences in notices.items():
        for name, texts in licences.items():
            if name not in home or len(texts) > len(notices[home[name]][name]):
                home[name] = category
    side: dict[str, str] = {}
    for category in notices:
        order = shuffled((name for name in home if home[name] == category), seed, category)
        held_out = round(HELD_OUT_LICENCES * len(order))
        side |= dict.fromkeys(order, "train")
        side |= dict.fromkeys(order[:held_out], "validation")
        side |= dict.fromkeys(order[held_out : 2 * held_out], "test")
    return side


@cache
def _notices() -> dict[str, dict[str, list[Example]]]:
    """Class -> licence -> texts. Of near-duplicate texts of two licences only the first is kept."""
    data = folder("licensedcode") / "data"
    category = {path.stem: fields.get("category", "") for path, fields, _ in _files(data / "licenses", "*.LICENSE")}
    found: dict[str, dict[str, list[Example]]] = {name: defaultdict(list) for name in CLASSES}
    owner: dict[str, str] = {}
    for path, fields, text in (*_files(data / "licenses", "*.LICENSE"), *_files(data / "rules", "*.RULE")):
        is_text = path.suffix == ".LICENSE"
        key = path.stem if is_text else fields.get("license_expression", "")
        words = text.split()
        wanted = is_text or fields.get("is_license_notice") == "yes"
        if not wanted or "is_deprecated" in fields or len(words) < MIN_WORDS or category.get(key) not in CATEGORIES:
            continue
        licence, notice = re.split(r"-v?\d", key)[0], " ".join(words[:MAX_WORDS])
        if owner.setdefault(prompt_key(notice), licence) == licence:
            label = CATEGORIES[category[key]]
            made = Example(path.name, f"Licence notice: {notice}\nCategory:", label, licence, choices=CLASSES)
            found[label][licence].append(made)
    return found


def _files(where: Path, pattern: str) -> Iterator[tuple[Path, dict[str, str], str]]:
    """Path, header fields and text of each file; the header stands between two lines of dashes."""
    for path in sorted(where.glob(pattern)):
        _, header, text = path.read_text(encoding="utf-8").split("---", 2)
        yield path, {key: value.strip() for key, value in FIELD.findall(header)}, text
