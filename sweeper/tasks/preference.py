"""Preferences: pairs of a better and a worse response to a prompt, or responses that are labelled good or bad.

A pair is an example whose `response` is the preferred one, with the other as `rejected`; so it can be trained on by its
response alone as well. Rows of files and hub sets have them as `chosen` and `rejected`, with a `prompt` or without one:
then it is what both begin with. Each may be text or a chat of one question and its answer. Unpaired rows have `prompt`,
`completion` and `label`.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sweeper.errors import DataError, unknown
from sweeper.tasks import conversation
from sweeper.tasks.example import Example

PAIRED, UNPAIRED = ("chosen", "rejected"), ("completion", "label")
COLUMNS = (*PAIRED, *UNPAIRED)
PLAIN, PAIRS, LABELS = "plain", "pairs", "labels"  # kinds of examples
SOURCES = ("none", "wrong_choice")
OPTION = "preferences"
OPTION_MEANING = "wrong_choice pairs every answer with a wrong one of its choices, as preferred and rejected"
# how a turn of the assistant begins in transcripts that are one text
TURNS = ("\n\nAssistant:", "\nAssistant:", "<|assistant|>", "### Response:")
WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_USERS = [name for name, role in conversation.ROLES.items() if role == "user"]
_ASSISTANTS = [name for name, role in conversation.ROLES.items() if role == conversation.ASSISTANT]


def kind(example: Example) -> str:
    """What an example can be trained on as: a response, a pair, or a labelled response."""
    return PAIRS if example.rejected else LABELS if example.label is not None else PLAIN


def unfolded(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row with prompt and response where it has preferences, else as it is; and the fields of `Example` they give.

    Raises:
        DataError: it has preferences that cannot be read.
    """
    row = dict(row)
    if row.get("response") is not None:
        return row, {}
    given = [name for name in PAIRED if row.get(name) is not None]
    if len(given) == 1:
        (lacking,) = set(PAIRED) - set(given)
        raise DataError(f"{where}: {given[0]} without {lacking}: a preference needs both")
    if given:
        prompt, better, worse = pair(row.get("prompt"), row.pop("chosen"), row.pop("rejected"), where)
        return {**row, "prompt": prompt, "response": better}, {"rejected": worse}
    if row.get("completion") is not None and row.get("label") is not None:
        prompt, response = _exchange(row.get("prompt"), row.pop("completion"), "completion", where)
        label = _label(row.pop("label"), where)
        return {**row, "prompt": prompt, "response": response}, {"label": label}
    return row, {}


def pair(prompt: Any, chosen: Any, rejected: Any, where: str) -> tuple[str, str, str]:
    """Prompt, better and worse response as text.

    Args:
        prompt: text, a chat up to the answer, or None where chosen and rejected hold it.
        chosen, rejected: the responses, or all of the text or chat.

    Raises:
        DataError: they have no prompt in common, or are equal.
    """
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _parted(chosen, rejected, where)
    question, better = _exchange(prompt, chosen, "chosen", where)
    other, worse = _exchange(prompt, rejected, "rejected", where)
    if question != other:
        raise DataError(f"{where}: chosen and rejected answer different prompts ({question[:30]!r}, {other[:30]!r})")
    if better.strip() == worse.strip():
        raise DataError(f"{where}: chosen and rejected are the same, so neither is preferred: leave the line out")
    return question, better, worse


def _parted(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The prompt that two texts begin with, to its last turn or its last white space, and what follows in each."""
    alike = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(chosen, rejected, strict=False))
    common = chosen[: sum(1 for _ in alike)]
    ends = [place + len(turn) for turn in TURNS if (place := common.rfind(turn)) >= 0]
    end = max(ends, default=max(common.rfind(" "), common.rfind("\n")))
    if end <= 0 or not common[:end].strip():
        raise DataError(f"{where}: chosen and rejected begin with no common prompt: give it as prompt")
    return common[:end].strip(), chosen[end:].strip(), rejected[end:].strip()


def _exchange(prompt: Any, answer: Any, name: str, where: str) -> tuple[str, str]:
    """Question and answer as text, of texts or chats."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    turns = [*_turns(prompt, "prompt", where), *_turns(answer, name, where)]
    if isinstance(answer, str):
        turns.append(("assistant", answer))
    if isinstance(prompt, str) and prompt.strip() not in [text.strip() for who, text in turns if who == "user"]:
        turns.insert(0, ("user", prompt))
    speakers = [who for who, _ in turns]
    if speakers[-2:] != ["user", "assistant"] or speakers[:-2] not in ([], ["system"]):
        raise DataError(
            f"{where}: {name} must be one question and its answer, perhaps with a system message before them; got the "
            f"turns {', '.join(speakers) or 'none'}"
        )
    question = "\n\n".join(text for _, text in turns[:-1])
    return question, turns[-1][1]


def _turns(value: Any, name: str, where: str) -> list[tuple[str, str]]:
    """Who speaks and what is said in each turn of a chat; nothing of a text."""
    if value is None or isinstance(value, str):
        return []
    turns = [value] if isinstance(value, Mapping) else value
    found = []
    for turn in turns if isinstance(turns, Sequence) else [turns]:
        for who, said in conversation.COLUMNS.values():
            if isinstance(turn, Mapping) and isinstance(turn.get(who), str) and isinstance(turn.get(said), str):
                speaker = turn[who]
                role = "user" if speaker in _USERS else "assistant" if speaker in _ASSISTANTS else speaker
                found.append((role, turn[said]))
                break
        else:
            raise DataError(f"{where}: {name} must be text, or a list of turns with role and content")
    return found


def _label(value: Any, where: str) -> bool:
    found = WORDS.get(str(value).strip().lower())
    if found is None:
        raise DataError(f"{where}: label must be true or false, whether the completion is good, got {value!r}")
    return found


def kind_of(fields: Mapping[str, Any]) -> str:
    """As `kind`, of the fields that `unfolded` gives."""
    return PAIRS if "rejected" in fields else LABELS if "label" in fields else PLAIN


def check_option(value: Any) -> None:
    """Raises DataError for a `dataset.options.preferences` that there is not."""
    if value not in SOURCES:
        raise DataError(unknown("dataset.options.preferences", str(value), SOURCES))


def from_choices(examples: Sequence[Example], name: str) -> tuple[Example, ...]:
    """Every example as a pair of its answer and one of the wrong choices, drawn by its id.

    Raises:
        DataError: the task has no answers to choose among.
    """
    for example in examples:
        if len(example.choices) < 2:
            raise DataError(
                f"dataset.options.preferences=wrong_choice needs answers to choose among, and dataset={name} has none: "
                "give a dataset with choices (icd10_chapter, hpo_term), or a file with prompt, chosen and rejected"
            )
    return tuple(dataclasses.replace(example, rejected=_wrong(example)) for example in examples)


def _wrong(example: Example) -> str:
    wrong = [choice for choice in example.choices if choice != example.response]
    drawn = int.from_bytes(hashlib.sha256(f"wrong choice/{example.id}".encode()).digest()[:8], "big")
    return wrong[drawn % len(wrong)]


def check_split(name: str, examples: Sequence[Example]) -> None:
    """Raises DataError where a split mixes kinds of examples, or its labels are all alike."""
    found = {kind(example): example.id for example in examples}
    if len(found) > 1:
        shown = ", ".join(f"{one} ({example})" for one, example in found.items())
        raise DataError(f"the {name} split mixes {shown}: give all lines the same columns")
    if found.keys() == {LABELS} and len({example.label for example in examples}) < 2:
        raise DataError(f"all labels of the {name} split are alike: an unpaired preference needs good and bad ones")
