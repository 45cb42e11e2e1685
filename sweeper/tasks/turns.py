"""A conversation's tokens, and which of them the assistant said: found in what the template writes, not guessed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeper.errors import DataError
from sweeper.tasks.example import Turn
from sweeper.tasks.template import PREAMBLE, Tokens, accepted, joined, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST_ALONE = "+dataset.options.loss=last trains the last answer alone"
_NOWHERE = "0123456789 a text that no template has 9876543210"
_HEADINGS = {"user": "Instruction", "tool": "Input"}


@dataclass(frozen=True, slots=True)
class Written:
    """The text before the last answer, the characters (start, end) of the earlier answers in it, and the last answer.

    An answer's characters include the mark that ends it, which the model has to write. `starts` says whether the
    tokenizer's own start token goes before it all.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    last: str
    starts: bool


def encode(
    template: str, turns: Sequence[Turn], system: str | None, tokenizer: "PreTrainedTokenizerBase", *, every: bool,
    tools: str = "",
) -> Tokens:  # fmt: skip
    """Tokenises a conversation whose last turn is an answer.

    An earlier answer's tokens are those that lie wholly within it. The last is tokenised as any response is
    (`sweeper.tasks.template.encode`).

    Args:
        system: goes before a conversation that has no system turn of its own.
        every: whether earlier answers are wanted (`Tokens.answers`).
        tools: JSON of the tools that the template tells of.

    Raises:
        DataError: the tokenizer has no end-of-text token or does not say which characters a token has; or the template
            writes an earlier answer otherwise than it was given.
    """
    if system is not None and turns[0].role not in ("system", "developer"):
        turns = [Turn("system", system), *turns]
    if template == "chat" and tokenizer.chat_template:
        written = _chat(turns, tokenizer, json.loads(tools or "[]"), every=every)
    else:
        written = {"chat": _alpaca, "alpaca": _alpaca, "plain": _plain}[template](turns, str(tokenizer.eos_token))
    tokens = joined(written.text, written.starts, written.last, tokenizer)
    if not every or not written.answers:
        return tokens
    if not tokenizer.is_fast:
        raise DataError(f"this model's tokenizer does not say which characters a token has: {LAST_ALONE}")
    places = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = places["offset_mapping"]
    shift = len(tokens.prompt) - len(offsets)
    found = []
    for start, end in written.answers:
        own = [i + shift for i, (first, last) in enumerate(offsets) if start <= first < last <= end]
        if own:
            found.append((own[0], own[-1] + 1))
    return Tokens(tokens.prompt, tokens.response, tokens.whole, tuple(found))


def _chat(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any], *, every: bool) -> Written:
    """The tokenizer's own chat template."""
    before = accepted([_message(turn) for turn in turns[:-1]], tokenizer, tools)
    chat = _Chat(before, tokenizer, tools)
    spoken = [number for number, one in enumerate(before) if one["role"] == "assistant"] if every else []
    last = turns[-1].content
    if turns[-1].more != "{}":  # calls of tools, which only the template can write
        whole = _Chat([*before, _message(turns[-1])], tokenizer, tools, answered=True)
        start, end = whole.span(len(before))
        last = whole.text[start:end].removesuffix(str(tokenizer.eos_token))
    return Written(chat.text, tuple(chat.span(number) for number in spoken), last, starts=False)


class _Chat:
    """A conversation as the chat template writes it."""

    def __init__(
        self, messages: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any], *,
        answered: bool = False,
    ) -> None:  # fmt: skip
        self.messages, self.tokenizer, self.tools, self.answered = messages, tokenizer, tools, answered
        self.text = self._render(messages, answered=answered)

    def span(self, number: int) -> tuple[int, int]:
        """The characters that one turn of the assistant wrote, the mark that ends it included.

        They begin where the template has the assistant speak and end where it has it stop. A template that writes
        earlier turns otherwise than the last (without a block of thinking, say) is asked where it puts another text in
        this one's place.

        Raises:
            DataError: the turn is not in the text as it was given.
        """
        before = self._render(self.messages[:number])
        through = self._render(self.messages[: number + 1], answered=True).rstrip()
        if through.startswith(before) and self.text.startswith(through):
            return len(before), len(through)
        content = self.messages[number]["content"]
        other = [*self.messages[:number], self.messages[number] | {"content": _NOWHERE}, *self.messages[number + 1 :]]
        head, _, tail = self._render(other, answered=self.answered).partition(_NOWHERE)
        for said in (content, content.strip()):
            if said and self.text == f"{head}{said}{tail}":
                marks = (token for token in self.tokenizer.all_special_tokens if tail.startswith(token))
                return len(head), len(head) + len(said) + len(next(marks, ""))
        raise DataError(
            f"the chat template changes what the assistant said in turn {number + 1}, so its tokens cannot be told: "
            f"{LAST_ALONE}, dataset.template=alpaca and plain do without the template"
        )

    def _render(self, messages: Sequence[dict[str, Any]], *, answered: bool = False) -> str:
        return render(messages, self.tokenizer, answered=answered, tools=self.tools)


def _message(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.content, **json.loads(turn.more)}


def _alpaca(turns: Sequence[Turn], end: str) -> Written:
    """Stanford Alpaca's format, turn after turn, each answer ended by the end of text."""
    opened = turns[0].role == "system"
    text = turns[0].content if opened else PREAMBLE
    return _alternating(text, turns[opened:], end, _under_heading)


def _under_heading(text: str, turn: Turn) -> str:
    return f"\n\n### {_HEADINGS.get(turn.role, turn.role.title())}:\n{turn.content}\n\n### Response:\n"


def _plain(turns: Sequence[Turn], end: str) -> Written:
    """Each turn on a line of its own, each answer ended by the end of text."""
    return _alternating("", turns, end, lambda text, turn: f"\n{turn.content}" if text else turn.content)


def _alternating(text: str, turns: Sequence[Turn], end: str, other: Callable[[str, Turn], str]) -> Written:
    answers = []
    for turn in turns[:-1]:
        if turn.role == "assistant":
            glue = "" if text[-1:].isspace() or turn.content[:1].isspace() else " "
            answers.append((len(text), len(text) + len(f"{glue}{turn.content}{end}")))
            text += f"{glue}{turn.content}{end}"
        else:
            text += other(text, turn)
    return Written(text, tuple(answers), turns[-1].content, starts=True)
