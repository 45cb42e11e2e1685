"""Where what can be made again is kept between commands: converted models, tokens, verdicts, measurements."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The environment variable SWEEPER_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("SWEEPER_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-placement-sweep"
    return Path(chosen).expanduser() if chosen else base
