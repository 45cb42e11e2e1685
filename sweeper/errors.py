"""Errors a user can put right. Each is one line: what was wrong, where, and what would have been right."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class SweeperError(Exception):
    """Base of every error that is the user's to mend; printed as one line, without a traceback."""

    exit_code = 2

    @property
    def lines(self) -> tuple[str, ...]:
        return (str(self),)


class Problems(SweeperError):
    """Everything wrong with a command, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["Problems"], tuple[Sequence[str]]]:
        return type(self), (self.problems,)

    @property
    def lines(self) -> tuple[str, ...]:
        return self.problems


class RunsFailed(Problems):
    """Training ended, but not every run of the command completed; a line for each that did not."""

    exit_code = 1


class Interrupted(SweeperError):
    """Stopped on request before every run was done; `again` is the command that goes on from there."""

    exit_code = 130

    def __init__(self, message: str, again: str) -> None:
        self.message, self.again = message, again
        super().__init__(message, again)

    def __str__(self) -> str:
        return f"{self.message}: {self.again}"


class SpecError(SweeperError):
    """A configuration value that cannot be used.

    Attributes:
        field: its dotted name; None where there is no single one.
        got: the value; None also where there was none.
        wanted: what would have been right, in words.
    """

    def __init__(
        self, message: str = "", *, field: str | None = None, got: Any = None, wanted: str | None = None
    ) -> None:
        self.field, self.got, self.wanted = field, got, wanted
        super().__init__(message or f"{field} must be {wanted}, got {got}")


class DataError(SweeperError):
    """A dataset that is missing, malformed or empty."""


class ModelError(SweeperError):
    """A base model that cannot be loaded or whose structure is unknown."""


def unknown(
    what: str, name: str, choices: Iterable[str], *, given: str | None = None, meant: Sequence[str] = ()
) -> str:
    """One line for a name that is not among the choices, with the nearest one suggested.

    Args:
        given: what was typed, if not `what=name`. meant: suggested in place of the nearest choice.

    >>> unknown("placement", "atn", ["attn", "ff"])
    'placement=atn: no such placement. Choose from attn, ff. Did you mean attn?'
    """
    listed = sorted(choices)
    line = f"{f'{what}={name}' if given is None else given}: no such {what}"
    if not listed:
        return f"{line}; there is none to choose from here."
    folded = {choice.casefold(): choice for choice in listed}
    near = meant or [folded[one] for one in difflib.get_close_matches(name.casefold(), folded, n=1)]
    line = f"{line}. Choose from {', '.join(listed)}."
    return f"{line} Did you mean {' or '.join(near)}?" if near else line


def no_such_field(name: str, choices: Iterable[str], *, meant: Sequence[str] = ()) -> str:
    """One line for a field that does not exist, with the nearest one suggested.

    >>> no_such_field("optim.lrr", ["optim.lr", "optim.eps"])
    'optim.lrr: no such field. Choose from optim.eps, optim.lr. Did you mean optim.lr?'
    """
    return unknown("field", name, choices, given=name, meant=meant)


def gist(error: BaseException, most: int = 300) -> str:
    """All that an error of a library says, fit for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
