"""Where commands print."""

import os

from rich.console import Console

UNLIMITED = 10_000


def make_console() -> Console:
    """Standard output; as wide as it takes where it is no terminal, so that tables in logs are whole."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=UNLIMITED)
    return console
