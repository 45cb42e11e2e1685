"""Conversations, instructions and running text: what is read of each layout, and which tokens the loss falls on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks import conversation, turns
from sweeper.tasks.example import Encoded, Turn, scored
from sweeper.tasks.template import tokenise

Make = Callable[..., Any]
U, A, S = "user", "assistant", "system"
CHAT = [{"role": S, "content": "Be short."}, {"role": U, "content": "Hi #"}, {"role": A, "content": "Hello."},
        {"role": U, "content": "Bye"}, {"role": A, "content": "So long."}]  # fmt: skip

# as templates of reasoning models do: an empty thought opens the answer to come, and earlier ones lose theirs
THINKS = (
    "{% for m in messages %}<start>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>\n{% endif %}{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n<think></think>\n{% endif %}"
)
SHOUTS = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] if loop.last else m['content'].upper() }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool['name'] }}\n{% endfor %}"
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['name'] }}</call>{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def spec(path: str, **fields: Any) -> DatasetSpec:
    return DatasetSpec(name="mine", family="jsonl", path=path, **fields)


def numbered(row: dict[str, Any], count: int = 20) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(row).replace("#", str(n))) for n in range(count)]


def one(row: dict[str, Any], write: Callable[..., str], **fields: Any) -> tasks.Example:
    """The example of a file's first row."""
    dataset = spec(write(*numbered(row)), **fields)
    tasks.check(dataset)
    return next(e for part in tasks.load(dataset).values() for e in part if e.id == "line-1")


def said(example: Encoded, tokenizer: Any) -> list[str]:
    """The text of each stretch that the loss falls on."""
    return [tokenizer.decode(list(example.input_ids[start:end])) for start, end in scored(example)]


def encoded(row: dict[str, Any], write: Callable[..., str], tokenizer: Any, **fields: Any) -> Encoded:
    splits = tasks.encode(spec(write(*numbered(row)), **fields), tokenizer, model_key="test", cache=None)
    return next(e for split in splits.values() for e in split.examples if e.id == "line-1")


@pytest.mark.parametrize(
    ("row", "prompt", "response", "several"),
    [
        ({"messages": CHAT}, "system: Be short.\nuser: Hi 0\nassistant: Hello.\nuser: Bye", "So long.", True),
        ({"messages": [*CHAT[1:3], CHAT[3]]}, "Hi 0", "Hello.", False),
        ({"messages": [{"role": U, "content": [{"type": "text", "text": "Hi #"}]}, CHAT[2]]}, "Hi 0", "Hello.", False),
        ({"conversations": [{"from": "human", "value": "Hi #"}, {"from": "gpt", "value": "Yo"}]}, "Hi 0", "Yo", False),
        (
            {"system": "Be.", "conversations": [{"from": "human", "value": "#"}, {"from": "gpt", "value": "Yo"}]},
            "system: Be.\nuser: 0", "Yo", True,
        ),
        ({"prompt": [CHAT[1]], "completion": [CHAT[2]]}, "Hi 0", "Hello.", False),
        ({"prompt": "Hi #", "completion": "Yo"}, "Hi 0", "Yo", False),
        ({"instruction": "Add.", "input": "# and 1", "output": "x"}, "Add.\n\n0 and 1", "x", False),
        ({"instruction": "Say #.", "input": "", "output": "x"}, "Say 0.", "x", False),
        ({"text": "Once # upon a time"}, "", "Once 0 upon a time", False),
        ({"prompt": "p #", "response": "r", "messages": CHAT}, "p 0", "r", False),
    ],
)  # fmt: skip
def test_the_layouts_that_people_have(
    row: dict[str, Any], prompt: str, response: str, several: bool, write_jsonl: Callable[..., str]
) -> None:
    found = one(row, write_jsonl)
    assert (found.prompt, found.response, bool(found.turns)) == (prompt, response, several)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [CHAT[1]]}, r"my.jsonl:2: the conversation has no turn of the assistant after one of the user"),
        ({"messages": [CHAT[2]]}, r"my.jsonl:2: the conversation has no turn of the assistant"),
        ({"messages": []}, r"my.jsonl:2: the conversation has no turn"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"my.jsonl:2: messages\[0\].role=usr: .*Did you mean user\?"),
        ({"messages": ["x"]}, r"my.jsonl:2: messages\[0\] must have role and content, it has str"),
        ({"messages": [{"from": "user"}]}, r"my.jsonl:2: messages\[0\] must have role and content, it has from"),
        ({"messages": [{"role": U, "content": 3}]}, r"my.jsonl:2: messages\[0\].content must be text, got 3"),
        ({"messages": [{"role": U, "content": [{"image": ""}]}]}, r"my.jsonl:2: messages\[0\].content has parts that"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, r"my.jsonl:2: the conversation has no turn"),
        ({"text": " "}, r"my.jsonl:2: missing prompt and response; this line has the keys text"),
    ],
)
def test_what_cannot_be_read_names_its_line(row: dict[str, Any], message: str, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=message):
        tasks.check(spec(write_jsonl({"messages": CHAT}, row)))


