"""Any change to any file of a study, or to a table that is imported: an analysis or one line, never a traceback."""

import json
import random
import shutil
import string
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from sweeper.record import COMMANDS, METRICS, PREDICTIONS, RECORD, SEARCHES, SPECTRA
from tests import fuzzing
from tests.analysis.synthetic import write_study
from tests.analysis.test_library import write as write_library

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1e308, float("nan"), float("inf"), "", "x", "=1+1", "../x", "<script>", "\ud800", "é\0",
    [], [1], [[]], {}, {"a": 1}, {"nll": "x"}, "9" * 400,
)  # fmt: skip
BYTES = (b"", b"\0", b"\xff", b"{", b"]", b'"', b"\n", b"NaN", b"1e999", b"[" * 3000, b'{"a":' * 3000)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has every kind of file, and a published table beside it."""
    top = tmp_path_factory.mktemp("pristine")
    study = write_study(top / "s", ranks=(4,), seeds=(0, 1), examples=8, steps=3, spectra=True, evaluations=2)
    write_library(study)
    (study / SEARCHES).write_text(json.dumps({"a": {"widened": 1}}))
    (study / COMMANDS).write_text(json.dumps({"typed": "train.py", "time": "2026-01-01"}) + "\n")
    rows = [{"method": "lora", "rank": rank, "nll": 1.5, "metrics": {"exact_match": 0.5}} for rank in (4, 8)]
    (top / "table.json").write_text(json.dumps({"model": "m", "rows": rows}))
    names = {path.name for path in top.rglob("*") if path.is_file()}
    assert names >= {RECORD, METRICS, PREDICTIONS, SPECTRA, SEARCHES, COMMANDS, "abc.json", "abc.jsonl", "table.json"}
    return top


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def with_other_values(text: str, rng: random.Random) -> str:
    """JSON, or a line of JSON lines, with a value replaced by one of another kind, left out or put in twice."""
    lines = text.splitlines() if "}\n{" in text else [text]
    number = rng.randrange(len(lines))
    plain = json.loads(lines[number])
    for _ in range(rng.randint(1, 3)):
        if not (every := list(places(plain))):
            break
        *way, last = rng.choice(every)
        node = plain
        for key in way:
            node = node[key]
        what = rng.random()
        if what < 0.7:
            node[last] = rng.choice(ODD)
        elif what < 0.85 and isinstance(node, dict):
            del node[last]
        elif isinstance(node, dict):
            node["".join(rng.choices(string.printable, k=5))] = node[last]
    lines[number] = json.dumps(plain)
    return "\n".join(lines)


def with_other_bytes(content: bytes, rng: random.Random) -> bytes:
    """A content that is cut, has bytes put in, or a bit turned."""
    place = rng.randrange(len(content) + 1)
    match rng.randrange(3):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + rng.choice(BYTES) + content[place:]
        case _ if content:
            changed = bytearray(content)
            changed[place % len(content)] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case _:
            return b"x"


def change(path: Path, rng: random.Random) -> str:
    """Changes a file, by its values or by its bytes; what it holds then, with its name."""
    content = path.read_bytes()
    try:
        made = with_other_values(content.decode(), rng).encode("utf-8", "surrogatepass")
    except ValueError:
        made = content
    if made == content or rng.random() < 0.3:
        made = with_other_bytes(content, rng)
    path.write_bytes(made)
    return f"{path.name}: {made!r}"


def analysed(pristine: Path, folder: Path, rng: random.Random) -> tuple[str, int, str | None]:
    """Changes one to three files of a copy and analyses it: the change, the exit code, and what was raised."""
    shutil.copytree(pristine, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rare = [path for path in files if path.name not in (RECORD, METRICS, PREDICTIONS, SPECTRA)]
    changed = [change(rng.choice(files if rng.random() < 0.6 else rare), rng) for _ in range(rng.randint(1, 3))]
    asked = [str(folder / "s"), "--out", str(folder / "out"), "--no-figures", "--draws", "3"]
    if rng.random() < 0.3:
        asked += ["--import", str(folder / "table.json")]
    if rng.random() < 0.1:
        asked += ["--export", rng.choice(["csv", "peft"])]
    try:
        return "; ".join(changed), main(asked), None
    except BaseException as error:
        return "; ".join(changed), 1, "".join(traceback.format_exception(error))
    finally:
        shutil.rmtree(folder)


def looked_for(pristine: Path, folder: Path, seed: int, count: int, figures: fuzzing.Figures) -> list[str]:
    """The tracebacks of so many analyses of changed studies."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        changed, code, trace = analysed(pristine, folder / str(number), rng)
        figures.note(changed, refused=code != 0, traceback=trace)
        if trace is not None or code not in (0, 2):
            found.append(f"{changed[-600:]}\n{(trace or str(code))[-2000:]}")
    return found


def test_a_study_with_changed_files_is_analysed_or_refused(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = looked_for(pristine, tmp_path, 1, 6, fuzzing.Figures("", ""))
    assert not found, ascii(found[0])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(4))
def test_hundreds_of_studies_with_changed_files(
    part: int, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = fuzzing.Figures("files of a study, or an imported table, before an analysis", f"files-{part}")
    found = looked_for(pristine, tmp_path, 50 + part, 100, figures)
    figures.write()
    assert not found, ascii("\n\n".join(found[:3]))


def test_an_analysis_that_raises_is_found(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.__main__._run", lambda options: {}["x"])
    found = looked_for(pristine, tmp_path, 1, 1, fuzzing.Figures("", ""))
    assert "KeyError: 'x'" in found[0]
