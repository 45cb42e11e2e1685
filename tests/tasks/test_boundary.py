"""Where prompt and response meet: the tokens of a continuation, and what a chat template puts between the two."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import tasks
from sweeper.spec import DatasetSpec
from sweeper.tasks import general_text
from sweeper.tasks.template import TEMPLATES, adds_start, encode, puts_space_first, remark
from tests.tasks.conftest import CHAT

SPACE = "▁"
MERGES = [(SPACE, "y"), (f"{SPACE}y", "e"), (f"{SPACE}ye", "s"), ("y", "e"), ("ye", "s"), (SPACE, SPACE), ("\n", "\n")]
CASES = [("plain", "hi", "yes"), ("plain", "hi:\n", "yes"), ("plain", "hi:", " yes"), ("alpaca", "hi", "yes"),
         ("plain", "hi\n", "  yes yes"), ("chat", "hi", "yes")]  # fmt: skip
KINDS = [("llama 2", True), ("always", True), ("first", True), ("never", False), ("gemma", False), ("t5", False)]


def sentencepiece_like(kind: str) -> Any:
    """Tokenizers that write a space as ▁, and where they put one of their own before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"\n", *string.ascii_letters, *string.digits, *string.punctuation]
    symbols = ["<unk>", "<s>", "</s>", SPACE, *letters, *("".join(pair) for pair in MERGES)]
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=MERGES, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", SPACE)
    if kind == "llama 2":
        core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    elif kind == "gemma":
        core.normalizer = spaces
    elif kind == "t5":
        pieces = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        core.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %} reply:"
    return tokenizer


def as_one(template: str, prompt: str, response: str, tokenizer: Any) -> list[int]:
    text, _ = TEMPLATES[template](prompt, None, tokenizer)
    between = "" if text[-1:].isspace() or response[:1].isspace() else " "
    return list(tokenizer(f"{text}{between}{response}", add_special_tokens=False).input_ids)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "first"), KINDS)
def test_what_is_trained_on_are_the_tokens_of_prompt_and_response_as_one_text(
    kind: str, first: bool, case: tuple[str, str, str]
) -> None:
    """No space is doubled and none is added; the prompt's tokens are those that generation starts from."""
    tokenizer = sentencepiece_like(kind)
    assert puts_space_first(tokenizer) is first
    template, prompt, response = case
    found = encode(template, prompt, response, None, tokenizer)
    text, _ = TEMPLATES[template](prompt, None, tokenizer)
    assert found.prompt == list(tokenizer(text, add_special_tokens=False).input_ids)
    assert [*found.prompt, *found.response[:-1]] == as_one(template, prompt, response, tokenizer)
    assert found.whole


def test_a_sentencepiece_model_agrees_with_its_own_library(tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    lines = ["the question is what the answer says", "yes it is", "no it is not", "### Response: say no", "maybe"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for template, prompt, response in [
        ("plain", "what", "yes it is"),
        ("alpaca", "say", "no"),
        ("plain", "q:\n", "no"),
    ]:
        found = encode(template, prompt, response, None, tokenizer)
        text, _ = TEMPLATES[template](prompt, None, tokenizer)
        whole = library.encode(f"{text}{response}" if text[-1:].isspace() else f"{text} {response}")
        assert [*found.prompt[int(adds_start(tokenizer)) :], *found.response[:-1]] == whole


def test_answers_to_choose_among_are_continuations_too(write_jsonl: Callable[..., str]) -> None:
    choices = ["yes", "no"]
    rows = [{"prompt": f"hi {i}:\n", "response": choices[i % 2], "choices": choices} for i in range(30)]
    spec = DatasetSpec(
        name="m", family="jsonl", path=write_jsonl(*rows), template="plain", metrics=("choice_accuracy",)
    )
    tokenizer = sentencepiece_like("llama 2")
    for split in tasks.encode(spec, tokenizer, model_key="m", cache=None).values():
        for example in split.examples:
            right = list(example.input_ids[example.prompt_length : -1])
            assert right in [list(choice.ids) for choice in example.choices]
            assert SPACE not in tokenizer.convert_ids_to_tokens(right)[0]


def test_general_text_has_no_doubled_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_text, "passages", lambda: (("hi.", "yes yes"),))
    tokenizer = sentencepiece_like("llama 2")
    (example,) = general_text.encode(tokenizer).examples
    assert list(example.input_ids) == list(tokenizer("hi. yes yes").input_ids)


def test_a_space_that_ends_the_prompt_stays_there_and_is_not_doubled() -> None:
    """As one text it would be part of the response's first token, which generation could not start before."""
    tokenizer = sentencepiece_like("llama 2")
    found = encode("plain", "hi ", "yes", None, tokenizer)
    assert tokenizer.convert_ids_to_tokens([*found.prompt, *found.response]) == [SPACE, "h", "i", SPACE, "yes", "</s>"]
    assert not found.whole


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_of_bytes_stay_as_they_are(case: tuple[str, str, str], prefix: bool, make_tokenizer: Any) -> None:
    """Records hold scores of these tokens: the response's are those of its text alone."""
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    template, prompt, response = case
    text, _ = TEMPLATES[template](prompt, None, tokenizer)
    between = "" if text[-1:].isspace() or response[:1].isspace() else " "
    alone = list(tokenizer(f"{between}{response}", add_special_tokens=False).input_ids)
    assert encode(template, prompt, response, None, tokenizer).response == [*alone, tokenizer.eos_token_id]


def test_tokens_that_would_be_others_as_one_text_are_remarked(write_jsonl: Callable[..., str]) -> None:
    """Two line breaks are one token, of which generation would see only the first."""
    rows = [{"prompt": f"hi {i}\n", "response": "\nyes" if i % 2 else "yes"} for i in range(30)]
    spec = DatasetSpec(name="m", family="jsonl", path=write_jsonl(*rows), template="plain")
    tokenizer = sentencepiece_like("gemma")
    splits = tasks.encode(spec, tokenizer, model_key="m", cache=None)
    (line,) = tasks.remarks(spec, tokenizer, splits)
    assert line.startswith("prompt and response are tokenised one after the other; as one text ")
    assert f"{splits['train'].apart} of 24 train" in line


OPENING = "'<start>assistant\n'"
THINKS = CHAT.replace(OPENING, "'<start>assistant\n<think>\n\n</think>\n\n'")
OPENS = CHAT.replace(OPENING, "'<start>assistant\n<think>\n'")
BARE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FINAL = CHAT.replace("m['role'] + '\n'", "m['role'] + ('<final>\n' if m['role'] == 'assistant' else '\n')")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (CHAT, None),
        (None, None),
        (
            THINKS,
            'closes a block of thinking before every answer ("<end>\\n<start>assistant\\n<think>\\n\\n</think>\\n\\n")',
        ),
        (OPENS, "opens a block of thinking before every answer"),
        (OPENS.replace("<think>", "[THINK]"), "opens a block of thinking before every answer"),
        (OPENS.replace("<think>", "<seed:think>"), "opens a block of thinking before every answer"),
        (BARE, 'answers follow "[assistant] ", the chat template itself writes them after "[assistant]"'),
        (FINAL, "answers are trained and generated after the template's prompt ("),
        ("{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + CHAT, None),
    ],
)
def test_what_a_chat_template_puts_around_an_answer_is_remarked(
    template: str | None, line: str | None, make_tokenizer: Any
) -> None:
    found = remark("chat", make_tokenizer(template))
    assert found is None if line is None else line in str(found)
    assert "\n" not in str(found)
    assert remark("plain", make_tokenizer(template)) is None
