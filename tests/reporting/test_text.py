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


@pytest.mark.parametrize(
    "cell", ["12", "1,234", "0.5 → 0.75", "5 MiB", "1.17 G", "4–8", "3/40", "1:02", "-", "", "nan"]
)
def test_numbers_with_units_and_pairs_of_them_are_numbers(cell: str) -> None:
    assert text.is_number(cell)


@pytest.mark.parametrize("cell", ["attn r4", "embedding", "exact", "to train", "none"])
def test_words_are_no_numbers(cell: str) -> None:
    assert not text.is_number(cell)
