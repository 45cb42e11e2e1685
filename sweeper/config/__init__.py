"""The border: command-line overrides become frozen specs here, and nothing behind this folder imports Hydra."""

from sweeper.config.build import axes_of, differing, search_settings
from sweeper.config.composer import Composer, as_typed, composer_of, load_plugins, one_line
from sweeper.config.composition import Composition, expand, from_config
from sweeper.config.grid import unquoted

__all__ = [
    "Composer",
    "Composition",
    "as_typed",
    "axes_of",
    "composer_of",
    "differing",
    "expand",
    "from_config",
    "load_plugins",
    "one_line",
    "search_settings",
    "unquoted",
]
