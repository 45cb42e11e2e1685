"""From records to a paper: tables, tests, figures and an interactive report. Needs neither torch nor transformers."""

from analysis.analyse import Analysis, analyse
from analysis.load import Study, load
from analysis.texts import examples

__all__ = ["Analysis", "Study", "analyse", "examples", "load"]
