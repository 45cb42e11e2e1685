"""report.html: one file without network, to look through a study: chart, tables, figures and checks."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import captions, shown
from .analyse import Analysis
from .arms import BASE, higher_is_better, kinds
from .claims import sentences
from .load import STATUSES
from .tables import TITLES, Sheet, sheets
from .venues import DEFAULT, Venue

_HERE = Path(__file__).parent
_FILTERS = ("placement", "rank", "method", "allocation", "source")


def write(
    analysis: Analysis, folder: Path, *, absent: Mapping[str, str] | None = None, drawn: Sequence[Path] | None = None,
    venue: Venue = DEFAULT, made: Sequence[Sheet] | None = None,
) -> Path:  # fmt: skip
    """Writes report.html with the figures `drawn` of this analysis; by default those that lie in `folder`/figures.

    Args:
        made: the tables, where they are made already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = [*(folder / "figures").glob("*.png")] if drawn is None else [p for p in drawn if p.suffix == ".png"]
    plain = json.dumps(content(analysis, images, absent or {}, venue, made), separators=(",", ":"), allow_nan=False)
    parts = {
        "TITLE": html.escape(f"{analysis.study.name or 'imported runs'}: LoRA placement study"),
        "STYLE": (_HERE / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (_HERE / "report.js").read_text(encoding="utf-8"),
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
    """What the page shows, as plain data."""
    metrics, arms = analysis.found.metrics, _with_runs(analysis)
    order, main = list(captions.WHAT), f"_{analysis.metric}"
    images = sorted(
        images, key=lambda path: (order.index(captions.kind(path.stem)), not path.stem.endswith(main), path.stem)
    )
    titles = TITLES | {"trainable_parameters": "trainable parameters", "trainable_percent": "trained, % of model"}
    titles |= {"nll": "NLL (nats/token)", "train_flops": "training FLOPs"}
    titles |= {"train_seconds_solo": "training seconds alone", "peak_memory_solo_bytes": "peak memory alone (bytes)"}
    titles |= {"tokens_per_second_solo": "tokens/s alone", "adapter_bytes": "adapter (bytes)"}
    titles["train_tokens"] = "training tokens"
    titles |= {"train_seconds_amortised": "seconds, share of a pack"}
    return {
        "title": f"LoRA placement study: {analysis.study.name or 'imported runs'}",
        "counts": _counts(analysis),
        "metric": analysis.metric,
        "base": BASE,
        "higher": [metric for metric in metrics if higher_is_better(metric)] + ["tokens_per_second_solo"],
        "titles": titles,
        "filters": list(_FILTERS),
        "answers": sentences(analysis),
        "notes": analysis.notes,
        "looks": [
            {"kind": kind, "colour": look.colour, "marker": look.marker}
            for kind, look in shown.all_looks(analysis).items()
        ],
        "arms": _columns(arms),
        "runs": _columns(_runs(analysis).merge(arms[["setting", "arm", "kind"]], on=["setting", "arm"], how="left")),
        "sheets": [_sheet(sheet) for sheet in (sheets(analysis) if made is None else made)],
        "figures": [{"src": _image(path), "alt": captions.caption(analysis, path.stem, venue)} for path in images],
        "absent": [f"No figure {name}: {reason}." for name, reason in absent.items()],
        "checks": analysis.tables["checks"].to_dict("records")
        + [
            {"check": row["kind"], "subject": row["where"], "message": row["message"]}
            for row in analysis.tables["failures"].head(50).to_dict("records")
        ],
    }


def _counts(analysis: Analysis) -> str:
    """How many runs of which status, how many arms, and how often there was which problem."""
    every = analysis.study.counts()
    ended = ", ".join(f"{every[status]:,} {status}" for status in STATUSES if status in every)
    runs, arms = len(analysis.study.runs), len(analysis.found.arms)
    problems = [f"{kind}: {count:,}" for kind, count in every.items() if kind not in STATUSES]
    text = f"{runs:,} run{'' if runs == 1 else 's'} ({ended}); {arms:,} arm{'' if arms == 1 else 's'}"
    return "; ".join([text, *problems]) + "."


def _with_runs(analysis: Analysis) -> pd.DataFrame:
    """The arms with their runs and their kind."""
    arms = analysis.arms.copy()
    ids = {(arm.setting, arm.label): ", ".join(arm.runs["run_id"].head(6)) for arm in analysis.found.arms}
    keys = zip(arms["setting"], arms["arm"], strict=True) if len(arms) else []
    arms["run_ids"] = [ids.get(key) for key in keys] if len(arms) else []
    return arms.assign(kind=kinds(arms[arms["arm"] != BASE]) if analysis.found.arms else None)


def _runs(analysis: Analysis) -> pd.DataFrame:
    """The columns of the runs that can be axes, filters or part of a hover text, under the names that arms have."""
    runs, split = analysis.found.runs, analysis.found.split
    renamed = {f"{split}.{name}": name for name in (*analysis.found.metrics, "perplexity")}
    renamed |= {f"validation.{name}": f"validation {name}" for name in analysis.found.metrics if split != "validation"}
    wanted = [
        "run_id", "setting", "arm", "status", "chosen", "seed", *_FILTERS, "trainable_parameters", "trainable_percent",
        "train_flops", "train_seconds_solo", "peak_memory_solo_bytes", "tokens_per_second_solo", "adapter_bytes",
        "train_seconds_amortised", "forgetting", *analysis.found.tuned,
    ]  # fmt: skip
    return runs[[key for key in (*dict.fromkeys(wanted), *renamed) if key in runs]].rename(columns=renamed)


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name): [_plain(value) for value in values] for name, values in table.items()}


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def _sheet(sheet: Sheet) -> dict[str, Any]:
    rows = [[{"v": _plain(cell.value), "t": cell.text, "b": cell.bold} for cell in row] for row in sheet.rows]
    plain = {"name": sheet.name, "caption": sheet.caption, "header": sheet.header, "rows": rows}
    return plain | {"latex": sheet.latex, "markdown": sheet.markdown}


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
