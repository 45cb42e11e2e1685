"""Where numbers come from: the commands, the commit, the devices and the versions behind a study's tables."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from sweeper.record import read_commands

from .analyse import Analysis
from .checks import DIRTY

SHOWN = ("torch", "transformers", "peft")
VERSION = "made_with.versions."
PLACE = "output_root="  # where a study lies changes nothing in it


def lines(analysis: Analysis) -> list[str]:
    """A line each for commands, source, hardware and versions, as the records have them."""
    runs = analysis.found.runs[analysis.found.runs["source"] == "study"]
    return [*_commands(runs), *_source(runs), *_hardware(runs), *_versions(runs)] if len(runs) else []


def sentence(analysis: Analysis) -> str:
    """What stands under every table; commands, which may be long, are in the report and in provenance.md."""
    runs = analysis.found.runs[analysis.found.runs["source"] == "study"]
    return " ".join([*_source(runs), *_hardware(runs), *_versions(runs)]) if len(runs) else ""


def _commands(runs: pd.DataFrame) -> Iterator[str]:
    studies = sorted({str(Path(folder).parent) for folder in runs["folder"].dropna()})
    typed = [one["typed"] for folder in studies for one in read_commands(Path(folder)) if "typed" in one]
    shown = (" ".join(word for word in one.split() if not word.startswith(PLACE)) for one in typed)
    for command in dict.fromkeys(shown):
        yield f"Command: {command}"


def _source(runs: pd.DataFrame) -> Iterator[str]:
    commits = runs["git_commit"] if "git_commit" in runs else pd.Series(None, index=runs.index)
    parts = []
    for commit, count in commits.fillna("").value_counts().items():
        name = f"commit {str(commit).removesuffix(DIRTY)}" if commit else "no known commit"
        dirty = " with uncommitted changes" if str(commit).endswith(DIRTY) else ""
        parts.append(f"{name}{dirty} ({count:,} run{'' if count == 1 else 's'})")
    yield f"Source: {', '.join(parts)}."


def _hardware(runs: pd.DataFrame) -> Iterator[str]:
    for name, what in (("device", "Hardware"), ("made_with.precision", "Precision")):
        known = runs[name].dropna().astype(str).unique() if name in runs else []
        if len(known):
            yield f"{what}: {', '.join(sorted(known))}."


def _versions(runs: pd.DataFrame) -> Iterator[str]:
    parts = []
    for package in SHOWN:
        column = f"{VERSION}{package}"
        known = sorted(runs[column].dropna().astype(str).unique()) if column in runs else []
        if known:
            parts.append(f"{package} {' and '.join(known)}")
    if parts:
        yield f"Versions: {', '.join(parts)}."
