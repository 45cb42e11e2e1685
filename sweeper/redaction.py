"""Keeps passwords and tokens out of what is written and printed."""

import os
import re
from functools import cache

HIDDEN = "***"
SHORTEST = 12  # of a secret in the environment: shorter ones could be words that stand elsewhere too
_NAME = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY(_ID)?|SECRET(_KEY)?|PASSWORD|PASSWD|PGPASSWORD|CREDENTIALS?)$")
_URL = re.compile(r"(://[^/\s:@'\"]*):[^@\s'\"]+@")
_PREFIXED = re.compile(r"\b(hf|ghp|gho|github_pat|glpat|sk|wandb_v1)([_-])[A-Za-z0-9_-]{16,}")
_NAMED = r"(?:\w*(?:api_?key|access_?key|password|passwd|secret)|(?<!\w)token)"
_GIVEN = re.compile(rf"""(?i)({_NAMED}=)('[^']*'|"[^"]*"|[^\s'",}}\]]{{4,}})""")


def without_secrets(text: str) -> str:
    """A text without the values of environment variables that are named like secrets (HF_TOKEN, WANDB_API_KEY)."""
    for value in sorted(_of(frozenset(os.environ.items())), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def without_credentials(text: str, *, typed: bool = False) -> str:
    """As `without_secrets`, and without what is a secret by its form: the password in a URL, a token of the hub.

    Args:
        typed: it is a command, or quotes one, where `password=...` gives one; in code it may not.
    """
    text = _PREFIXED.sub(rf"\1\2{HIDDEN}", _URL.sub(rf"\1:{HIDDEN}@", without_secrets(text)))
    return _GIVEN.sub(rf"\1{HIDDEN}", text) if typed else text


@cache
def _of(environment: frozenset[tuple[str, str]]) -> frozenset[str]:
    return frozenset(
        value
        for name, value in environment
        if _NAME.search(name.upper()) and len(value) >= SHORTEST and "/" not in value
    )
