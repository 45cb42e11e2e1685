"""Scores of a generated text against its reference."""

from collections.abc import Callable

import pytest

from sweeper.tasks.metrics import (
    CHOICE,
    CORPUS,
    METRICS,
    PROGRAM,
    TEACHER_FORCED,
    TEXT,
    bleu,
    chrf,
    exact_match,
    extract_number,
    final_number,
    likeliest,
    macro_f1,
    program,
    rouge_l,
    sentence_bleu,
    sentence_chrf,
    suite_score,
)


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


@pytest.mark.parametrize("metric", [exact_match, *TEXT.values()])
def test_a_reference_scores_one_against_itself(metric: Callable[[str, str], float]) -> None:
    assert metric("a = 3 + 0\n#### 3", "a = 3 + 0\n#### 3") == 1.0


def test_every_metric_is_of_one_kind() -> None:
    assert len(METRICS) == len(set(METRICS)) == len(TEACHER_FORCED | CHOICE | set(TEXT) | set(CORPUS) | PROGRAM)
    assert {each for _, each in CORPUS.values()} <= set(TEXT)


def test_rouge_l_is_that_of_the_packages_own_example() -> None:
    """rouge-score's README: precision 0.625 and recall 0.5556, for "the quick brown ... jumps ... the" in common."""
    generated, response = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    assert rouge_l(generated, response) == pytest.approx(2 * 5 / (8 + 9))


def test_bleu_and_chrf_by_hand() -> None:
    """BLEU: n-gram precisions 6/7, 5/6, 4/5, 3/4, no brevity penalty. chrF: 5/6, 4/5, 3/4, 2/3, 1/2, 0/1."""
    generated, response = "the cat sat on the mat today", "the cat sat on the mat"
    assert sentence_bleu(generated, response) == pytest.approx((3 / 7) ** 0.25)
    assert sentence_chrf("abcdef", "abcdeg") == pytest.approx((5 / 6 + 4 / 5 + 3 / 4 + 2 / 3 + 1 / 2) / 6)
    assert sentence_bleu("", response) == sentence_chrf("", response) == 0


def test_corpus_scores_pool_their_counts() -> None:
    """Two sentences: precisions (6+4)/(7+4), (5+3)/(6+3), (4+2)/(5+2), (3+1)/(4+1): no mean of sentences."""
    generated, responses = ["the cat sat on the mat today", "a b c d"], ["the cat sat on the mat", "a b c d"]
    assert bleu(generated, responses) == pytest.approx((10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25)
    assert chrf(["abcdef", "abcdef"], ["abcdeg", "abcdef"]) == pytest.approx(
        (11 / 12 + 9 / 10 + 7 / 8 + 5 / 6 + 3 / 4 + 1 / 2) / 6
    )


def test_macro_f1_counts_classes_alike() -> None:
    # f1 of a: 2·2/(2+3), of b: 2·1/(2+1), of c: never asked for, predicted once
    assert macro_f1(["a", "a", "b", "c", "b"], ["a", "a", "a", "b", "b"]) == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert macro_f1(["x"] * 4, ["x", "x", "x", "y"]) == pytest.approx((2 * 3 / (4 + 3) + 0) / 2)
    assert macro_f1(["x", "y"], ["x", "y"]) == 1


def test_the_likeliest_choice_is_so_by_character() -> None:
    assert likeliest([-3.0, -4.0], ["ab", "abcd"]) == 1
    assert likeliest([-3.0, -4.0], ["ab", "ab"]) == 0
    assert likeliest([-1.0, -1.0], ["a", "a"]) == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Sure:\n```python\nx = 1\n```\nand ```y```", "x = 1\n"),
        ("```\nx = 1", "x = 1"),
        ("", ""),
    ],
)
def test_a_program_is_what_the_fence_holds(text: str, code: str) -> None:
    assert program(text) == code


def test_the_suite_score_is_0_for_the_base_and_1_for_perfection() -> None:
    base = {"a": 0.2, "b": 0.9}
    assert suite_score(base, base) == 0
    assert suite_score(dict.fromkeys(base, 1.0), base) == pytest.approx(1)
    assert suite_score({"a": 0.6, "b": 0.8}, base) == pytest.approx((0.5 - 1.0) / 2)
    assert suite_score({"a": 0.7}, {"a": 1.0}) == pytest.approx(-0.3)
    with pytest.raises(ValueError, match="same tasks"):
        suite_score({"a": 1.0}, base)
