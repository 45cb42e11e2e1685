"""`dataset.columns`: which column of a source is the prompt, the response and so on, or a text made of several.

A value is the name of a column, or a template with names in braces, `"{question}\\nContext: {context}"`. A `\\n` as
typed on a command line is a line break. `{context[title]}` and `{messages[0][content]}` look into a column.
"""

import math
import re
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sweeper.errors import DataError, SpecError, unknown
from sweeper.spec import DatasetSpec

# what columns are often called, in the order in which they are suggested
USUAL = {
    "prompt": ("question", "instruction", "input", "query", "text", "problem"),
    "response": ("answer", "output", "completion", "target", "solution", "label"),
}


class Plain(str):
    """The name of one column, taken as it is; any other text is a template."""


class _Filling(string.Formatter):
    """`str.format` that writes a list as lines and nothing as "", and looks at no attribute of what it finds."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if field_name in kwargs:
            return kwargs[field_name], field_name
        if "." in re.sub(r"\[[^\]]*\]", "", field_name):
            raise DataError(f"{{{field_name}}}: a part of a column is written {{column[part]}}")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return ""
        return "\n".join(map(str, value)) if isinstance(value, list) else str(super().format_field(value, format_spec))


def fill(text: str, row: Mapping[str, Any]) -> str:
    """A column, or a template with the values of a row, as text without white space around it.

    Raises:
        DataError: the row has no such part.
    """
    try:
        if isinstance(text, Plain):
            return _Filling().format_field(as_text(row[text]), "").strip()
        return _Filling().vformat(text, (), row).strip()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{text!r} cannot be filled in ({type(error).__name__}: {error})") from None


def names_in(text: str, known: Collection[str] = ()) -> list[str]:
    """The columns that a template names; `known` ones may have dots in their names.

    Raises:
        DataError: its braces do not match, or are empty.
    """
    if isinstance(text, Plain):
        return [str(text)]
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise DataError(f"{text!r}: {error}") from None
    heads = [name if name in known else re.split(r"[.\[]", name)[0] for name in fields]
    if not all(heads):
        raise DataError(f"{text!r}: braces without the name of a column; write {{{{ and }}}} for braces of the text")
    return list(dict.fromkeys(heads))


def check(spec: DatasetSpec, known: Collection[str]) -> None:
    """Raises SpecError where `dataset.columns` cannot be used; `known` are those that the dataset's family reads."""
    for name, value in spec.columns.items():
        if not known:
            raise SpecError(f"dataset.columns: dataset={spec.name} has no columns to name; dataset=file and hub have")
        if name not in known:
            raise SpecError(unknown("dataset.columns", name, known))
        if not value.strip():
            raise SpecError(f"dataset.columns.{name} must be the name of a column, or a text with {{columns}}")


def templates(spec: DatasetSpec) -> dict[str, str]:
    """`dataset.columns` as `Plain` names and templates.

    Raises:
        DataError: a template cannot be read.
    """
    found: dict[str, str] = {}
    for key, value in spec.columns.items():
        braced = "{" in value or "}" in value
        found[key] = value.replace("\\n", "\n") if braced else Plain(value)
        try:
            if braced and not names_in(value):
                raise DataError(f"{value!r} names no column")
        except DataError as error:
            raise DataError(f"dataset.columns.{key}={error}") from None
    return found


def mapped(row: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """A row with what `texts` (of `templates`) make of it under our names: numbers as text, other values as they are.

    Raises:
        DataError: the row has no such column; says which it has.
    """
    found = dict(row)
    for key, text in texts.items():
        for name in names_in(text, row):
            if name not in row:
                given = f"dataset.columns.{key}={name}"
                raise DataError(unknown("column", name, map(str, row), given=given))
        found[key] = as_text(row[text]) if isinstance(text, Plain) else fill(text, row)
    return found


def as_text(value: Any) -> Any:
    """A number as text, 4.0 as 4, and nan as None; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if not math.isfinite(value):
        return None
    return str(int(value)) if float(value).is_integer() else str(value)


def suggestion(lacking: Sequence[str], row: Mapping[str, Any]) -> str:
    """What to type where a row lacks some of our names: its own columns in their place, where they are called as usual.

    Of instruction and input it is both.
    """
    guessed = {key: next((name for name in USUAL[key] if name in row), "...") for key in lacking}
    if guessed.get("prompt") == "instruction" and "input" in row:
        guessed["prompt"] = r'"{instruction}\n\n{input}"'
    pairs = ", ".join(f"{key}: {name}" for key, name in guessed.items())
    return f"name its columns: 'dataset.columns={{{pairs}}}'"
