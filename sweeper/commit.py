"""The commit of the source that runs, and the file that says it where a copy of the source has no `.git`.

    python -m sweeper.commit      # or make commit-file; then copy the tree to the machine that trains

`.commit` at the root of the tree has the commit, the names of all tracked files and one digest of their content. It
answers where git does not know the tree; where a file is no longer what it was, the tree counts as changed. A wheel has
the commit that it was built of (hatch_build.py). A commit is written "0123456789ab", with "+" behind it where tracked
files differ from it.
"""

import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sweeper.installation import PACKAGE, WHEEL
from sweeper.record import write_json

FILE = ".commit"
ROOT = Path(__file__).parents[1]
CHANGED = "+"


@functools.cache
def commit(root: Path = ROOT) -> str | None:
    """Commit of a source tree, with "+" where tracked files differ from it; None where neither git nor `.commit` know.

    A tree that lies in another project's checkout without being tracked there is not that project's.
    """
    if WHEEL and root == ROOT:
        built = PACKAGE / FILE
        return _plausible(built.read_text(encoding="utf-8")) if built.is_file() else None
    if _git(root, "ls-files", "--error-unmatch", "--", "sweeper/commit.py") is not None:
        return _described(root)
    return _noted(root)


def write(root: Path = ROOT) -> Path:
    """Writes `.commit` of a checkout.

    Raises:
        ValueError: the tree is no checkout.
    """
    named, listed = _described(root), _git(root, "ls-files", "-z")
    if named is None or not listed:
        raise ValueError(f"{root}: no git checkout, so there is no commit to write down")
    files = sorted(name for name in listed.split("\0") if name and name != FILE and (root / name).is_file())
    return write_json(root / FILE, {"commit": named, "sha256": _digest(root, files), "files": files})


def _noted(root: Path) -> str | None:
    """What `.commit` says, marked as changed where the files are not those that it was written with."""
    try:
        plain = json.loads((root / FILE).read_text(encoding="utf-8"))
        named, files = str(plain["commit"]), [str(name) for name in plain["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if _plausible(named) is None:
        return None
    same = _digest(root, files) == plain.get("sha256")
    return named if same or named.endswith(CHANGED) else f"{named}{CHANGED}"


def _plausible(named: str) -> str | None:
    return named if re.fullmatch(r"[0-9a-f]{7,40}\+?", named) else None


def _described(root: Path) -> str | None:
    return _git(root, "describe", "--always", f"--dirty={CHANGED}", "--abbrev=12", "--exclude=*")


def _digest(root: Path, files: Sequence[str]) -> str:
    """SHA-256 over names and content; a file that is missing counts as such."""
    found = hashlib.sha256()
    for name in files:
        try:
            content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        except OSError:
            content = "missing"
        found.update(f"{name}\0{content}\n".encode())
    return found.hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=5, check=True
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    print(write())
