"""The manifest of an output folder: which files an analysis wrote there, so that the next one removes only those."""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

MANIFEST = ".written"


def update(folder: Path, written: Iterable[Path], *, among: Collection[str] | None = None) -> list[Path]:
    """Records the files written to `folder` and removes files of an earlier analysis that are no longer made.

    A file that has changed since it was written is the user's and stays.

    Args:
        among: names of the files that this call could have written, if not all; entries of other files are kept.

    Returns:
        The removed files.
    """
    now = {path.name: _digest(path) for path in written}
    former = _read(folder)
    stale = [name for name in former if name not in now and (among is None or name in among)]
    removed = [path for name in stale if (path := folder / name).is_file() and _digest(path) == former[name]]
    for path in removed:
        path.unlink()
    entries = {name: digest for name, digest in (former | now).items() if name not in stale}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return removed


def unlisted(folder: Path, written: Iterable[Path]) -> list[str]:
    """Names of files in `folder` that were not written now, of the kinds that are written there."""
    mine = [path for path in written if path.parent == folder]
    kinds = {path.suffix for path in mine} or {".pdf", ".png"}  # no figure was drawn
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if path.suffix in kinds and path not in mine)


def _read(folder: Path) -> dict[str, str]:
    """Name -> digest of its content; empty if the manifest cannot be read."""
    try:
        plain = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = plain.items() if isinstance(plain, dict) else ()
    return {name: digest for name, digest in found if Path(name).name == name and name != MANIFEST}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
