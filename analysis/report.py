"""report.html: one file without network, to look through a study: charts, arms, predictions, tables and checks."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import captions, charts, page
from .analyse import Analysis
from .tables import Sheet
from .venues import DEFAULT, Venue

_HERE = Path(__file__).parent


def write(
    analysis: Analysis, folder: Path, *, absent: Mapping[str, str] | None = None, drawn: Sequence[Path] | None = None,
    venue: Venue = DEFAULT, made: Sequence[Sheet] | None = None,
) -> Path:  # fmt: skip
    """Writes report.html with the figures `drawn` of this analysis; by default those that lie in `folder`/figures.

    Args:
        made: the tables, where they are made already.

    Raises:
        ModuleNotFoundError: the library that draws the charts is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = [*(folder / "figures").glob("*.png")] if drawn is None else [p for p in drawn if p.suffix == ".png"]
    plain = json.dumps(content(analysis, images, absent or {}, venue, made), separators=(",", ":"), allow_nan=False)
    parts = {
        "TITLE": html.escape(f"{analysis.study.name or 'imported runs'}: LoRA placement study"),
        "STYLE": (_HERE / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (_HERE / "report.js").read_text(encoding="utf-8"),
        "LIBRARY": charts.library().replace("</script", r"<\/script").replace("<!--", r"<\!--"),
        # Inside a script element only "<" could end it early or open a comment.
        "DATA": plain.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    }
    pieces = (_HERE / "report.html").read_text(encoding="utf-8").split("@@")
    text = "".join(parts.get(piece, piece) if i % 2 else piece for i, piece in enumerate(pieces))
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def content(
    analysis: Analysis,
    images: Sequence[Path],
    absent: Mapping[str, str],
    venue: Venue = DEFAULT,
    made: Sequence[Sheet] | None = None,
) -> dict[str, Any]:
    """What the page shows, as plain data: `page.content` and the figures."""
    order, main = list(captions.WHAT), f"_{analysis.metric}"
    images = sorted(
        images, key=lambda path: (order.index(captions.kind(path.stem)), not path.stem.endswith(main), path.stem)
    )
    return page.content(analysis, made) | {
        "figures": [{"src": _image(path), "alt": captions.caption(analysis, path.stem, venue)} for path in images],
        "absent": [f"No figure {name}: {reason}." for name, reason in absent.items()],
    }


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
