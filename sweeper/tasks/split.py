"""Seeded splits that keep groups together and never put the same prompt in two splits."""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import SPLITS, Example

Item = TypeVar("Item")

# The most that validation and test may each take of a dataset that names no splits of its own.
HELD_OUT_SHARE = 0.1

LONGEST_NAME = 60  # characters of a unit's name

PUNCTUATION = re.compile(r"""[.,;:!?"'()\[\]]""")


def sizes(spec: DatasetSpec) -> dict[str, int | None]:
    """Requested examples by split; None means all."""
    return {"train": spec.train_examples, "validation": spec.validation_examples, "test": spec.test_examples}


def shuffled(items: Iterable[Item], *key: object, name: str | None = None) -> list[Item]:
    """Items ordered by the hash of (key, item) or (key, item.<name>): the same on every machine and Python."""

    def rank(item: Item) -> bytes:
        value = item if name is None else getattr(item, name)
        return hashlib.sha256(repr((*key, value)).encode()).digest()

    return sorted(items, key=rank)


def round_robin(queues: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of every queue, then the second of every queue, and so on until all are empty."""
    waiting = [list(queue) for queue in queues]
    longest = max((len(queue) for queue in waiting), default=0)
    return [queue[turn] for turn in range(longest) for queue in waiting if turn < len(queue)]


def balanced(queues: Sequence[Sequence[Example]], size: int | None, *key: object) -> tuple[Example, ...]:
    """`size` examples taken from every class's queue in turn; None takes as many of each as the smallest has."""
    if size is None:
        size = len(queues) * min(len(queue) for queue in queues)
    order = shuffled(range(len(queues)), *key)
    chosen = round_robin([queues[index] for index in order])[:size]
    return tuple(shuffled(chosen, *key, name="id"))


def asked(example: Example) -> str:
    """What tells an example from others: its prompt, or itself where it is running text."""
    return example.prompt or example.response


def prompt_key(prompt: str) -> str:
    """A prompt without case, spacing and sentence punctuation: equal keys are near-duplicates.

    >>> prompt_key("Fracture, left ulna.") == prompt_key("fracture  left ulna")
    True
    >>> prompt_key("2 + 3") == prompt_key("2 - 3")
    False
    """
    return " ".join(PUNCTUATION.sub(" ", prompt.casefold()).split()) or prompt


def split_examples(
    examples: Sequence[Example],
    spec: DatasetSpec,
    *,
    marked: Mapping[str, str] | None = None,
    near_duplicates: bool = True,
    held_out_each: int | None = None,
) -> dict[str, tuple[Example, ...]]:
    """Train, validation and test of a dataset in which groups and near-duplicate prompts stay together.

    `marked` maps an example's id to the split its source names. A split that the source lacks is cut out of train:
    whole clusters in an order given by `split_seed`, up to the size asked for but no more than a tenth of the
    examples. Sizes are upper limits; `train_examples` None means all. `near_duplicates` false leaves out what
    `without_near_duplicates` finds. Of a cluster that is cut out, `held_out_each` examples are kept (None: all) and the
    others left out, so that a split of one size has more groups.

    Raises:
        DataError: one cluster is marked for two splits, or a split would be empty.
    """
    marked = marked or {}
    clusters = _clusters(examples)
    parts: dict[str, list[list[Example]]] = {split: [] for split in SPLITS}
    for cluster in clusters:
        parts[_marked_split(cluster, marked)].append(cluster)
    limit = max(1, int(HELD_OUT_SHARE * len(examples)))
    for split, wanted in (("validation", spec.validation_examples), ("test", spec.test_examples)):
        if not parts[split]:
            parts[split], parts["train"] = _cut(
                parts["train"], min(wanted, limit), (spec.split_seed, split), most=held_out_each
            )
    empty = [split for split in SPLITS if not parts[split]]
    if empty:
        raise DataError(
            f"{len(examples)} examples in {len(clusters)} distinct groups leave nothing for {', '.join(empty)}: "
            "give at least three distinct prompts (or groups), or more of them for train"
        )
    found = {
        split: tuple(shuffled((e for cluster in parts[split] for e in cluster), spec.split_seed, name="id"))
        for split in SPLITS
    }
    if not near_duplicates:
        found = without_near_duplicates(found)
    return {split: found[split][:size] for split, size in sizes(spec).items()}


def units(examples: Sequence[Example]) -> list[str]:
    """The unit of independence of each example: its group, joined with those that near-duplicate prompts tie it to.

    A joined unit is named by the group that comes first; a name too long to write with every prediction, by its digest.
    """
    named: dict[str, str] = {}
    for cluster in _clusters(examples):
        name = cluster[0].group
        short = name if len(name) <= LONGEST_NAME else hashlib.sha256(name.encode()).hexdigest()[:12]
        named |= dict.fromkeys((example.id for example in cluster), short)
    return [named[example.id] for example in examples]


def _clusters(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples joined by a common group or a near-duplicate prompt, in order of first appearance (union-find)."""
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        for key in (("group", example.group), ("prompt", prompt_key(asked(example)))):
            a, b = root(index), root(first.setdefault(key, index))
            parent[max(a, b)] = min(a, b)
    members: dict[int, list[Example]] = defaultdict(list)
    for index, example in enumerate(examples):
        members[root(index)].append(example)
    return list(members.values())


def _marked_split(cluster: list[Example], marked: Mapping[str, str]) -> str:
    sides: dict[str, str] = {}
    for example in cluster:
        if example.id in marked:
            sides.setdefault(marked[example.id], example.id)
    if len(sides) > 1:
        where = ", ".join(f"{split} ({example_id})" for split, example_id in sides.items())
        raise DataError(f"the same prompt or group is marked for two splits: {where}; keep it in one")
    return next(iter(sides), "train")


def _cut(
    pool: list[list[Example]], wanted: int, key: tuple[object, ...], *, most: int | None = None
) -> tuple[list[list[Example]], list[list[Example]]]:
    """(cut, rest): clusters in seeded order that fit into `wanted` examples; the smallest one if none fits.

    Clusters are cut whole, or as `most` examples of each.
    """
    by_name = {min(example.id for example in cluster): cluster for cluster in pool}
    order = shuffled(by_name, *key)
    cut: list[str] = []
    room = wanted
    for name in order:
        size = len(by_name[name][:most])
        if size <= room:
            cut.append(name)
            room -= size
    if not cut and len(pool) > 1:
        cut = [min(order, key=lambda name: len(by_name[name]))]
    taken = set(cut)
    kept = [by_name[name] if most is None else shuffled(by_name[name], *key, name="id")[:most] for name in cut]
    return kept, [by_name[name] for name in order if name not in taken]


def without_near_duplicates(
    splits: Mapping[str, tuple[Example, ...]], *, share: float = 0.8
) -> dict[str, tuple[Example, ...]]:
    """Splits whose training prompts share fewer than `share` of their words with any held-out prompt (Jaccard).

    Validation loses what is that near to test; test is kept whole. Only prompts with a common word among the rarest
    ones of both can be that near (prefix filtering, Chaudhuri et al. 2006), which spares most comparisons.
    """
    bags = {split: [words(asked(e)) for e in examples] for split, examples in splits.items()}
    counts = Counter(word for part in bags.values() for bag in part for word in bag)
    index: dict[str, list[frozenset[str]]] = defaultdict(list)

    def rarest(bag: frozenset[str]) -> list[str]:
        ordered = sorted(bag, key=lambda word: (counts[word], word))
        return ordered[: len(bag) - math.ceil(share * len(bag)) + 1]

    kept: dict[str, tuple[Example, ...]] = {}
    for split in ("test", "validation", "train"):
        near = [any(overlap(bag, other) >= share for w in rarest(bag) for other in index[w]) for bag in bags[split]]
        kept[split] = tuple(e for e, is_near in zip(splits[split], near, strict=True) if not is_near)
        for bag, is_near in zip(bags[split], near, strict=True):
            if not is_near:
                for word in rarest(bag):
                    index[word].append(bag)
    return {split: kept[split] for split in splits}


def words(prompt: str) -> frozenset[str]:
    """The words of a prompt without case and punctuation."""
    return frozenset(re.findall(r"\w+", prompt.casefold()))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity: common words over all words; 0 where there are none."""
    return len(a & b) / max(len(a | b), 1)
