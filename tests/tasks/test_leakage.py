"""No offline task shows in training what it asks for in validation or test: by group, by prompt and nearly so."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec, from_mapping
from sweeper.tasks.example import Example
from sweeper.tasks.split import overlap, prompt_key, shuffled, without_near_duplicates, words

CONF = Path(__file__).parents[2] / "conf" / "dataset"
NETWORK = ("hub", "file", "jsonl")
# Share of held-out prompts that may share 80% of their words with a training prompt. Sibling diagnoses do; two sums of
# the same numbers with another sign are different questions; the others leave such prompts out.
NEAR = {"icd10_chapter": 0.1, "chain_sum": 1.0}
SAMPLE = 40


def offline() -> list[Any]:
    found = []
    for path in sorted(CONF.glob("*.yaml")):
        plain: Any = OmegaConf.to_container(OmegaConf.load(path))
        if plain["family"] not in (*NETWORK, *tasks.OF_TASKS):
            found.append(pytest.param(from_mapping(DatasetSpec, plain), id=path.stem))
    return found


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    try:
        tasks.check(spec, training=False)
    except DataError as error:
        if "fetched once" in str(error):
            pytest.skip(str(error))
        raise
    return tasks.load(spec)


@pytest.mark.parametrize("spec", offline())
def test_nothing_held_out_is_in_training(spec: DatasetSpec) -> None:
    splits = load(spec)
    assert splits["test"]
    for a, b in combinations(splits, 2):
        for name, key in (
            ("id", lambda e: e.id),
            ("group", lambda e: e.group),
            ("prompt", lambda e: prompt_key(e.prompt)),
        ):
            both = {key(e) for e in splits[a]} & {key(e) for e in splits[b]}
            assert not both, f"{a} and {b} have the same {name}: {sorted(both)[:3]}"


@pytest.mark.parametrize("spec", offline())
def test_next_to_nothing_held_out_is_nearly_in_training(spec: DatasetSpec) -> None:
    splits = load(spec)
    train = [words(e.prompt) for e in splits["train"]]
    for split in ("validation", "test"):
        sample = shuffled(splits[split], 0, name="id")[:SAMPLE]
        near = sum(any(overlap(words(e.prompt), other) >= 0.8 for other in train) for e in sample)
        assert near <= NEAR.get(spec.family, 0) * len(sample), f"{near} of {len(sample)} {split} prompts"


@pytest.mark.parametrize("spec", offline())
def test_every_answer_is_among_its_choices_and_every_check_compiles(spec: DatasetSpec) -> None:
    for example in (e for part in load(spec).values() for e in part):
        assert not example.choices or example.response in example.choices
        assert len(set(example.choices)) == len(example.choices)
        if "pass_at_1" in spec.metrics:
            assert example.check
            compile(example.check, "check", "exec")


def test_near_duplicates_leave_train_and_validation_but_never_test() -> None:
    def made(name: str, *prompts: str) -> tuple[Example, ...]:
        return tuple(Example(f"{name}{i}", prompt, "x", f"{name}{i}") for i, prompt in enumerate(prompts))

    splits = {
        "train": made("train", "a b c d e", "a b c d e f", "v w x y z", "one two three four five"),
        "validation": made("validation", "v w x y z!", "a B c, d e g"),
        "test": made("test", "a b c d e", "A b c d e g"),
    }
    kept = without_near_duplicates(splits)
    assert kept["test"] == splits["test"]
    assert [e.id for e in kept["validation"]] == ["validation0"]
    assert [e.id for e in kept["train"]] == ["train3"]
    assert without_near_duplicates(splits, share=1.0)["train"] == splits["train"][1:2] + splits["train"][3:]


def test_the_filter_finds_what_comparing_all_with_all_finds() -> None:
    vocabulary = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
    prompts = [" ".join(shuffled(vocabulary, n)[: 4 + n % 6]) for n in range(150)]
    made = [Example(str(n), prompt, "x", str(n)) for n, prompt in enumerate(prompts)]
    splits = {"train": tuple(made[:90]), "validation": tuple(made[90:120]), "test": tuple(made[120:])}
    for share in (0.6, 0.7, 0.8):
        kept = without_near_duplicates(splits, share=share)
        held_out = [*splits["test"], *kept["validation"]]
        expected = [
            e for e in splits["train"] if all(overlap(words(e.prompt), words(o.prompt)) < share for o in held_out)
        ]
        assert list(kept["train"]) == expected
        assert 0 < len(expected) < 90, share
