"""The audit fails on what was found and on what was not looked up; every pin has a licence."""

import importlib
import json
import shutil
import struct
import subprocess
import sys
import tomllib
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
    assert "| forbidden |" not in done.stdout


@pytest.fixture
def licences(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "tools"))
    return importlib.import_module("licences")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MIT", "permissive"), ("BSD License", "permissive"), ("MPL-2.0 AND (Apache-2.0 OR MIT)", "weak copyleft"),
        ("GNU Lesser General Public License v3 (LGPLv3)", "weak copyleft"), ("LGPL-2.1-or-later", "weak copyleft"),
        ("GPL-3.0-only", "forbidden"), ("GNU Affero General Public License v3", "forbidden"),
        ("MIT AND GPL-2.0-only", "forbidden"), ("GPL-2.0-only OR MIT", "permissive"), ("CC-BY-NC-4.0", "forbidden"),
        ("CC-BY-4.0", "permissive"), ("Other/Proprietary License", "forbidden"), ("Custom terms", "unknown"),
        ("MIT AND Custom", "unknown"), ("SSPL-1.0", "forbidden"), ("CC-BY-SA-4.0", "forbidden"),
    ],
)  # fmt: skip
def test_a_licence_is_of_a_kind(name: str, kind: str, licences: Any) -> None:
    assert licences.kind(name) == kind


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("License-Expression: GPL-3.0-only", "a-b 1.0: GPL-3.0-only (forbidden)"),
        ("License: UNKNOWN", "a-b 1.0: no licence named (unknown)"),
        ("License-Expression: MIT", ""),
    ],
)
def test_a_licence_that_does_not_do_is_a_failure(
    says: str, line: str, licences: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "a_b-1.0.dist-info").mkdir()
    (tmp_path / "a_b-1.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: a-b\nVersion: 1.0\n{says}\n"
    )
    (tmp_path / "pins.txt").write_text("a-b==1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert licences.main([str(tmp_path / "pins.txt")]) == bool(line)
    assert capsys.readouterr().err.strip() == line


# ---- docs/robustness.md ----


@pytest.fixture
def robustness(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root))
    return importlib.import_module("tools.robustness")


def test_the_page_says_what_was_measured(robustness: Any) -> None:
    page = robustness.PAGE.read_text()
    made = robustness.sections()
    assert set(made) == {"Bad input", "The sandbox", "Versions"}
    for title, body in made.items():
        assert robustness.with_section(page, title, body) == page, f"{title}: .venv/bin/python -m tools.robustness page"


def test_what_was_measured_is_enough(robustness: Any) -> None:
    fuzzed = json.loads(robustness.FUZZ.read_text())
    assert not sum(row["tracebacks"] for row in fuzzed.values())
    assert fuzzed["commands, in one process"]["distinct"] >= 2000
    assert fuzzed["commands, each a process"]["distinct"] >= 200
    tried = json.loads(robustness.SANDBOX.read_text())["users"]
    assert set(tried) == {"root", "not root"}
    for kinds in tried.values():
        assert {kind: row["tried"] for kind, row in kinds.items()} == {
            kind: len(names) for kind, names in robustness.attacks().items()
        }
        assert not [name for row in kinds.values() for name in row["not_held"]]


def test_a_section_is_put_in_the_place_of_the_former(robustness: Any) -> None:
    page = "# Top\n\n## A\n\nold\n\n## B\n\nkept\n"
    assert robustness.with_section(page, "A", "new") == "# Top\n\n## A\n\nnew\n\n## B\n\nkept\n"
    assert robustness.with_section(page, "B", "new") == "# Top\n\n## A\n\nold\n\n## B\n\nnew\n"
    assert robustness.with_section("# Top\n", "A", "new") == "# Top\n\n## A\n\nnew\n"


def test_figures_of_several_parts_are_added_up(robustness: Any, tmp_path: Path) -> None:
    part = {"kind": "k", "accepted": 1, "refused": 1, "tracebacks": 0, "seconds": 60.0}
    for name, digests in (("a", ["x", "y"]), ("b", ["y", "z"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part | {"digests": digests}))
    found = robustness.gathered(tmp_path)
    assert found == {"k": {"distinct": 3, "accepted": 2, "refused": 2, "tracebacks": 0, "minutes": 2.0}}
    assert "| k | 3 | 2 | 2 | 0 |" in robustness.bad_input(found)
    with pytest.raises(ValueError, match="run make fuzz"):
        robustness.gathered(tmp_path / "nowhere")


# ---- the matrix ----


@pytest.fixture
def matrix(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root))
    return importlib.import_module("tools.matrix")


def test_every_requirement_has_a_floor(matrix: Any, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = matrix.requirements(project, matrix.EXTRAS)
    found = dict(pin.split("==") for pin in matrix.floors(asked))
    assert {"torch", "transformers", "peft", "optuna", "pandas", "numpy", "tensorboard", "wandb", "pytest"} <= set(
        found
    )
    assert "lora-atlas" not in found
    with pytest.raises(ValueError, match="x<2 has no lower bound"):
        matrix.floors(["x<2"])


def test_a_cell_that_cannot_run_says_why(matrix: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FIGURES", tmp_path / "matrix.json")
    (tmp_path / "pyproject.toml").write_text((Path(__file__).parent.parent / "pyproject.toml").read_text())
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(matrix, "CELLS", (matrix.Cell(name="old", python="2.0", versions="pins"),))
    assert matrix.main([]) == 0
    cell = json.loads((tmp_path / "matrix.json").read_text())["old"]
    assert cell["not_run"] == "no Python 2.0 is installed here"


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("x\nFAILED tests/a.py::b - c\n= 1 failed, 9 passed, 2 skipped in 3s =", (9, 1, 2, 0, ["tests/a.py::b"])),
        ("ERROR tests/a.py\n= 2 errors in 3s =", (0, 0, 0, 2, ["tests/a.py"])),
        ("", (0, 0, 0, 0, [])),
    ],
)
def test_counts_are_pytests(matrix: Any, log: str, found: tuple[Any, ...]) -> None:
    assert tuple(matrix.counts(log, 0)[key] for key in (*matrix.KINDS, "failures")) == found


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
