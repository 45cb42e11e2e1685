"""The audit fails on what was found and on what was not looked up; every pin has a licence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PINS = "a-b==1.0\nc==2.0 # why\n\n# a note\n"


def looked_up(name: str, version: str, *vulnerabilities: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": version, "vulns": list(vulnerabilities)}


CLEAN = [looked_up("A_b", "1.0"), looked_up("c", "2.0")]
SKIPPED = {"name": "c", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (CLEAN, None),
        ([CLEAN[0], SKIPPED], "c: skipped: Dependency not found"),
        (CLEAN[:1], "c: not looked up"),
        ([], "a-b: not looked up"),
        ([CLEAN[0], looked_up("c", "3.0")], "c: 3.0 was looked up, 2.0 is pinned"),
        ([CLEAN[0], looked_up("c", "2.0", {"id": "CVE-1", "fix_versions": ["2.1"]})], "c 2.0: CVE-1 (fixed in: 2.1)"),
        ([CLEAN[0], looked_up("c", "2.0", {"id": "CVE-2"})], "c 2.0: CVE-2 (fixed in: none yet)"),
    ],
)
def test_the_audit_passes_only_what_was_looked_up(
    found: list[dict[str, Any]], line: str | None, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "pins.txt").write_text(PINS)
    done = audit(root, json.dumps({"dependencies": found}), tmp_path / "pins.txt")
    assert done.returncode == (line is not None)
    assert (line or "") in done.stderr


def audit(root: Path, report: str, *pins: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "audit.py"), *map(str, pins)]
    return subprocess.run(command, input=report, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("report", ["", "Traceback", "{}"])
def test_an_audit_that_says_nothing_fails(report: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text(PINS)
    assert audit(root, report, tmp_path / "pins.txt").returncode == 1
    (tmp_path / "none.txt").write_text("")
    assert audit(root, '{"dependencies": []}', tmp_path / "none.txt").returncode == 1


def test_every_pinned_package_has_a_licence(root: Path) -> None:
    files = [str(root / f"constraints{name}.txt") for name in ("", "-data", "-lm-eval", "-trackio")]
    command = [sys.executable, str(root / "tools" / "licences.py"), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| rich | " in done.stdout
    assert "| ? |" not in done.stdout


def test_both_have_a_target(root: Path) -> None:
    text = (root / "Makefile").read_text()
    for target, script in (("audit", "tools/audit.py"), ("licences", "tools/licences.py")):
        recipe = text.split(f"\n{target}: ")[1].split("\n\n")[0]
        assert script in recipe
