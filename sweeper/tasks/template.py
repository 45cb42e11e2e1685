"""Prompt templates: the text that stands before a response, and the tokens of both."""

from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING

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
    from jinja2.exceptions import TemplateError

    user = {"role": "user", "content": prompt}
    try:
        turns = [{"role": "system", "content": system}, user] if system is not None else [user]
        text = _render(turns, tokenizer)
    except TemplateError:
        if system is None:
            raise
        text = _render([{"role": "user", "content": f"{system}\n\n{prompt}"}], tokenizer)
    return text, False


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


def tokenise(
    template: str, prompt: str, response: str, system: str | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Ids of the templated prompt and of the response with its end-of-text id.

    The two are tokenised apart, so the prompt's ids are what generation starts from, exactly. Where there is no white
    space between them, one space opens the response, as byte-pair vocabularies expect.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("this model's tokenizer has no end-of-text token (eos_token), so a response could never end")
    text, starts = TEMPLATES[template](prompt, system, tokenizer)
    if not (text[-1:].isspace() or response[:1].isspace()):
        response = f" {response}"
    before = [tokenizer.bos_token_id] if starts and adds_start(tokenizer) else []
    return [*before, *_ids(text, tokenizer)], [*_ids(response, tokenizer), tokenizer.eos_token_id]


def writes_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for today's date; it gets `TODAY`, or the tokens would change every day."""
    return "strftime_now" in str(tokenizer.chat_template)


def adds_start(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether this tokenizer puts a start token before every text (Llama does, GPT-2 and SmolLM2 do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _render(turns: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> str:
    dated = FIXED_DATE + tokenizer.get_chat_template() if writes_date(tokenizer) else None
    text = tokenizer.apply_chat_template(
        turns, chat_template=dated, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert isinstance(text, str)
    return text
