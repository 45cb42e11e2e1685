"""A user's own file: what it may hold, and one clear line for everything it may not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec

Writer = Callable[..., str]
ROW = '{"prompt": "p", "response": "r"}'


def spec(path: str | None, **fields: Any) -> DatasetSpec:
    return DatasetSpec(name="mine", family="jsonl", path=path, **fields)


def rows(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "response": f"answer {i}", **extra} for i in range(count)]


def test_a_file_is_split_and_nothing_is_lost(write_jsonl: Writer) -> None:
    path = write_jsonl(*rows(50))
    tasks.check(spec(path))
    splits = tasks.load(spec(path))
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [40, 5, 5]
    assert {e.id for part in splits.values() for e in part} == {f"line-{i}" for i in range(1, 51)}


def test_optional_fields_empty_lines_marks_and_unicode(write_jsonl: Writer) -> None:
    path = write_jsonl(
        "\ufeff" + '{"prompt": "Grüße", "response": "é", "id": 7, "note": "ignored"}',
        "",
        *[{**row, "group": i % 10} for i, row in enumerate(rows(40))],
        "  ",
        *[{"prompt": f"test {i}", "response": "r", "split": "test", "group": None} for i in range(5)],
    )
    splits = tasks.load(spec(path))
    assert {e.prompt for e in splits["test"]} == {f"test {i}" for i in range(5)}
    assert "7" in {e.id for part in splits.values() for e in part}
    assert len(splits["validation"]) == 4
    assert len({e.group for e in splits["validation"]}) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROW, '{"prompt": "p", "response": '], r"my.jsonl:2: not valid JSON \(column 29: Expecting value\)"),
        ([ROW, "", '{"prompt": "p"}'], r"my.jsonl:3: missing response; this line has the keys prompt"),
        (['{"question": "p"}'], r"my.jsonl:1: missing prompt and response; this line has the keys question"),
        (["{}"], r"my.jsonl:1: missing prompt and response; this line has the keys none"),
        (["[1, 2]"], r"my.jsonl:1: expected an object with prompt and response, got list"),
        (['{"prompt": "p", "response": " "}'], r"my.jsonl:1: response is empty"),
        (['{"prompt": "", "response": "r"}'], r"my.jsonl:1: prompt is empty"),
        (['{"prompt": "p", "response": null}'], r"my.jsonl:1: response must be text, got null"),
        (['{"prompt": "p", "response": 3}'], r"my.jsonl:1: response must be text, got 3"),
        (['{"prompt": "p", "response": "r", "split": "dev"}'], r"my.jsonl:1: split=dev: .* test, train, validation"),
        (['{"prompt": "p", "response": "r", "id": "a"}'] * 2, r"my.jsonl:2: id 'a' was already used on line 1"),
        (['{"prompt": "p", "response": "r", "choices": "r"}'], r"my.jsonl:1: choices must be a list of two texts"),
        (['{"prompt": "p", "response": "r", "choices": ["r", 2]}'], r"my.jsonl:1: choices must be text, got 2"),
        (['{"prompt": "p", "response": "r", "choices": ["a", "b"]}'], r"my.jsonl:1: .* have the response 'r' among"),
        (['{"prompt": "p", "response": "r", "choices": ["r", "r"]}'], r"my.jsonl:1: choices must be different texts"),
        ([], r"my.jsonl: the file is empty"),
        (["", "  "], r"my.jsonl: the file is empty"),
        ([ROW] * 5, r"my.jsonl: 5 examples in 1 distinct groups leave nothing for validation, test"),
        (
            [ROW, r'{"prompt": "a \ud83d b", "response": "r"}'],
            r"my.jsonl:2: prompt holds half of a surrogate pair \(\\ud83d",
        ),
        (
            [r'{"prompt": "p", "response": "\udc00"}'],
            r"my.jsonl:1: response holds half .* at character 1\), which is no",
        ),
        ([r'{"prompt": "p", "response": "r", "choices": ["r", "\udc00"]}'], r"my.jsonl:1: choices holds half"),
        (["[" * 100_000], r"my.jsonl:1: not valid JSON"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(lines: list[str], message: str, write_jsonl: Writer) -> None:
    path = write_jsonl(*lines)
    for act in (tasks.check, tasks.load):
        with pytest.raises(DataError, match=message) as caught:
            act(spec(path))
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset=mine needs a file: dataset.path=my.jsonl"):
        tasks.check(spec(None))
    with pytest.raises(DataError, match=r"dataset.path=nowhere.jsonl: no such file \(looked for /"):
        tasks.check(spec("nowhere.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        tasks.check(spec(str(tmp_path)))
    (tmp_path / "latin.jsonl").write_bytes(ROW.encode() + b'\n{"prompt": "\xe9", "response": "r"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not UTF-8 text \(byte 13 of the line\)"):
        tasks.check(spec(str(tmp_path / "latin.jsonl")))


def test_choices_and_checks_come_along(write_jsonl: Writer) -> None:
    path = write_jsonl(*rows(30, choices=["no"], check="assert PROGRAM"))
    with pytest.raises(DataError, match="choices must be a list of two texts and more"):
        tasks.check(spec(path))
    made = [{**row, "choices": ["no", row["response"]], "check": "assert PROGRAM"} for row in rows(30)]
    found = [e for part in tasks.load(spec(write_jsonl(*made))).values() for e in part]
    assert all(e.choices == ("no", e.response) and e.check == "assert PROGRAM" for e in found)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("choice_accuracy", "dataset.metrics=choice_accuracy needs answers to choose among, and example last has none"),
        ("macro_f1", "dataset.metrics=macro_f1 needs answers to choose among"),
        ("pass_at_1", "dataset.metrics=pass_at_1 needs a check of every program, and last has none"),
    ],
)
def test_a_metric_whose_need_one_line_does_not_meet_is_refused(metric: str, message: str, write_jsonl: Writer) -> None:
    """Without a check any program would pass, and without choices there is nothing to choose."""
    whole = rows(30, choices=[f"answer {i}" for i in range(30)], check="assert True")
    path = write_jsonl(*whole, {"prompt": "another", "response": "one", "id": "last"})
    asked = spec(path, metrics=(metric,), max_new_tokens=4)
    with pytest.raises(DataError, match=message):
        tasks.check(asked)
    with pytest.raises(DataError, match=message):
        tasks.load(asked)
    tasks.check(spec(write_jsonl(*whole), metrics=(metric,), max_new_tokens=4))
