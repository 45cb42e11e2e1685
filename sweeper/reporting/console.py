"""Where commands print."""

import os

from rich.console import Console


def make_console() -> Console:
    """Standard output; wide where it is no terminal, so that tables in logs are whole."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=200)
    return console
