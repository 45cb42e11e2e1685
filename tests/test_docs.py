"""The map in docs/architecture.md leads to every part of the source, and to nothing that is gone."""

import re
from pathlib import Path

PARTS = ("sweeper", "analysis")
LISTED = (
    *PARTS,
    *(
        f"sweeper/{folder}"
        for folder in ("models", "objectives", "placement", "reporting", "rescoring", "study", "training", "untrusted")
    ),
)


def mapped(root: Path) -> list[str]:
    rows = re.findall(r"^\| (.*?) \|", (root / "docs" / "architecture.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)]


def test_every_module_and_folder_is_on_the_map(root: Path) -> None:
    names = {Path(name).name for name in mapped(root)}
    found = [path for part in LISTED for path in (root / part).iterdir() if not path.name.startswith("_")]
    modules = [path for path in found if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))]
    assert len(modules) > 40
    assert [path for path in modules if path.name not in names and path.name != "plugins"] == []


def test_what_is_on_the_map_exists(root: Path) -> None:
    for name in mapped(root):
        pattern = name.rstrip("/")
        assert (root / pattern).exists() or any(path for part in PARTS for path in (root / part).rglob(pattern)), name
