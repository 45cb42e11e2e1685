"""Scores of a generated text against its reference."""

import pytest

from sweeper.tasks.metrics import METRICS, exact_match, extract_number, final_number


@pytest.mark.parametrize(
    ("generated", "response", "score"),
    [
        ("skin", "skin", 1.0),
        ("  Skin.\n", "skin", 1.0),
        ("external  causes", "external causes", 1.0),
        ("skin eye", "skin", 0.0),
        ("", "skin", 0.0),
    ],
)
def test_exact_match(generated: str, response: str, score: float) -> None:
    assert exact_match(generated, response) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### $1,234.50 dollars, that is 9", 1234.5),
        ("It is 12. The answer is: -5.", -5),
        ("#### 4 and then #### 5", 5),
        ("costs .5", 0.5),
        ("10 - 3 = 7", 7),
        ("10-3", 3),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_extract_number(text: str, number: float | None) -> None:
    assert extract_number(text) == number


def test_final_number_compares_values() -> None:
    assert final_number("the answer is 1,004.0", "5 steps\n#### 1004") == 1
    assert final_number("#### 1005", "#### 1004") == 0
    assert final_number("no idea", "no number") == 0


@pytest.mark.parametrize("metric", METRICS.values())
def test_a_reference_scores_one_against_itself(metric: object) -> None:
    assert callable(metric)
    assert metric("a = 3\n#### 3", "a = 3\n#### 3") == 1.0
