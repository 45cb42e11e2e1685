"""What an analysis left in a folder, so that the next one takes away what it no longer makes, and nothing else."""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

NOTE = ".written"


def settle(folder: Path, written: Iterable[Path], *, among: Collection[str] | None = None) -> list[Path]:
    """Notes the files written to `folder` and removes those that only the note of a former analysis names.

    A file that is no longer what was written is somebody's work by now and stays.

    Args:
        among: names of files that were to be written, where they are not all; what is noted of others stands.

    Returns:
        What was removed.
    """
    now = {path.name: _digest(path) for path in written}
    former = _noted(folder)
    left = [name for name in former if name not in now and (among is None or name in among)]
    removed = [path for name in left if (path := folder / name).is_file() and _digest(path) == former[name]]
    for path in removed:
        path.unlink()
    noted = {name: digest for name, digest in (former | now).items() if name not in left}
    (folder / NOTE).write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return removed


def others(folder: Path, written: Iterable[Path]) -> list[str]:
    """Names of files in `folder`, of the kinds that are written there, that are not among those written."""
    mine = [path for path in written if path.parent == folder]
    kinds = {path.suffix for path in mine} or {".pdf", ".png"}  # no figure was drawn
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if path.suffix in kinds and path not in mine)


def _noted(folder: Path) -> dict[str, str]:
    """Name -> digest of its content; a note that cannot be read names nothing."""
    try:
        plain = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = plain.items() if isinstance(plain, dict) else ()
    return {name: digest for name, digest in found if Path(name).name == name and name != NOTE}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
