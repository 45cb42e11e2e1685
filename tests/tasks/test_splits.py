"""What holds for the splits of every family: disjoint by group and prompt, seeded, sized."""

import re
from dataclasses import replace

import pytest

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Example
from sweeper.tasks.split import prompt_key, round_robin, split_examples

ICD = DatasetSpec(
    name="icd10_chapter", family="icd10_chapter", train_examples=2100, validation_examples=105, test_examples=210,
    template="plain",
)  # fmt: skip
GSM = DatasetSpec(
    name="gsm_symbolic", family="gsm_symbolic", train_examples=590, validation_examples=104, test_examples=208,
    metrics=("final_number",), max_new_tokens=320,
)  # fmt: skip
OFFLINE = pytest.mark.parametrize("spec", [ICD, GSM], ids=lambda spec: spec.name)


def made(count: int, *, groups: int = 10**9) -> list[Example]:
    return [Example(f"{i}", f"question {i}", f"answer {i}", f"group {i % groups}") for i in range(count)]


def toy(**fields: int | None) -> DatasetSpec:
    return replace(DatasetSpec(name="toy", family="jsonl"), **fields)


@OFFLINE
def test_no_group_and_no_prompt_is_in_two_splits(spec: DatasetSpec) -> None:
    for seed in (0, 1, 2):
        splits = tasks.load(replace(spec, split_seed=seed))
        for key in (lambda e: e.group, lambda e: e.id, lambda e: prompt_key(e.prompt)):
            seen = [{key(e) for e in examples} for examples in splits.values()]
            assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


@OFFLINE
def test_few_held_out_prompts_share_most_words_with_a_training_prompt(spec: DatasetSpec) -> None:
    """Word overlap (Jaccard, numbers alike) of 0.8 and more: sibling diagnoses, at most 5% of them."""
    splits = tasks.load(spec)
    train = [words(e.prompt) for e in splits["train"]]
    for split in ("validation", "test"):
        near = 0
        for example in splits[split]:
            own = words(example.prompt)
            near += any(len(own & other) >= 0.8 * len(own | other) for other in train)
        assert near <= 0.05 * len(splits[split])


def words(prompt: str) -> frozenset[str]:
    text = prompt.removeprefix("Diagnosis:").removesuffix("Chapter:").casefold()
    return frozenset(re.findall(r"\w+", re.sub(r"\d+", "0", text)))


@OFFLINE
def test_the_seed_alone_decides_the_split(spec: DatasetSpec) -> None:
    assert tasks.load(spec) == tasks.load(replace(spec))
    assert tasks.load(spec)["test"] != tasks.load(replace(spec, split_seed=1))["test"]


@OFFLINE
def test_sizes_are_those_asked_for(spec: DatasetSpec) -> None:
    tasks.check(spec)
    sizes = {split: len(examples) for split, examples in tasks.load(spec).items()}
    assert sizes == {
        "train": spec.train_examples,
        "validation": spec.validation_examples,
        "test": spec.test_examples,
    }
    assert len(tasks.load(replace(spec, train_examples=None))["train"]) > 4000


@pytest.mark.parametrize("count", [3, 10, 100, 1000])
def test_validation_and_test_take_at_most_a_tenth(count: int) -> None:
    splits = split_examples(made(count), toy())
    limit = max(1, count // 10)
    assert [len(splits[s]) for s in ("validation", "test")] == [min(limit, 200)] * 2
    assert sum(map(len, splits.values())) == count


def test_groups_stay_together_whatever_their_size() -> None:
    examples = made(200, groups=7)
    splits = split_examples(examples, toy(split_seed=3))
    groups = [{e.group for e in part} for part in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 7


def test_near_duplicate_prompts_stay_together_across_groups() -> None:
    pairs = [Example(f"{i}{c}", f"What is {i}{c}", "x", f"{i}{c}") for i in range(30) for c in ("?", " ")]
    splits = split_examples(pairs, toy())
    keys = [{prompt_key(e.prompt) for e in part} for part in splits.values()]
    assert sum(map(len, keys)) == 30


def test_the_order_of_the_source_does_not_matter() -> None:
    examples = made(100)
    assert split_examples(examples, toy()) == split_examples(examples[::-1], toy())
    assert split_examples(examples, toy()) != split_examples(examples, toy(split_seed=1))


def test_marked_splits_are_kept_and_the_missing_one_is_cut_from_train() -> None:
    marked = {f"{i}": "test" for i in range(30)}
    splits = split_examples(made(100), toy(), marked=marked)
    assert {e.id for e in splits["test"]} == set(marked)
    assert len(splits["validation"]) == 10
    assert len(splits["train"]) == 60


def test_a_prompt_marked_for_two_splits_is_refused() -> None:
    examples = [*made(10), Example("copy", "Question 3!", "answer", "other")]
    with pytest.raises(DataError, match=r"two splits: train \(3\), test \(copy\)"):
        split_examples(examples, toy(), marked={"3": "train", "copy": "test"})


@pytest.mark.parametrize("examples", [made(2), made(50, groups=2)])
def test_too_few_groups_for_three_splits(examples: list[Example]) -> None:
    with pytest.raises(DataError, match="leave nothing for"):
        split_examples(examples, toy())


def test_round_robin_takes_turns() -> None:
    assert round_robin([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
    assert round_robin([]) == []
