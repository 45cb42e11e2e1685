"""Where what can be made or fetched again is kept between commands: models, data, tokens, verdicts, measurements."""

import os
from pathlib import Path

NAME = "lora-atlas"
FORMER = "lora-placement-sweep"


def cache_folder() -> Path:
    """The environment variable SWEEPER_CACHE, or a folder in the user's cache.

    A user who has only the folder of the project's former name keeps it: nothing is fetched or converted again, and
    saved adapters name a base model in it.
    """
    chosen = os.environ.get("SWEEPER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    present, former = base / NAME, base / FORMER
    return former if former.is_dir() and not present.is_dir() else present
