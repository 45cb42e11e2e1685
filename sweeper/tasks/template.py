"""Prompt templates: the text before a response, and the tokens of both."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from sweeper.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what templates that write a date are told: the day that Llama 3's gives where it cannot ask
TODAY = date(2024, 7, 26)
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdDeFHIjklmMpSTuwxXyYzZ" for flag in ("-", "")]
# a macro in the place of the function, which cannot be given: transformers passes plain data to templates
FIXED_DATE = (
    "{%- macro strftime_now(format='%c') -%}{{- format"
    + "".join(f"|replace({text!r}, {TODAY.strftime(text)!r})" for text in _DIRECTIVES)
    + " -}}{%- endmacro %}{{- '' }}"
)
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def chat(prompt: str, system: str | None, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, bool]:
    """The tokenizer's own chat template, up to where the assistant speaks; without one, the alpaca template.

    A template that refuses a system turn (Gemma 2) gets the system text as the first paragraph of the user's turn.
    Templates that can think aloud (Qwen 3) are told not to.
    """
    if not tokenizer.chat_template:
        return alpaca(prompt, system, tokenizer)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return render(accepted([*messages, {"role": "user", "content": prompt}], tokenizer), tokenizer), False


def alpaca(prompt: str, system: str | None, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, bool]:
    """Stanford Alpaca's instruction format (Taori et al. 2023); `system` replaces its opening sentence."""
    return f"{PREAMBLE if system is None else system}\n\n### Instruction:\n{prompt}\n\n### Response:\n", True


def plain(prompt: str, system: str | None, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, bool]:
    """The prompt itself, on a line of its own below `system` where there is one."""
    return (prompt if system is None else f"{system}\n{prompt}"), True


