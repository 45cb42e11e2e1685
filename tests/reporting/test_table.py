"""Tables fit their width, keep what matters, and break no word."""

import io

import pytest
from rich.console import Console

from sweeper.reporting.table import TIE, Column, fit, flow, print_table

COLUMNS = [
    Column(title="placement", cells=["none (base model)", "attn"], wraps=True),
    Column(title="rank", cells=["-", "16"]),
    Column(title="seconds", cells=["-", "12.3"], spare=2),
    Column(title=f"accuracy before →{TIE}after", cells=["0.100", "0.100 → 0.750"], spare=1),
    Column(title="NLL", cells=["6.3226", "5.9804"]),
]


def test_with_room_for_all_a_row_is_a_line() -> None:
    assert fit(COLUMNS, 80).lines == [
        "placement          rank  seconds  accuracy before → after     NLL",
        "none (base model)     -        -                    0.100  6.3226",
        "attn                 16     12.3            0.100 → 0.750  5.9804",
    ]


def test_titles_wrap_before_cells_and_cells_before_columns_go() -> None:
    assert fit(COLUMNS, 56).lines == [
        "                                        accuracy",
        "placement          rank  seconds  before → after     NLL",
        "none (base model)     -        -           0.100  6.3226",
        "attn                 16     12.3   0.100 → 0.750  5.9804",
    ]
    assert fit(COLUMNS, 48).hidden == ()


def test_the_least_important_column_goes_first() -> None:
    found = fit(COLUMNS, 40)
    assert found.hidden == ("seconds",)
    assert fit(COLUMNS, 30).hidden == ("seconds", "accuracy before → after")


@pytest.mark.parametrize("width", range(12, 90))
def test_no_line_is_wider_than_the_table_may_be_and_no_word_is_broken(width: int) -> None:
    found = fit(COLUMNS, width)
    assert max(map(len, found.lines)) <= width
    words = {word for column in COLUMNS for text in (column.title, *column.cells) for word in text.split()}
    assert {word for line in found.lines for word in line.split()} <= words | {"·"}
    assert {"attn", "16", "5.9804", "6.3226"} <= {word for line in found.lines for word in line.split()}


def test_rows_stand_in_blocks_where_nothing_else_will_do() -> None:
    assert fit(COLUMNS, 18).lines == [
        "none (base model)",
        "  rank -",
        "  NLL 6.3226",
        "attn",
        "  rank 16",
        "  NLL 5.9804",
    ]


def test_a_word_that_is_too_long_is_cropped() -> None:
    column = Column(title="model", cells=["a/model/with/a/long/name"], wraps=True)
    assert fit([column, COLUMNS[1]], 14).lines[0] == "a/model/with/…"


def test_an_empty_table_has_its_titles() -> None:
    out = io.StringIO()
    print_table(["arm", "NLL"], [], Console(file=out, width=80))
    assert out.getvalue() == "arm  NLL\n"


def test_parts_flow_onto_lines() -> None:
    parts = ["4 training", "", "1,731 tokens/s, 248 of answers", "0:10 so far", "0:06 to go"]
    assert flow(parts, 40) == ["4 training", "1,731 tokens/s, 248 of answers", "0:10 so far · 0:06 to go"]
    assert flow(parts, 80) == ["4 training · 1,731 tokens/s, 248 of answers · 0:10 so far · 0:06 to go"]
