"""One look for every figure: fonts, colours for colour-blind readers, markers and lines for grey."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from fontTools import subset
from matplotlib import font_manager
from matplotlib import pyplot as plt

if "inline" not in os.environ.get("MPLBACKEND", ""):  # which shows figures in a notebook; elsewhere they become files
    matplotlib.use("Agg")

# Okabe & Ito (2008); yellow is left out, it vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_FIXED = {"attn": 0, "ff": 1, "full": 2}
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"
"""About 0; the warm end is below it."""
GREY = "#5f6b76"

RC: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5, "axes.grid": True, "grid.color": "#e3e6ea",
    "grid.linewidth": 0.5, "axes.axisbelow": True, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "pdf.fonttype": 42, "ps.fonttype": 42, "savefig.dpi": 300,
    "figure.dpi": 150, "hatch.linewidth": 0.5, "axes.titlepad": 4, "axes.labelpad": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one placement (or method) is drawn everywhere."""

    colour: str
    marker: str
    line: Any


WHOLE = Look(colour="#3b3b3b", marker="*", line=(0, (6, 1.5, 1, 1.5, 1, 1.5)))
"""Of full fine-tuning, which is a level to compare with."""
FADED = Look(colour="#aab2ba", marker="o", line="-")
"""Of kinds that are too many to be told apart."""
OTHERS = "others"
"""The entry that these share in a legend."""


def looks(names: list[str]) -> dict[str, Look]:
    """A look for each name; attention, feed-forward and full always have theirs."""
    free = iter(i for i in range(1000) if i not in _FIXED.values() or not set(_FIXED) & set(names))
    found = {}
    for name in sorted(names, key=lambda name: (_FIXED.get(name, len(_FIXED)), name)):
        i = _FIXED[name] if name in _FIXED else next(free)
        marker, line = _MARKERS[i % len(_MARKERS)], _LINES[i % len(_LINES)]
        found[name] = Look(colour=_COLOURS[i % len(_COLOURS)], marker=marker, line=line)
    return found


@contextmanager
def styled() -> Iterator[None]:
    """Figures made inside have the common style."""
    with plt.rc_context(RC | {"font.family": [_font(), "DejaVu Sans"]}):
        yield


@cache
def _font() -> str:
    """DejaVu Sans without its thousands of other scripts, so that embedding it in ten PDFs takes 0.3 s and not 3 s."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    source = font_manager.findfont("DejaVu Sans")
    options = subset.Options(layout_features=[], drop_tables=["GSUB", "GPOS", "GDEF", "kern", "FFTM"], hinting=False)
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[*range(0x20, 0x250), *range(0x391, 0x3CA), *range(0x2010, 0x2050), 0x2212, 0xD7, 0xB1])
    subsetter.subset(font)
    folder = tempfile.mkdtemp(prefix="figure-font-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "paper.ttf"
    subset.save_font(font, str(path), options)
    font.close()
    font_manager.fontManager.ttflist.append(font_manager.FontEntry(fname=str(path), name="Paper Sans"))
    return "Paper Sans"
