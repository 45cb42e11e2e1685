"""Files of other layouts: CSV, TSV, Parquet, JSON; columns named, or made of several; one line where that fails."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sweeper import config, tasks
from sweeper.errors import DataError, SpecError, SweeperError
from sweeper.spec import DatasetSpec, canonical_json
from sweeper.tasks import columns
from sweeper.tasks.example import Example

QA = {"prompt": "question", "response": "answer", "group": "source"}
ROWS = [{"question": f"What is {n}, exactly?", "answer": str(2 * n), "source": f"book{n % 8}"} for n in range(40)]


def spec(path: Path | str, names: dict[str, str] | None = None, **fields: Any) -> DatasetSpec:
    return DatasetSpec(name="file", family="file", path=str(path), columns=names or {}, **fields)


def found(dataset: DatasetSpec) -> dict[str, Example]:
    """Every example of a dataset by its prompt."""
    tasks.check(dataset)
    return {example.prompt: example for split in tasks.load(dataset).values() for example in split}


def refused(dataset: DatasetSpec) -> str:
    with pytest.raises(SweeperError) as caught:
        tasks.check(dataset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the layout that the file's name ends in."""
    names = list(rows[0])
    if path.suffix in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        cells = [names, *([str(row[name]) for name in names] for row in rows)]
        path.write_text("".join(separator.join(f'"{cell}"' for cell in row) + "\n" for row in cells))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_layout_of_any_kind_gives_the_same_examples(kind: str, tmp_path: Path) -> None:
    examples = found(spec(write(tmp_path / f"mine.{kind}", ROWS), QA))
    assert {prompt: (one.response, one.group) for prompt, one in examples.items()} == {
        row["question"]: (row["answer"], row["source"]) for row in ROWS
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_numbers_of_a_named_column_are_text(kind: str, tmp_path: Path) -> None:
    rows = [{"question": f"Twice {n}?", "answer": 2 * n} for n in range(20)]
    examples = found(spec(write(tmp_path / f"mine.{kind}", rows), {"prompt": "question", "response": "answer"}))
    assert examples["Twice 7?"].response == "14"


def test_a_template_of_several_columns(tmp_path: Path) -> None:
    rows = [{"q": f"Which {n}?", "context": ["a", str(n)], "meta.k": "m", "turns": [{"t": "x"}], "a": "y", "no": None}
            for n in range(20)]  # fmt: skip
    path = write(tmp_path / "mine.jsonl", rows)
    names = {"prompt": r"{q}\nContext: {context}, {{{turns[0][t]}}} {meta.k}{no}", "response": "a"}
    assert "Which 3?\nContext: a\n3, {x} m" in found(spec(path, names))


def test_cells_that_are_hard_to_read(tmp_path: Path) -> None:
    """A byte order mark, semicolons, line breaks and quotes in a cell, empty lines, an empty group."""
    lines = ["\ufeffprompt;response;group;note\n", '"first, line\nsecond ""line""";yes;;\n', "\n", ";;;\n"]
    path = tmp_path / "mine.csv"
    path.write_text("".join([*lines, *(f"question {n};no;g{n};{'x' * 140_000}\n" for n in range(9))]))
    examples = found(spec(path))
    first = examples['first, line\nsecond "line"']
    assert (first.response, first.id, first.group) == ("yes", "line-2", "line-2")
    assert examples["question 0"].id == "line-6"
    assert tasks.where(spec(path), "line-6") == f"{path}:6"


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("question,answer\nq,a\n", {}, r"mine.csv:2: missing prompt and response; this line has the keys question, "
         r"answer; name its columns: 'dataset.columns=\{prompt: question, response: answer\}'"),
        ("question,answer\nq,a\n", {"prompt": "quetion", "response": "answer"},
         r"mine.csv:2: dataset.columns.prompt=quetion: no such column. Choose from answer, question. Did you mean"),
        ("q,a\nx,y\n", {"prompt": "{q}{b}", "response": "a"}, r"dataset.columns.prompt=b: no such column. Choose"),
        ("q,a\nx,y\n", {"prompt": "{q", "response": "a"}, r"^dataset.columns.prompt='\{q': expected '}'"),
        ("q,a\nx,y\n", {"prompt": "{}", "response": "a"}, r"^dataset.columns.prompt='\{}': braces without the name"),
        ("q,a\nx,y\n", {"prompt": "{{q}}", "response": "a"}, r"^dataset.columns.prompt=.* names no column"),
        ("q,a\nx,y\n", {"prompt": "{q.__class__}", "response": "a"}, r"a part of a column is written \{column\["),
        ("q,a\nx,y\n", {"prompt": "{q[k]}", "response": "a"}, r"mine.csv:2: .*cannot be filled in \(TypeError"),
        ("q,a\nx,y\n", {"promt": "q"}, r"dataset.columns=promt: .*Choose from .* Did you mean prompt"),
        ("q,a\nx,y\n", {"prompt": " "}, r"dataset.columns.prompt must be the name of a column"),
        ("prompt,response\nx\n", {}, r"mine.csv:2: 1 cells, and the header names 2 columns"),
        ("prompt,response\nx,\n", {}, r"mine.csv:2: response is empty"),
        ("prompt,response,prompt\n", {}, r"mine.csv:1: two columns are called 'prompt'"),
        ('prompt,response\n"x" y,z\n', {}, r"mine.csv:2: not valid CSV"),
        ("prompt,response\n", {}, r"mine.csv: the file is empty"),
        ("", {}, r"mine.csv: the file is empty"),
        ("prompt,response\n\udcff,x\n", {}, r"mine.csv: not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_columns_that_there_are(
    text: str, names: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert re.search(message, refused(spec(path, names)))


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    assert "no Parquet file that can be read" in refused(spec(tmp_path / "mine.parquet"))


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "mine.parquet needs the package pyarrow: " in refused(spec(tmp_path / "mine.parquet"))


def test_a_refusal_says_what_to_type(composer: Any, tmp_path: Path) -> None:
    """Questions and answers: what is typed then reads them."""
    layouts: dict[str, tuple[dict[str, Any], dict[str, str], str, str]] = {
        "questions": (
            {"question": "Is # even?", "answer": "yes"},
            {"prompt": "question", "response": "answer"}, "Is 3 even?", "yes",
        ),
    }  # fmt: skip
    for name, (row, names, prompt, response) in layouts.items():
        rows = [json.loads(json.dumps(row).replace("#", str(n))) for n in range(20)]
        path = write(tmp_path / f"{name}.jsonl", rows)
        assert found(spec(path, names))[prompt].response == response
        line = refused(spec(path))
        assert all(key in line for key in row)
        typed = line[line.index("'dataset.columns=") :].strip("'")
        (one,) = config.expand(["model=tiny_llama", "dataset=file", f"dataset.path={path}", typed], composer).specs
        assert one.dataset.columns == names


def test_columns_as_typed(composer: Any) -> None:
    typed = ["model=tiny_llama", "dataset=file", "dataset.path=mine.csv"]
    named = r"""dataset.columns={prompt: "{question}\nContext: {context}", response: answer, group: source}"""
    (one,) = config.expand([*typed, named], composer).specs
    assert one.dataset.columns == {
        "prompt": r"{question}\nContext: {context}", "response": "answer", "group": "source",
    }  # fmt: skip
    (other,) = config.expand(typed, composer).specs
    assert other.dataset.columns == {}
    assert "columns" not in canonical_json(other)
    assert one.run_id != other.run_id


def test_a_dataset_without_columns_says_so() -> None:
    dataset = DatasetSpec(name="chain_sum", family="chain_sum", columns={"prompt": "x"})
    with pytest.raises(SpecError, match=r"^dataset.columns: dataset=chain_sum has no columns to name; dataset=file"):
        tasks.check(dataset)


def test_a_suggestion_guesses_what_columns_are_usually_called() -> None:
    said = columns.suggestion(["response"], {"prompt": "", "output": ""})
    assert said == "name its columns: 'dataset.columns={response: output}'"
    assert columns.suggestion(["prompt"], {"x": ""}).endswith("'dataset.columns={prompt: ...}'")
    with pytest.raises(DataError, match="cannot be filled in"):
        columns.fill("{a[b]}", {"a": {}})