# (prompt, system, tokenizer) -> (text before the response, whether the tokenizer's own start token goes before it)
TEMPLATES: dict[str, Callable[[str, str | None, "PreTrainedTokenizerBase"], tuple[str, bool]]] = {
    "chat": chat,
    "alpaca": alpaca,
    "plain": plain,
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids of a templated prompt and of its response, with its end-of-text id.

    `whole` says whether the two are what the tokenizer makes of their text as one; `answers` are the places
    (start, end) of earlier answers among the prompt's ids.
    """

    prompt: list[int]
    response: list[int]
    whole: bool
    answers: tuple[tuple[int, int], ...] = ()


def encode(
    template: str, prompt: str, response: str, system: str | None, tokenizer: "PreTrainedTokenizerBase"
) -> Tokens:
    """Tokenises a prompt and its response.

    The prompt's ids are what generation starts from, so they are those of the prompt alone. Where there is no white
    space between the two, one space opens the response, as byte-pair vocabularies expect. The response's ids are those
    of a continuation: a tokenizer that puts a space before every text (SentencePiece's of Llama 2, Mistral, T5) puts
    none there.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    return joined(*TEMPLATES[template](prompt, system, tokenizer), response, tokenizer)


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenises running text, which is trained but for what it starts from: the start token, else its own first.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    ids = [*([tokenizer.bos_token_id] if adds_start(tokenizer) else []), *ids_of(text, tokenizer)]
    return Tokens(ids[:1], [*ids[1:], end_of_text(tokenizer)], whole=True)


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends a response.

    Raises:
        DataError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("this model's tokenizer has no end-of-text token (eos_token), so a response could never end")
    return int(tokenizer.eos_token_id)


def joined(text: str, starts: bool, response: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """The tokens of a templated text and of the response to it; `starts` puts the start token before them.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    end = end_of_text(tokenizer)
    if not (text[-1:].isspace() or response[:1].isspace()):
        response = f" {response}"
    before = [tokenizer.bos_token_id] if starts and adds_start(tokenizer) else []
    ids, after = ids_of(text, tokenizer), continuation(text, response, tokenizer)
    whole = [*ids, *after] == ids_of(f"{text}{response}", tokenizer)
    return Tokens([*before, *ids], [*after, end], whole)


def tokenise(
    template: str, prompt: str, response: str, system: str | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """As `encode`, the ids alone."""
    found = encode(template, prompt, response, system, tokenizer)
    return found.prompt, found.response


def continuation(before: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a text that continues another one, whose own ids do not change."""
    if not puts_space_first(tokenizer):
        return ids_of(text, tokenizer)
    for context in (before, "\n"):  # the last character and the first of the text may be one token
        start, joint = ids_of(context, tokenizer), ids_of(f"{context}{text}", tokenizer)
        if joint[: len(start)] == start:
            return joint[len(start) :]
    return ids_of(text, tokenizer)


def puts_space_first(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer prepends a space to every text, as many SentencePiece tokenizers do.

    Tokenizers of bytes (GPT-2, Llama 3, Qwen) count as not doing so, though a few can be told to: their tokens stay.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = getattr(backend, "pre_tokenizer", None)
    if pieces is not None and any("Ġ" in piece for piece, _ in pieces.pre_tokenize_str(" a")):
        return False
    line, joint = ids_of("\n", tokenizer), ids_of("\na", tokenizer)
    return joint[: len(line)] == line and joint[len(line) :] != ids_of("a", tokenizer)


def remark(template: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A caveat about what the chat template adds around an answer; None if there is none.

    It is rendered once as a prompt to answer and once as a conversation with an answer.
    """
    if template != "chat" or not tokenizer.chat_template:
        return None
    from jinja2.exceptions import TemplateError

    user, answer = {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
    try:
        ours = render([user], tokenizer)
        written = render([user, answer], tokenizer, answered=True)
    except (TemplateError, TypeError, ValueError):
        return None  # a template that cannot hold an answer
    opening = ours.rpartition("QUESTION")[2]
    tags = _THINKING.findall(opening)
    if tags and tags[-1].startswith(("</", "[/")):
        return f"the chat template closes a block of thinking before every answer ({_shown(opening)}): none is trained"
    if tags:
        return (
            f"the chat template opens a block of thinking before every answer ({_shown(opening)}) and does not close "
            "it: answers are trained and generated inside it"
        )
    head, found, _ = written.rpartition("QUESTION")[2].partition("ANSWER")
    ours = opening if opening[-1:].isspace() else f"{opening} "
    if not found or head == ours:
        return None
    if head.rstrip() == ours.rstrip():
        return f"answers follow {_shown(ours)}, the chat template itself writes them after {_shown(head)}"
    return (
        f"answers are trained and generated after the template's prompt ({_shown(ours)}), not as it writes a "
        f"conversation ({_shown(head)})"
    )


_THINKING = re.compile(r"</?[^<>\s]*think[^<>\s]*>|\[/?think\]", re.IGNORECASE)


def _shown(text: str) -> str:
    return json.dumps(text[-60:], ensure_ascii=False)


def writes_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for today's date; it gets `TODAY`, or the tokens would change every day."""
    return "strftime_now" in str(tokenizer.chat_template)


def adds_start(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether this tokenizer prepends a start token to every text (Llama does, GPT-2 and SmolLM2 do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def ids_of(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of a text alone, without a start token."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def accepted(
    messages: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """The messages; those of the system go into the user's where the template refuses a system turn.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation for another reason.
    """
    from jinja2.exceptions import TemplateError

    try:
        render(messages, tokenizer, tools=tools)
    except TemplateError:
        if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
            raise
        system, user, *rest = messages
        return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]
    return list(messages)


def render(
    messages: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", *, answered: bool = False,
    tools: Sequence[Any] = (),
) -> str:  # fmt: skip
    """The chat template's text; not `answered`, up to where the assistant speaks next.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation.
    """
    dated = FIXED_DATE + tokenizer.get_chat_template() if writes_date(tokenizer) else None
    text = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, chat_template=dated, tokenize=False,
        add_generation_prompt=not answered, enable_thinking=False,
    )  # fmt: skip
    assert isinstance(text, str)
    return text
