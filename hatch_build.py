"""Writes into a wheel the commit that it was built of, which records of its runs name (`sweeper.commit`)."""

import json
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
        if version == "editable":  # whose tree says it itself
            return
        named = self.commit(Path(self.root))
        if named is not None:
            self.written = tempfile.NamedTemporaryFile("w", suffix=".commit", encoding="utf-8")
            self.written.write(named)
            self.written.flush()
            build_data["force_include"][self.written.name] = "sweeper/.commit"

    @staticmethod
    def commit(root: Path) -> str | None:
        """What git says of a checkout, else the `.commit` that a copy of one has."""
        try:  # a tree that lies in another project's checkout is not that project's
            subprocess.run(TRACKED, cwd=root, capture_output=True, check=True)
            return subprocess.run(DESCRIBE, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            file = root / ".commit"
            return str(json.loads(file.read_text(encoding="utf-8"))["commit"]) if file.is_file() else None
