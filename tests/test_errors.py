"""What a library's error says fits into a line of ours, also where it says nothing."""

import pickle

import pytest

from sweeper.errors import SpecError, first_line, gist
from sweeper.spec import OptimSpec, from_mapping


def test_the_gist_is_all_of_it_on_one_line() -> None:
    assert gist(ValueError("one\n  two")) == "one two"
    assert gist(ValueError()) == "ValueError"
    assert gist(ValueError("a" * 400), most=10) == "aaaaaaa..."


def test_the_first_line_is_there_even_of_an_error_without_words() -> None:
    assert first_line(OSError("\none\ntwo")) == "one"
    assert first_line(OSError()) == "OSError"


def test_a_spec_error_says_what_is_wrong_in_parts_too() -> None:
    with pytest.raises(SpecError) as caught:
        OptimSpec(lr=-1.0)
    error = caught.value
    assert (error.field, error.got, error.wanted) == ("optim.lr", -1.0, "a positive number")
    assert str(error) == "optim.lr must be a positive number, got -1.0"
    with pytest.raises(SpecError) as typed:
        from_mapping(OptimSpec, {"lr": "abc"}, prefix="optim.")
    assert (typed.value.field, typed.value.got, typed.value.wanted) == ("optim.lr", "abc", "a number")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.field, copy.got) == (str(error), error.field, error.got)
