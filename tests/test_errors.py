"""What a library's error says fits into a line of ours, also where it says nothing."""

from sweeper.errors import first_line, gist


def test_the_gist_is_all_of_it_on_one_line() -> None:
    assert gist(ValueError("one\n  two")) == "one two"
    assert gist(ValueError()) == "ValueError"
    assert gist(ValueError("a" * 400), most=10) == "aaaaaaa..."


def test_the_first_line_is_there_even_of_an_error_without_words() -> None:
    assert first_line(OSError("\none\ntwo")) == "one"
    assert first_line(OSError()) == "OSError"
