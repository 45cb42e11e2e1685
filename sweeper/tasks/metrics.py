"""Task metrics: (generated text, reference response) -> score of one example, higher is better."""

import re
from collections.abc import Callable

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


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


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "final_number": final_number}

# Metrics that teacher forcing can score: the greedy decode equals the response iff every argmax is the right token.
TEACHER_FORCED = frozenset({"exact_match"})


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
