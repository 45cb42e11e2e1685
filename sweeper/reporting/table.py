"""Tables that fit the width they are printed in.

Titles wrap first, then cells that may; then columns go, the least important first. What is left and still too wide
stands in blocks, a row each. Words stay whole.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from sweeper.reporting.text import is_number

GAP = 2  # spaces between columns
TIE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of text.

    `spare` says how well it can be spared: 0 stays, of the others the highest goes first. `wraps`: its cells may stand
    on several lines before other columns go. `right`: they are set right although not all are numbers.
    """

    title: str
    cells: Sequence[str]
    spare: int = 0
    wraps: bool = False
    right: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Lines of the titles and of each row; `hidden` are the titles of columns that there was no room for."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    hidden: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        return [*self.header, *(line for row in self.rows for line in row)]


def fit(columns: Sequence[Column], width: int) -> Fitted:
    """The columns in at most `width` characters a line."""
    kept, hidden = list(columns), list[str]()
    while (widths := _widths(kept, width)) is None:
        least = max(kept, key=lambda column: column.spare)
        if not least.spare:
            break
        kept.remove(least)
        hidden.append(least.title.replace(TIE, " "))
    if widths is None:
        widths = _widths([replace(column, wraps=True) for column in kept], width)
    order = {column.title.replace(TIE, " "): place for place, column in enumerate(columns)}
    shown = tuple(sorted(hidden, key=order.__getitem__))
    if widths is None:
        return Fitted(header=(), rows=tuple(_blocks(kept, width)), hidden=shown)
    rights = [column.right or (bool(column.cells) and all(map(is_number, column.cells))) for column in kept]
    titles = [_wrapped(column.title, own) for column, own in zip(kept, widths, strict=True)]
    cells = [[_wrapped(cell, own) for cell in column.cells] for column, own in zip(kept, widths, strict=True)]
    return Fitted(
        header=tuple(_lines(titles, widths, rights, bottom=True)),
        rows=tuple(tuple(_lines(row, widths, rights)) for row in zip(*cells, strict=True)),
        hidden=shown,
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Prints a table all of whose columns stay; text wraps, or rows stand in blocks, where the console is narrow."""
    cells = list(zip(*rows, strict=True)) or [()] * len(header)
    print_fitted([Column(title=title, cells=own) for title, own in zip(header, cells, strict=True)], console)


def print_fitted(columns: Sequence[Column], console: Console) -> tuple[str, ...]:
    """Prints a table in the console's width and returns the titles of the columns that there was no room for."""
    found = fit(columns, console.width)
    console.out("\n".join(found.lines), highlight=False)
    return found.hidden


def flow(parts: Sequence[str], width: int, separator: str = " · ") -> list[str]:
    """Parts side by side, on as many lines as they need; a part that is wider by itself wraps at its spaces."""
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
        else:
            lines += _wrapped(part, width)
    return lines


def cropped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def _widths(columns: Sequence[Column], width: int) -> list[int] | None:
    """A width for each column, with titles and cells on as few lines as will do; None where there is no room."""
    least = [_least(column) for column in columns]
    room = width - GAP * (len(columns) - 1) - sum(least)
    if room < 0:
        return None
    found = list(least)
    # cells before titles: a title on two lines costs one line, a cell on two lines one for every row
    for wanted in ([_widest(column.cells) for column in columns], [len(column.title) for column in columns]):
        for place, goal in enumerate(wanted):
            more = min(max(goal - found[place], 0), room)
            found[place] += more
            room -= more
    return found


def _least(column: Column) -> int:
    cells = [word for text in column.cells for word in text.split(" ")] if column.wraps else column.cells
    return max(_widest(column.title.split(" ")), _widest(cells))


def _widest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words; one that is too long by itself is cropped. No line ends at a `TIE`."""
    found = textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)
    return [cropped(line, width).replace(TIE, " ") for line in found] or [""]


def _lines(
    texts: Sequence[Sequence[str]], widths: Sequence[int], rights: Sequence[bool], *, bottom: bool = False
) -> Iterator[str]:
    """Texts of a line or more side by side, from the top, or down to the `bottom`."""
    height = max(map(len, texts), default=0)
    for number in range(height):
        places = [number - (height - len(lines) if bottom else 0) for lines in texts]
        row = [lines[place] if 0 <= place < len(lines) else "" for lines, place in zip(texts, places, strict=True)]
        yield (
            (" " * GAP)
            .join(
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, rights, strict=True)
            )
            .rstrip()
        )


def _blocks(columns: Sequence[Column], width: int) -> Iterator[tuple[str, ...]]:
    """Each row by itself: the first column, and below it, indented, what the others have."""
    first, *others = columns
    for place, head in enumerate(first.cells):
        parts = [f"{column.title} {column.cells[place]}".strip() for column in others if column.cells[place]]
        yield (*_wrapped(head, width), *(f"  {line}" for line in flow(parts, width - 2)))
