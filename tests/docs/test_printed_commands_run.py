"""Every printed command is carried out: page by page, in order, in an empty folder. `make docs-commands`."""

from pathlib import Path

import pytest

from tests.docs.carried_out import ROOT, Reader, save_model, surroundings
from tools import printed_commands
from tools.printed_commands import Command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # a page has up to 16 commands
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")  # of trackers: their own, and connections that they keep open
        for kind in (
            "DeprecationWarning",
            "FutureWarning",
            "ResourceWarning",
            "pytest.PytestUnraisableExceptionWarning",
        )
    ),
]

FORMS = ("train.py", "evaluate.py", "adapters.py", "-m")


def carried_out(page: Path) -> list[Command]:
    """The commands of a page that are carried out, whole or without the part that needs what is not here."""
    found = []
    for command in printed_commands.commands(page, ROOT):
        if "FOLDER..." in command.text or command.words[0] == "eval":  # a synopsis; and tests/docs/test_completion.py
            continue
        needed = printed_commands.needs(command)
        if needed is None or needed.instead.startswith("composed; the same"):
            found.append(command)
    return list({tuple(command.words): command for command in found}.values())


PAGES = [page for page in printed_commands.pages(ROOT) if carried_out(page)]


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_a_page_can_be_followed(page: Path, tmp_path: Path, registering: None) -> None:
    surroundings(tmp_path)
    for name, text in printed_commands.files(page).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    commands = carried_out(page)
    if any("model.location=folder" in command.text for command in commands):
        save_model(tmp_path / "folder")
    reader = Reader(tmp_path, drawn=page.stem == "paper")
    for command in commands:
        reader.type(command)
