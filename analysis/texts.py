"""What models were asked and what they wrote: predictions beside the prompts and references that a study keeps once."""

import io
import re
import zlib
from collections.abc import Iterable, Mapping
from gzip import GzipFile
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper.record import EXAMPLES, LARGEST_JSON, read_json

from .load import Problem, Study

COLUMNS = ["run_id", "id", "prompt", "reference", "text"]
LARGEST = 4 * LARGEST_JSON  # bytes that are unpacked of one file
_DIGEST = re.compile("[0-9a-f]{16}")  # it comes from a record, and becomes a path


def examples(
    study: Study, run_ids: Iterable[str] | None = None, *, split: str = "test", phase: str = "after"
) -> pd.DataFrame:
    """Every scored example with its texts: run_id, id, prompt, reference, text, then nll, tokens and its metrics.

    `text` is what was generated (evaluation.generate=true). A text is missing (None) where it was not kept: of runs
    with sweep.keep_texts=false or of earlier versions, of examples beyond the first 2,000 of a split, and the prompts
    of archives. An unreadable file becomes a problem of the study.

    Args:
        run_ids: runs of the study, all of them by default.
        phase: before or after training.
    """
    wanted = study.runs["run_id"] if run_ids is None else run_ids
    known: dict[Path, Mapping[str, Any]] = {}
    parts = []
    for run_id in wanted:
        columns = study.example_columns(run_id, split=split, phase=phase)
        if not columns:
            continue
        path = _path(study, run_id, split)
        if path is not None and path not in known:
            known[path] = _read(study, path)
        kept = known.get(path, {}) if path is not None else {}
        found = [kept.get(str(name), {}) for name in columns["id"]]
        texts = {
            "prompt": [one.get("prompt") for one in found], "reference": [one.get("response") for one in found],
            "text": columns.pop("text", [None] * len(found)),
        }  # fmt: skip
        parts.append(pd.DataFrame({"run_id": run_id, "id": columns.pop("id"), **texts, **columns}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS, "nll", "tokens"])


def _path(study: Study, run_id: str, split: str) -> Path | None:
    folder, column = study.folder(run_id), f"data.{split}.texts"
    if folder is None or column not in study.runs:
        return None
    digest = study.runs.loc[study.runs["run_id"] == run_id, column].iloc[0]
    if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        return None
    return folder.parent / EXAMPLES / f"{digest}.jsonl.gz"


def _read(study: Study, path: Path) -> dict[str, dict[str, Any]]:
    """id -> its texts; empty where the file is gone."""
    try:
        with path.open("rb") as file, GzipFile(fileobj=file) as unpacked:
            content = unpacked.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        rows = [read_json(line) for line in io.BytesIO(content)]
        return {str(row["id"]): row for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        message = f"{path.name}: {type(error).__name__}: {error}"
        study.note(Problem(folder=str(path.parent), kind="unreadable texts", message=message))
        return {}
