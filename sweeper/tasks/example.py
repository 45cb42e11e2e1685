"""The three shapes a task's data takes: text, token ids, and a split of token ids."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its response. Examples of one group (a category, a template) never lie in two splits."""

    id: str
    prompt: str
    response: str
    group: str


Examples = Mapping[str, tuple[Example, ...]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example. The loss is taken on `input_ids[prompt_length:]`, whose last id ends the response."""

    id: str
    input_ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """`truncated` examples lost the left part of their prompt; the ids in `dropped` had a response too long to keep."""

    examples: tuple[Encoded, ...]
    truncated: int = 0
    dropped: tuple[str, ...] = field(default=())
