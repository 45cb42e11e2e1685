"""What changed on disk since it was written is found, and named as such."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeper import record
from sweeper.record import Record
from sweeper.seal import BrokenSeal, seal, sealed, unsealed

OBJECTS = [{}, {"a": 1}, {"seal": 2, "a": [1, {"b": None}]}, {"text": '"}\u2028{"seal": "x",'}]


@pytest.mark.parametrize("content", OBJECTS)
@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_sealed_is_read_again(content: dict[str, object], indent: int | None) -> None:
    text = sealed(content, indent=indent)
    assert json.loads(unsealed(text)) == content
    assert isinstance(json.loads(text)["seal"], str | int)  # JSON for whoever knows of no seals


def test_a_text_of_an_earlier_version_is_read_as_it_is() -> None:
    assert unsealed('{\n "a": 1\n}\n') == '{\n "a": 1\n}\n'
    assert unsealed("no JSON") == "no JSON"


def test_no_bit_of_a_record_can_flip_unseen(make_record: Callable[..., Record], tmp_path: Path) -> None:
    written = make_record()
    path = record.write_record(tmp_path, written)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = record.read_record(tmp_path)
        except ValueError:
            assert record.status(tmp_path) is None
        else:
            assert found == written  # a blank of another kind at the end, where nothing is said


def test_a_record_that_was_edited_says_so_and_can_be_accepted(
    make_record: Callable[..., Record], tmp_path: Path
) -> None:
    path = record.write_record(tmp_path, make_record(steps=10))
    edited = path.read_text().replace('"steps": 10', '"steps": 20')
    path.write_text(edited)
    with pytest.raises(ValueError, match=r"record.json: it was edited or damaged .* delete its first line, the seal"):
        record.read_record(tmp_path)
    lines = edited.splitlines()
    assert '"seal"' in lines[1]
    path.write_text("\n".join([lines[0], *lines[2:]]))
    assert record.read_record(tmp_path).steps == 20


def test_a_record_that_cannot_be_read_is_kept_beside_the_one_that_takes_its_place(
    make_record: Callable[..., Record], tmp_path: Path
) -> None:
    path = record.write_record(tmp_path, make_record())
    path.write_text(path.read_text().replace("completed", "diverged!"))
    damaged = path.read_text()
    record.write_record(tmp_path, make_record())
    record.write_record(tmp_path, make_record(steps=3))
    (kept,) = tmp_path.glob("record.unreadable.*.json")
    assert kept.read_text() == damaged
    assert record.read_record(tmp_path).steps == 3


def test_a_seal_holds_whatever_the_lines_around_it() -> None:
    text = seal('{"a": 1}')
    assert json.loads(unsealed(f"\n{text}\n".strip())) == {"a": 1}
    with pytest.raises(BrokenSeal):
        unsealed(text.replace("1", "2"))
