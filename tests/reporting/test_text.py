"""Numbers, times and tables as text for people."""

import pytest

from sweeper.reporting import text


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (1.23456, "1.235"), (float("nan"), "nan"), (float("inf"), "inf"), (1e6, "1e+06")]
)
def test_numbers(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(None, "-"), (5, "0:05"), (65, "1:05"), (3661, "1:01:01")])
def test_times(seconds: float | None, shown: str) -> None:
    assert text.clock_time(seconds) == shown


def test_sizes_and_amounts() -> None:
    assert text.size(3 << 20) == "3 MiB"
    assert text.size(5.5 * 2**30) == "5.50 GiB"
    assert text.amount(1234.0) == "1.23 k"
    assert text.amount(2.5e13) == "25 T"


def test_columns_of_numbers_are_flush_right() -> None:
    lines = text.aligned(["arm", "NLL"], [["attn r4", "0.5"], ["ff", "10.25"]]).splitlines()
    assert lines == ["arm        NLL", "attn r4    0.5", "ff       10.25"]
    assert text.aligned(["arm", "NLL"], []) == "arm  NLL"
