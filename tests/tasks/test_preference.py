"""Preferences in whatever layout they come, as text and as tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks import preference
from sweeper.tasks.example import Example

Lines = Callable[..., DatasetSpec]


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """A file of these rows, as a dataset."""

    def write(rows: list[dict[str, Any]], **fields: Any) -> DatasetSpec:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain = {"name": "file", "family": "file", "path": str(path), "template": "plain", "metrics": ()}
        return DatasetSpec(**(plain | fields))

    return write


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


LAYOUTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "texts": lambda i: {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
    "implicit": lambda i: {
        "chosen": f"question {i}\n\nAssistant: good {i}",
        "rejected": f"question {i}\n\nAssistant: bad {i}",
    },
    "chats": lambda i: {
        "chosen": [user(f"question {i}"), assistant(f"good {i}")],
        "rejected": [user(f"question {i}"), assistant(f"bad {i}")],
    },
    "chats with a prompt": lambda i: {
        "prompt": f"question {i}",
        "chosen": [user(f"question {i}"), assistant(f"good {i}")],
        "rejected": [user(f"question {i}"), assistant(f"bad {i}")],
    },
    "answers of a chat": lambda i: {
        "prompt": [user(f"question {i}")],
        "chosen": [assistant(f"good {i}")],
        "rejected": [assistant(f"bad {i}")],
    },
    "sharegpt": lambda i: {
        "prompt": f"question {i}",
        "chosen": {"from": "gpt", "value": f"good {i}"},
        "rejected": {"from": "gpt", "value": f"bad {i}"},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_pair(layout: str, lines: Lines) -> None:
    spec = lines([LAYOUTS[layout](i) for i in range(30)])
    tasks.check(spec)
    assert tasks.kind(spec) == preference.PAIRS
    for part in tasks.load(spec).values():
        for example in part:
            number = example.response.removeprefix("good ")
            assert example.prompt.startswith(f"question {number}")
            assert (example.response, example.rejected) == (f"good {number}", f"bad {number}")


def test_a_prompt_is_parted_at_the_last_turn_and_else_at_a_space() -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    assert preference.pair(None, f"{talk} I see", f"{talk} I do not", "") == (talk.strip(), "I see", "I do not")
    assert preference.pair(None, "the sky is blue", "the sky is black", "") == ("the sky is", "blue", "black")


def test_unpaired_rows_have_labels(lines: Lines) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(60)]
    spec = lines(rows)
    assert tasks.kind(spec) == preference.LABELS
    found = {e.prompt: e.label for part in tasks.load(spec).values() for e in part}
    assert found == {row["prompt"]: row["label"] for row in rows}


def test_columns_have_other_names(lines: Lines) -> None:
    rows = [{"q": f"question {i}", "better": f"good {i}", "worse": f"bad {i}"} for i in range(30)]
    spec = lines(rows, columns={"prompt": "q", "chosen": "better", "rejected": "worse"})
    assert tasks.load(spec)["train"][0].rejected.startswith("bad")


def test_a_label_of_no_completion_stays_a_column_of_the_users_own(lines: Lines) -> None:
    rows = [{"prompt": f"question {i}", "response": f"answer {i}", "label": "maths", "rejected": 3} for i in range(30)]
    assert tasks.kind(lines(rows)) == preference.PLAIN
    assert all(e.label is None and not e.rejected for e in tasks.load(lines(rows))["train"])


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "a", "chosen": "b"}, "rows.jsonl:1: chosen without rejected: a preference needs both"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "rows.jsonl:1: chosen and rejected are the same"),
        ({"chosen": "one", "rejected": "two"}, "rows.jsonl:1: chosen and rejected begin with no common prompt"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "rows.jsonl:1: chosen and rejected answer different prompts ('a', 'c')",
        ),
        (
            {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("b")]},
            "rows.jsonl:1: chosen must be one question and its answer, perhaps with a system message before them; got",
        ),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "rows.jsonl:1: chosen must be text, or a list of turns"),
        ({"prompt": "a", "completion": "b", "label": "fine"}, "label must be true or false, whether the completion"),
    ],
)
def test_what_is_wrong_names_its_line(row: dict[str, Any], line: str, lines: Lines) -> None:
    with pytest.raises(DataError) as caught:
        tasks.check(lines([row]))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kinds_are_not_mixed_and_labels_not_all_alike(lines: Lines) -> None:
    pairs = [LAYOUTS["texts"](i) for i in range(20)]
    plain = [{"prompt": f"plain {i}", "response": "x"} for i in range(20)]
    with pytest.raises(DataError, match="the train split mixes"):
        tasks.load(lines(pairs + plain))
    good = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": True} for i in range(30)]
    with pytest.raises(DataError, match="all labels of the train split are alike"):
        tasks.load(lines(good))


def test_tokens_of_both_responses_survive_the_cache(lines: Lines, make_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**LAYOUTS["texts"](i), "rejected": f"quite bad {i}" * (1 + i % 3)} for i in range(30)]
    spec = lines(rows)
    made, read = (tasks.encode(spec, make_tokenizer(), model_key="", cache=tmp_path / "cache") for _ in range(2))
    assert made == read
    texts = {e.id: e for e in tasks.load(spec)["train"]}
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token
    for example in read["train"].examples:
        prompt, whole = example.input_ids[: example.prompt_length], texts[example.id]
        for ids, text in (
            (example.input_ids[example.prompt_length :], whole.response),
            (example.rejected, whole.rejected),
        ):
            assert tokenizer.decode([*prompt, *ids]) == f"{whole.prompt} {text}{end}"
        assert example.longest == len(prompt) + max(len(example.rejected), len(example.input_ids) - len(prompt))


def test_a_long_rejected_response_takes_its_room_from_the_prompt(lines: Lines, make_tokenizer: Any) -> None:
    row = {"chosen": "yes", "rejected": "no " * 5}
    spec = lines([{"prompt": "word " * 30 + str(i), **row} for i in range(30)], max_length=32)
    split = tasks.encode(spec, make_tokenizer(), model_key="", cache=None)["train"]
    assert split.truncated == len(split.examples)
    assert all(example.longest == 32 for example in split.examples)


CLOSED = [Example(str(i), f"question {i}", "abc"[i % 3], str(i), choices=("a", "b", "c")) for i in range(200)]


def test_wrong_choices_are_rejected_ones_whatever_the_order() -> None:
    pairs = preference.from_choices(CLOSED, "closed")
    assert all(pair.rejected in pair.choices and pair.rejected != pair.response for pair in pairs)
    assert {(pair.response, pair.rejected) for pair in pairs} == {(a, b) for a in "abc" for b in "abc" if a != b}
    assert set(preference.from_choices(CLOSED[::-1], "closed")) == set(pairs)


def test_a_task_without_choices_has_no_wrong_ones(lines: Lines) -> None:
    rows = [{"prompt": f"question {i}", "response": "x"} for i in range(30)]
    with pytest.raises(DataError, match="needs answers to choose among, and dataset=file has none"):
        tasks.check(lines(rows, options={"preferences": "wrong_choice"}))
    with pytest.raises(DataError, match=r"dataset.options.preferences=wrong: no such"):
        tasks.check(lines(rows, options={"preferences": "wrong"}))


def test_hub_columns_may_hold_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [LAYOUTS["chats with a prompt"](i) for i in range(30)]
    source = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: source)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    options = {"rejected": "{rejected}", "splits": {"train": "train"}}
    spec = DatasetSpec(name="hub", family="hub", path="a/b", columns={"chosen": "chosen"}, options=options)
    tasks.check(spec)
    assert tasks.kind(spec) == preference.PAIRS
    found = tasks.load(spec)["train"][0]
    assert (found.response[:4], found.rejected[:3], found.prompt[:9]) == ("good", "bad", "question ")
