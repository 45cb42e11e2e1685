"""Rows as people have them: conversations in several layouts, prompt and completion, instructions, running text.

| layout | a row has |
| --- | --- |
| chat messages | `messages`, a list of `role` and `content`; `tools` where there are any |
| ShareGPT | `conversations`, a list of `from` and `value`; a `system` text |
| prompt and completion | `prompt` and `completion`, both texts or both lists of messages |
| Alpaca | `instruction`, `output`, and where it has one `input`, `system` |
| running text | `text` |

What comes after the last turn of the assistant is left out: nobody answers it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeper.errors import DataError, unknown
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Turn

ASSISTANT = "assistant"
# what a speaker is called in one layout or another -> the role in a chat template
ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT, "chatgpt": ASSISTANT,
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
LOSSES = ("all", "last")
"""Which turns of the assistant are trained and scored (`dataset.options.loss`); without it all are."""
OPTION = "turns of the assistant in a conversation that are trained and scored: all or last"

# column of turns -> the keys of who speaks and of what is said
COLUMNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
NAMES = (*COLUMNS, "completion", "instruction", "input", "output", "system", "text", "tools")
"""What `dataset.columns` may name besides prompt and response."""


def every_turn(spec: DatasetSpec) -> bool:
    """Whether the loss falls on all turns of the assistant.

    Raises:
        DataError: `dataset.options.loss` is neither all nor last.
    """
    wanted = spec.options.get("loss", "all")
    if wanted not in LOSSES:
        raise DataError(unknown("dataset.options.loss", str(wanted), LOSSES))
    return bool(wanted == "all")


@dataclass(frozen=True, slots=True)
class Recognised:
    """A row with `prompt` and `response` among its values, if its layout is known.

    `turns` are those of a conversation and `tools` JSON of its tools; `running` text has no prompt.
    """

    values: dict[str, Any]
    turns: tuple[Turn, ...] = ()
    tools: str = ""
    running: bool = False


def recognised(row: Mapping[str, Any]) -> Recognised:
    """What a row is; one whose layout is not known comes back as it is.

    Raises:
        DataError: a conversation that cannot be read.
    """
    if _said(row, "prompt") and _said(row, "response"):
        return Recognised(dict(row))
    for name, keys in COLUMNS.items():
        if isinstance(row.get(name), list):
            return _conversation(row, _turns(row[name], name, keys, row))
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        parts = [_turns(row[name], name, COLUMNS["messages"], row) for name in ("prompt", "completion")]
        return _conversation(row, [turn for part in parts for turn in part])
    if _said(row, "prompt") and _said(row, "completion") and "label" not in row:  # which may say that it is a bad one
        return Recognised({**row, "response": row["completion"]})
    if _said(row, "instruction") and _said(row, "output"):
        prompt = "\n\n".join(row[name] for name in ("instruction", "input") if _said(row, name))
        opening = [Turn("system", row["system"])] if _said(row, "system") else []
        return _conversation(row, [*opening, Turn("user", prompt), Turn(ASSISTANT, row["output"])])
    if _said(row, "text") and not {"prompt", "response"} & row.keys():
        return Recognised({**row, "response": row["text"]}, running=True)
    return Recognised(dict(row))


def _said(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), str) and bool(row[name].strip())


def _turns(value: Sequence[Any], column: str, keys: tuple[str, str], row: Mapping[str, Any]) -> list[Turn]:
    turns = [_turn(one, f"{column}[{number}]", keys) for number, one in enumerate(value)]
    if column == "conversations" and _said(row, "system") and (not turns or turns[0].role != "system"):
        turns.insert(0, Turn("system", row["system"]))
    return turns


def _turn(value: Any, place: str, keys: tuple[str, str]) -> Turn:
    who, said = keys
    if not isinstance(value, Mapping) or who not in value:
        have = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise DataError(f"{place} must have {who} and {said}, it has {have or 'nothing'}")
    role = ROLES.get(str(value[who]))
    if role is None:
        raise DataError(f"{place}.{unknown(who, str(value[who]), ROLES)}")
    more = {key: one for key, one in value.items() if key not in keys and one is not None}
    content = value.get(said)
    if isinstance(content, list):  # parts, as models that also see have them
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}.{said} has parts that are no text")
        content = "\n".join(map(str, texts))
    if content is None and more.get("tool_calls"):
        content = ""
    if not isinstance(content, str) or not (content.strip() or more.get("tool_calls") or role == "tool"):
        raise DataError(f"{place}.{said} must be text, got {json.dumps(content, default=str)[:40]}")
    return Turn(role, content, json.dumps(more, sort_keys=True, default=str))


def _conversation(row: Mapping[str, Any], turns: Sequence[Turn]) -> Recognised:
    """A conversation up to the assistant's last turn; one question and its answer are no more than that."""
    last = max((number for number, turn in enumerate(turns) if turn.role == ASSISTANT), default=0)
    if not any(turn.role == "user" for turn in turns[:last]):
        raise DataError("the conversation has no turn of the assistant after one of the user")
    before, answer = turns[:last], turns[last]
    tools = json.dumps(row["tools"], default=str) if isinstance(row.get("tools"), list) and row["tools"] else ""
    pair = len(before) == 1 and not tools and answer.more == before[0].more == "{}"
    prompt = before[0].content if pair else "\n".join(f"{turn.role}: {turn.content}" for turn in before)
    values = {**row, "prompt": prompt, "response": answer.content or answer.more}
    return Recognised(values) if pair else Recognised(values, tuple(turns[: last + 1]), tools)
