"""Writes into a wheel the commit that it was built of, which records of its runs name (`sweeper.commit`)."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TRACKED = ("git", "ls-files", "--error-unmatch", "--", "hatch_build.py")
DESCRIBE = ("git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")


class CommitHook(BuildHookInterface):
    """Hatchling finds it by its base class; see [tool.hatch.build.targets.wheel.hooks.custom]."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        named = commit(Path(self.root))
        if named is not None and version != "editable":  # a tree says it itself
            (self.folder / "commit").write_text(named, encoding="utf-8")
            build_data["force_include"][str(self.folder / "commit")] = "sweeper/.commit"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def commit(root: Path) -> str | None:
    """What git says of a checkout, else the `.commit` that a copy of one has."""
    try:  # a tree that lies in another project's checkout is not that project's
        subprocess.run(TRACKED, cwd=root, capture_output=True, check=True)
        return subprocess.run(DESCRIBE, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        file = root / ".commit"
        return str(json.loads(file.read_text(encoding="utf-8"))["commit"]) if file.is_file() else None
