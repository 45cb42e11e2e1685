"""A JSON object that says what was written, so that what changed on disk since is found."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_FIRST_LINE = re.compile(r'\{\s*"seal":\s*"([^"]*)",?')


class BrokenSeal(ValueError):
    """A sealed text is not what was written."""

    def __init__(self) -> None:
        super().__init__(
            "it was edited or damaged after it was written; to accept it as it is, delete its first line, the seal"
        )


def seal(text: str) -> str:
    """A JSON object's text with the SHA-256 of the rest as its first member, on a line of its own."""
    rest = text.strip().removeprefix("{").strip()
    return f'{{\n "seal": "{_digest(rest)}"{"" if rest == "}" else ","}\n {rest}\n'


def sealed(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """The sealed text of a JSON object."""
    return seal(json.dumps(content, indent=indent))


def unsealed(text: str) -> str:
    """The text without its seal, which a text of an earlier version does not have.

    Raises:
        BrokenSeal: it is not what was written.
    """
    found = _FIRST_LINE.match(text)
    if found is None:
        return text
    rest = text[found.end() :].strip()
    if _digest(rest) != found[1]:
        raise BrokenSeal
    return "{" + rest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
