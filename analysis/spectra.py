"""What `adapters.py spectra` found of a run's update: columns of the runs table, rows by module."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeper.record import SPECTRA, read_json, read_text

SCHEMA = 1
NUMBERS = ("update_norm", "effective_rank", "stable_rank", "intruder_dimensions")
BY_MODULE = ("name", "role", "layer", "energy_share", "update_norm", "effective_rank", "intruder_dimensions")
ENERGY = "energy."


def read(folder: Path) -> list[dict[str, Any]]:
    """A row a module of a run folder's `spectra.json`; none where there is no such file.

    Raises:
        ValueError: it is not what this version reads.
    """
    try:
        plain = read_json(read_text(folder / SPECTRA))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{SPECTRA}: {type(error).__name__}: {error}") from error
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        raise ValueError(f"{SPECTRA}: not of schema {SCHEMA}; python adapters.py spectra {folder} writes it anew")
    rows: list[dict[str, Any]] = plain.get("modules") or []
    missing = [key for key in BY_MODULE for row in rows if key not in row]
    if missing:
        raise ValueError(f"{SPECTRA}: a module without {missing[0]}")
    return rows


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Columns of a run: update_norm, the Frobenius norm of the whole update; effective_rank and stable_rank, means over
    modules; intruder_dimensions, their number over all modules; energy.ROLE, a role's share of the squared norm.
    """
    if not rows:
        return {}
    intruders = [row["intruder_dimensions"] for row in rows if row["intruder_dimensions"] is not None]
    found = {
        "update_norm": math.sqrt(sum(row["update_norm"] ** 2 for row in rows)),
        "effective_rank": sum(row["effective_rank"] for row in rows) / len(rows),
        "stable_rank": sum(row["stable_rank"] for row in rows) / len(rows),
        "intruder_dimensions": sum(intruders) if intruders else math.nan,
    }
    for row in rows:
        key = f"{ENERGY}{row['role']}"
        found[key] = found.get(key, 0.0) + row["energy_share"]
    return found
