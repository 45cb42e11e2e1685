"""Forgetting: a fixed sample of general English prose, the same for every dataset, whose NLL is to stay where it was.

Text: "In the Year 2889" (Jules Verne and Michel Verne, 1889; in the public domain), which lies in the package
reasoning-gym. No task here trains on it. It is cut into passages at paragraph ends, the first sentence of each is given
and the rest is scored. Ask for it as a split: `evaluation.splits=[validation,test,general_text]`; the record then holds
its NLL before and after, and the analysis reports the rise as forgetting.
"""

import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING

from sweeper import installation
from sweeper.errors import DataError
from sweeper.tasks.example import Encoded, EncodedSplit
from sweeper.tasks.package import folder, is_installed
from sweeper.tasks.template import continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "general_text"
SHA256 = "e9048bcd282207d6f093bff92b3ad7c94689352205105c3716f0fdf5e245a25c"
PASSAGE = 800  # characters and more, up to the end of the paragraph
LONGEST = 1600
MOST_TOKENS = 512  # a passage has about 250 in a vocabulary of words; only one of bytes makes more


def check() -> None:
    """Raises DataError where the text is missing or another one than the pinned."""
    if not is_installed("reasoning_gym"):
        raise DataError(
            f"evaluation.splits={SPLIT} needs the text in the package reasoning-gym: "
            f"{installation.fetch('reasoning-gym')}"
        )
    found = hashlib.sha256(_file()).hexdigest()
    if found != SHA256:
        raise DataError(
            f"evaluation.splits={SPLIT}: this version of reasoning-gym has another text (SHA-256 {found}); "
            "install reasoning-gym==0.1.25"
        )


@cache
def passages() -> tuple[tuple[str, str], ...]:
    """(first sentence, the rest) of every passage."""
    check()
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", _story())]
    joined: list[str] = []
    current = ""
    for paragraph in paragraphs:
        current = f"{current}\n{paragraph}".strip()
        if len(current) >= PASSAGE:
            joined.append(current[:LONGEST])
            current = ""
    cut = [re.match(r"(.+?[.!?]['\"”]?)\s(.+)", text, re.DOTALL) for text in joined]
    return tuple((found[1], found[2]) for found in cut if found is not None)


def encode(tokenizer: "PreTrainedTokenizerBase", *, longest: int | None = None) -> EncodedSplit:
    """The passages as token ids, without any template and without an end-of-text id.

    Args:
        longest: positions the model has; a passage is cut to them, and to `MOST_TOKENS`.
    """
    most = min(longest or MOST_TOKENS, MOST_TOKENS)
    made = []
    for index, (first, rest) in enumerate(passages()):
        start = list(tokenizer(first, verbose=False).input_ids)
        scored = continuation(first, f" {rest}", tokenizer)
        if len(start) < most:
            made.append(Encoded(f"{SPLIT}-{index}", (*start, *scored)[:most], len(start)))
    return EncodedSplit(tuple(made))


def _file() -> bytes:
    return (folder("reasoning_gym") / "data" / "in_the_year_2889.txt").read_bytes()


def _story() -> str:
    """The story itself, without Project Gutenberg's notices around it."""
    text = _file().decode("utf-8-sig").replace("\r\n", "\n")
    return text[text.index("Little though they seem") : text.index("End of Project Gutenberg")]
