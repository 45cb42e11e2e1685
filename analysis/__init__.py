"""From records to a paper: tables, tests, figures and an interactive report. Needs neither torch nor transformers."""

from .analyse import Analysis, analyse
from .load import Study, load
from .texts import examples

__all__ = ["Analysis", "Study", "analyse", "examples", "load"]
