"""The three shapes a task's data takes: text, token ids, and a split of token ids."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

SPLITS = ("train", "validation", "test")


class Tokens(Protocol):
    """A row of tokens: loss falls on `input_ids[prompt_length:]`, but for its `asides` if it has any (`scored`)."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...

    @property
    def prompt_length(self) -> int: ...


def scored(row: Tokens) -> list[tuple[int, int]]:
    """The stretches (start, end) of a row's ids that the loss falls on, in order."""
    asides: tuple[tuple[int, int], ...] = getattr(row, "asides", ())
    starts = [row.prompt_length, *(end for _, end in asides)]
    ends = [*(start for start, _ in asides), len(row.input_ids)]
    return list(zip(starts, ends, strict=True))


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a conversation. `more` is JSON of what a chat template reads besides: tool calls, a name."""

    role: str
    content: str
    more: str = "{}"


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its response. Examples of one group (a category, a template) never lie in two splits.

    An example that shares nothing with any other has its id as group.

    `choices` are the answers to choose among, the response one of them; empty where the answer is free. `check` is
    Python source that is run in the sandbox with a generated program as the text `PROGRAM`, and raises where that is
    wrong. Of a pair the response is preferred to `rejected`; of an unpaired preference `label` says whether the
    response is desirable.

    Of a conversation, `turns` are all of it, the last of which is the answer; `prompt` is what came before as one text,
    and `tools` is JSON of the tools that its template tells of.
    An example without a prompt is running text: all of it is the response, and no template is put around it.
    """

    id: str
    prompt: str
    response: str
    group: str
    choices: tuple[str, ...] = ()
    check: str = ""
    rejected: str = ""
    label: bool | None = None
    turns: tuple[Turn, ...] = ()
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to choose among: its text and its token ids, without the end-of-text id."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example. The loss is taken on `input_ids[prompt_length:]`, whose last id ends the response.

    `group` is what it shares with examples that it is not independent of (`sweeper.tasks.split.units`). `rejected` are
    the ids of the worse response to the same prompt, its end included; `label` is as `Example.label`. `asides` are the
    stretches after the prompt that no loss falls on: what others say between several answers.
    """

    id: str
    input_ids: tuple[int, ...]
    prompt_length: int
    choices: tuple["Choice", ...] = ()
    check: str = ""
    group: str = ""
    rejected: tuple[int, ...] = ()
    label: bool | None = None
    asides: tuple[tuple[int, int], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of its longest row, whatever is made of it."""
        return max(len(self.input_ids), self.prompt_length + len(self.rejected))

    @property
    def question(self) -> tuple[int, ...]:
        """All that comes before the last answer."""
        return self.input_ids[: self._answer_at]

    @property
    def answer(self) -> tuple[int, ...]:
        """The last answer and the id that ends it."""
        return self.input_ids[self._answer_at :]

    @property
    def _answer_at(self) -> int:
        return self.asides[-1][1] if self.asides else self.prompt_length

    @property
    def unit(self) -> str:
        """The unit of independence it belongs to: its group, or itself where it has none."""
        return self.group or self.id


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """`truncated` examples lost the left part of their prompt; the ids in `dropped` had a response too long to keep.

    `apart` examples have other tokens than the tokenizer makes of prompt and response as one text (`template.encode`).
    `majority` are the scores of the commonest training response (`sweeper.tasks.baseline`).
    `parts` are those of its tasks, where it has several; their examples are side by side in `examples`.
    """

    examples: tuple[Encoded, ...]
    truncated: int = 0
    dropped: tuple[str, ...] = field(default=())
    majority: Mapping[str, float] = field(default_factory=dict)
    apart: int = 0
    parts: Mapping[str, "EncodedSplit"] = field(default_factory=dict)
