"""The audit fails on what was found and on what was not looked up; every pin has a licence."""

import importlib
import json
import shutil
import struct
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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium: apt-get install chromium")
def test_a_picture_of_the_readme_is_as_high_as_its_text(root: Path, tmp_path: Path) -> None:
    sizes = {}
    for width in (1012, 390):
        picture = tmp_path / f"{width}.png"
        subprocess.run(
            [sys.executable, str(root / "tools" / "readme_shot.py"), str(picture), "--width", str(width)], check=True
        )
        sizes[width] = struct.unpack(">II", picture.read_bytes()[16:24])
    assert [wide for wide, _ in sizes.values()] == [1012, 390]
    assert sizes[390][1] > sizes[1012][1] > 1000


@pytest.fixture
def terminal_shot(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "tools"))
    return importlib.import_module("terminal_shot")


def test_a_shot_is_an_svg_that_needs_nothing_from_elsewhere(terminal_shot: Any) -> None:
    line = (("a", "green"), ("b", ""), (" ", ""))
    shot = terminal_shot.Shot(lines=(line, ()), live=True)
    assert shot.text == "ab\n"
    svg = terminal_shot.picture(shot, columns=40, title="40 columns")
    assert "40&#160;columns" in svg or "40 columns" in svg
    assert "font-face" not in svg
    assert "url(http" not in svg


def test_midway_is_the_middle_of_what_was_live(terminal_shot: Any) -> None:
    found = [terminal_shot.Shot(lines=(((name, ""),),), live=name in "bcd") for name in "abcde"]
    assert terminal_shot.midway(found).text == "c\n"
    assert terminal_shot.midway([found[0]]).text == "a\n"


def test_a_command_is_seen_as_its_terminal_shows_it(terminal_shot: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyte")
    code = "print('x' * 30); print('two\\rT'); print('\\x1b[31mred\\x1b[0m')"
    found = terminal_shot.shots([sys.executable, "-c", code], columns=20, rows=8, folder=tmp_path)
    assert found[-1].text.splitlines() == ["x" * 20, "x" * 10, "Two", "red"]
    assert found[-1].lines[3][0] == ("r", "red")
