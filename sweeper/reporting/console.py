"""Where commands print."""

from rich.console import Console

UNLIMITED = 10_000


def make_console() -> Console:
    """Standard output; where it is neither a terminal nor a notebook, no line is wrapped: logs are searched."""
    console = Console(highlight=False)
    if console.is_terminal or console.is_jupyter:
        return console
    return Console(highlight=False, width=UNLIMITED)