def test_a_question_and_its_answer_are_the_same_tokens_in_every_layout(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    layouts = [
        {"prompt": "Hi #", "response": "Yo"}, {"prompt": "Hi #", "completion": "Yo"},
        {"messages": [{"role": U, "content": "Hi #"}, {"role": A, "content": "Yo"}]},
        {"conversations": [{"from": "human", "value": "Hi #"}, {"from": "gpt", "value": "Yo"}]},
        {"instruction": "Hi #", "output": "Yo"},
    ]  # fmt: skip
    tokenizer = make_tokenizer()
    assert len({encoded(row, write_jsonl, tokenizer) for row in layouts}) == 1


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_the_loss_falls_on_what_the_assistant_said_and_how_it_ended(
    template: str, write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer()
    found = encoded({"messages": CHAT}, write_jsonl, tokenizer, template=template)
    texts = said(found, tokenizer)
    assert [text.strip() for text in texts] == ["Hello.<end>", "So long.<end>"]
    assert tokenizer.decode(list(found.answer)) == texts[-1]
    assert found.question + found.answer == found.input_ids
    whole = tokenizer.decode(list(found.input_ids))
    assert [whole.index(text) for text in ("Be short.", "Hi 0", "Hello.", "Bye", "So long.")] == sorted(
        whole.index(text) for text in ("Be short.", "Hi 0", "Hello.", "Bye", "So long.")
    )


def test_the_last_answer_alone(write_jsonl: Callable[..., str], make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    every = encoded({"messages": CHAT}, write_jsonl, tokenizer)
    last = encoded({"messages": CHAT}, write_jsonl, tokenizer, options={"loss": "last"})
    assert every.input_ids == last.input_ids
    assert said(last, tokenizer) == ["So long.<end>"]
    assert (last.question, last.answer) == (every.question, every.answer)
    with pytest.raises(DataError, match=r"dataset.options.loss=lst: .*Did you mean last\?"):
        tasks.check(spec(write_jsonl(*numbered({"messages": CHAT})), options={"loss": "lst"}))


def test_a_template_that_writes_earlier_answers_otherwise(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    """What is trained in an earlier turn is what the template puts there: no thought was there to be written."""
    tokenizer = make_tokenizer(THINKS)
    assert said(encoded({"messages": CHAT}, write_jsonl, tokenizer), tokenizer) == ["Hello.<end>", "So long.<end>"]


def test_words_of_an_answer_that_stand_elsewhere_too_are_not_taken_for_it(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    echo = [{"role": U, "content": "a # a"}, {"role": A, "content": "a"}, {"role": U, "content": "a"},
            {"role": A, "content": "a"}]  # fmt: skip
    tokenizer = make_tokenizer(THINKS)
    found = encoded({"messages": echo}, write_jsonl, tokenizer)
    assert said(found, tokenizer) == ["a<end>", "a<end>"]
    before = tokenizer.decode(list(found.input_ids[: found.prompt_length]))
    assert before == "<start>user\na 0 a<end>\n<start>assistant\n"


def test_a_template_that_changes_what_was_said_is_refused(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(SHOUTS)
    with pytest.raises(DataError, match=r"my.jsonl:\d+: the chat template changes .* turn 3, .*loss=last"):
        encoded({"messages": CHAT}, write_jsonl, tokenizer)
    last = encoded({"messages": CHAT}, write_jsonl, tokenizer, options={"loss": "last"})
    assert said(last, tokenizer) == ["So long.<end>"]


def test_a_system_turn_that_the_template_refuses_goes_to_the_user(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    from tests.tasks.conftest import NO_SYSTEM

    tokenizer = make_tokenizer(NO_SYSTEM)
    found = encoded({"messages": CHAT}, write_jsonl, tokenizer)
    assert said(found, tokenizer) == ["Hello.<end>", "So long.<end>"]
    assert "user\nBe short.\n\nHi 0<end>" in tokenizer.decode(list(found.input_ids))


def test_the_datasets_own_system_text_goes_before_conversations_without_one(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer()
    ours = encoded({"messages": CHAT}, write_jsonl, tokenizer, system="Be long.")
    theirs = encoded({"messages": CHAT[1:]}, write_jsonl, tokenizer, system="Be long.")
    assert "Be long." not in tokenizer.decode(list(ours.input_ids))
    assert tokenizer.decode(list(theirs.input_ids)).startswith("<start>system\nBe long.<end>\n")


def test_tools_and_their_calls_are_written_by_the_template(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    call = {"role": A, "content": None, "tool_calls": [{"name": "add"}]}
    row = {"messages": [CHAT[1], call, {"role": "tool", "content": "3"}, CHAT[2]], "tools": [{"name": "add"}]}
    tokenizer = make_tokenizer(TOOLS)
    found = encoded(row, write_jsonl, tokenizer)
    assert tokenizer.decode(list(found.input_ids)).startswith("add\n<start>user")
    assert said(found, tokenizer) == ["<call>add</call><end>", "Hello.<end>"]
    calls = encoded({"messages": [CHAT[1], call], "tools": [{"name": "add"}]}, write_jsonl, tokenizer)
    assert said(calls, tokenizer) == ["<call>add</call><end>"]


def test_a_cut_conversation_loses_its_earlier_answers_whole(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(starts=True)
    full = encoded({"messages": CHAT}, write_jsonl, tokenizer)
    start, _ = scored(full)[0]
    for lost in (1, start, start + 1, start + 5):
        cut = encoded({"messages": CHAT}, write_jsonl, tokenizer, max_length=len(full.input_ids) - lost)
        assert said(cut, tokenizer) == ["Hello.<end>", "So long.<end>"][lost > start - 1 :]
        assert cut.answer == full.answer


def test_running_text_is_trained_from_its_start(write_jsonl: Callable[..., str], make_tokenizer: Make) -> None:
    for starts in (True, False):
        tokenizer = make_tokenizer(starts=starts)
        found = encoded({"text": "Once # upon"}, write_jsonl, tokenizer)
        whole = "<s>Once 0 upon<end>" if starts else "Once 0 upon<end>"
        assert tokenizer.decode(list(found.input_ids)) == whole
        assert found.prompt_length == 1


def test_a_slow_tokenizer_can_train_the_last_answer(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    chat = [Turn(m["role"], m["content"].replace("#", "0")) for m in CHAT]
    with pytest.raises(DataError, match=r"does not say which characters a token has: \+dataset.options.loss=last"):
        turns.encode("chat", chat, None, tokenizer, every=True)
    assert turns.encode("chat", chat, None, tokenizer, every=False).answers == ()


def test_stretches_survive_the_cache(write_jsonl: Callable[..., str], make_tokenizer: Make, tmp_path: Path) -> None:
    dataset, tokenizer = spec(write_jsonl(*numbered({"messages": CHAT}))), make_tokenizer()
    made = tasks.encode(dataset, tokenizer, model_key="test", cache=tmp_path)
    assert made["train"].examples[0].asides
    assert tasks.encode(dataset, tokenizer, model_key="test", cache=tmp_path) == made


def test_smollm2_writes_conversations_as_it_was_trained(root: Path) -> None:
    """On the real tokenizer and template, every answer and its end are found, token for token."""
    from omegaconf import OmegaConf

    from sweeper import models
    from sweeper.spec import ModelSpec, from_mapping

    preset = OmegaConf.to_container(OmegaConf.load(root / "conf/model/smollm2_135m.yaml"))
    tokenizer = models.load_tokenizer(from_mapping(ModelSpec, preset))
    chat = [Turn(m["role"], m["content"]) for m in CHAT]
    found = turns.encode("chat", chat, None, tokenizer, every=True)
    ((start, end),) = found.answers
    assert tokenizer.decode(found.prompt[start:end]) == "Hello.<|im_end|>"
    assert found.prompt[start:end] == tokenise("chat", "x", "Hello.", None, tokenizer)[1]
    assert tokenizer.decode(found.response) == "So long.<|im_end|>"


def test_options_are_those_of_families_with_conversations() -> None:
    assert {name for name, family in tasks.FAMILIES.items() if "loss" in family.OPTIONS} == {"file", "hub", "jsonl"}
    assert conversation.LOSSES == ("all", "last")
