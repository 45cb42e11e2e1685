"""Task metrics, all in [0, 1], higher is better: of one example, and of a whole split where that is no mean.

Four kinds, by what they need: `TEACHER_FORCED` nothing but the response's own tokens, `CHOICE` the likelihood of each
answer to choose among, `TEXT` the generated text and the response, `PROGRAM` the generated text run in the sandbox.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sweeper.errors import DataError
from sweeper.tasks.example import Example

PREFERENCE_ACCURACY, MARGIN, KL = "preference_accuracy", "preference_margin", "kl"
PREFERENCES = (PREFERENCE_ACCURACY, MARGIN, KL)
"""Scores that every dataset of preferences has, against the base: a share, nats a response and nats a token."""

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
FENCED = re.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", re.DOTALL)


def exact_match(generated: str, response: str) -> float:
    """1 if the texts are equal but for case, white space and a final full stop.

    >>> exact_match(" Skin.", "skin")
    1.0
    """
    return float(_normalised(generated) == _normalised(response))


def final_number(generated: str, response: str) -> float:
    """1 if both texts end on the same number: the one after the last `####`, else the last one (Cobbe et al. 2021).

    >>> final_number("2 + 2 = 4, so the answer is 1,004.0", "#### 1004")
    1.0
    """
    wanted = extract_number(response)
    return float(wanted is not None and extract_number(generated) == wanted)


def extract_number(text: str) -> float | None:
    """The first number after the last `####` where there is one, else the last number of the text, else None."""
    _, mark, tail = text.rpartition("####")
    found = NUMBER.findall(tail)
    if not found:
        return None
    return float((found[0] if mark else found[-1]).replace(",", ""))


def rouge_l(generated: str, response: str) -> float:
    """ROUGE-L F1 with Porter stemming (Lin 2004; package rouge-score)."""
    return float(_rouge().score(response, generated)["rougeL"].fmeasure)


def sentence_bleu(generated: str, response: str) -> float:
    """Sentence BLEU-4, exponentially smoothed, with effective order (package sacrebleu)."""
    return _unit(_sacrebleu().sentence_bleu(generated, [response]).score)


def sentence_chrf(generated: str, response: str) -> float:
    """chrF2 of one text (Popović 2015; package sacrebleu)."""
    return _unit(_sacrebleu().sentence_chrf(generated, [response]).score)


def bleu(generated: Sequence[str], responses: Sequence[str]) -> float:
    """Corpus BLEU-4 as sacrebleu defines it (Post 2018); it is no mean of sentence scores."""
    return _unit(_sacrebleu().corpus_bleu(list(generated), [list(responses)]).score)


def chrf(generated: Sequence[str], responses: Sequence[str]) -> float:
    """Corpus chrF2 (Popović 2015; package sacrebleu)."""
    return _unit(_sacrebleu().corpus_chrf(list(generated), [list(responses)]).score)


def macro_f1(predicted: Sequence[str], labels: Sequence[str]) -> float:
    """Mean F1 of the classes that occur in `labels` or `predicted`; 0 for a class never predicted rightly.

    >>> round(macro_f1(["a", "a", "b"], ["a", "b", "b"]), 4)
    0.6667
    """
    classes = {*predicted, *labels}
    pairs = list(zip(predicted, labels, strict=True))
    scores = []
    for name in classes:
        hits = sum(p == name == y for p, y in pairs)
        scores.append(2 * hits / (sum(p == name for p, _ in pairs) + sum(y == name for _, y in pairs)))
    return sum(scores) / max(len(scores), 1)


def likeliest(log_likelihoods: Sequence[float], texts: Sequence[str]) -> int:
    """Index of the answer with the highest log-likelihood per character (lm-evaluation-harness's `acc_norm`).

    >>> likeliest([-4.0, -6.0], ["no", "perhaps"])
    1
    """
    return max(range(len(texts)), key=lambda i: log_likelihoods[i] / max(len(texts[i]), 1))


def program(text: str) -> str:
    """The code of a generated text: its first fenced block where there is one, else all of it."""
    fenced = FENCED.search(text)
    return fenced[1] if fenced else text


def suite_score(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Overall score of a suite of tasks: the mean over tasks of (after - before) / (1 - before).

    `before` is the base model's score and 1 the best there is, so 0 is the base model, 1 is perfect and below 0 is
    worse than the base; each task counts the same, whatever its metric. A task on which the base model is perfect has
    no room above it and counts 0 if that was kept, else the loss itself.

    Raises:
        ValueError: the two are not of the same tasks, or there are none.

    >>> suite_score({"a": 0.8, "b": 0.3}, {"a": 0.6, "b": 0.3})
    0.25
    """
    if not after or after.keys() != before.keys():
        raise ValueError(f"a suite needs the same tasks before and after, got {sorted(before)} and {sorted(after)}")
    gains = [(after[task] - before[task]) / (1 - before[task] if before[task] < 1 else 1.0) for task in after]
    return math.fsum(gains) / len(gains)


TEACHER_FORCED = frozenset({"exact_match"})
CHOICE = frozenset({"choice_accuracy", "macro_f1"})
PROGRAM = frozenset({"pass_at_1"})
# of one generated text and its response, by the name it has in predictions.jsonl
TEXT: dict[str, Callable[[str, str], float]] = {
    "final_number": final_number,
    "rouge_l": rouge_l,
    "sentence_bleu": sentence_bleu,
    "sentence_chrf": sentence_chrf,
}
# of all generated texts of a split; the second name is the score of one example that goes with it
CORPUS: dict[str, tuple[Callable[[Sequence[str], Sequence[str]], float], str]] = {
    "bleu": (bleu, "sentence_bleu"),
    "chrf": (chrf, "sentence_chrf"),
}
METRICS = (*sorted(TEACHER_FORCED), *TEXT, *CORPUS, *sorted(CHOICE), *sorted(PROGRAM))
GENERATED = frozenset({*TEXT, *CORPUS, *PROGRAM})


def check(wanted: Iterable[str], examples: Iterable[Example]) -> None:
    """Raises DataError where a metric needs of an example what it does not have: answers to choose among, a check."""
    wanted = list(wanted)
    choosing, running = ([name for name in wanted if name in kind] for kind in (CHOICE, PROGRAM))
    if not (choosing or running):
        return
    for example in examples:
        if choosing and example.response not in example.choices:
            lacks = "has none" if not example.choices else f"has {example.response[:40]!r} not among them"
            raise DataError(
                f"dataset.metrics={choosing[0]} needs answers to choose among, and example {example.id} {lacks}"
            )
        if running and not example.check:
            raise DataError(f"dataset.metrics={running[0]} needs a check of every program, and {example.id} has none")


# metric -> (module, name to give to pip)
PACKAGES = {"rouge_l": "rouge_score"} | dict.fromkeys(("bleu", "chrf", "sentence_bleu", "sentence_chrf"), "sacrebleu")


@functools.cache
def _rouge() -> Any:
    return importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def _sacrebleu() -> Any:
    return importlib.import_module("sacrebleu")


def _unit(percent: float) -> float:
    return min(max(percent / 100, 0.0), 1.0)  # 100.00000000000004 occurs


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
