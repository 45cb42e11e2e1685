"""Every printed command is accepted as it is printed; `tests/docs/test_printed_commands_run.py` carries them out."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.types import RunMode

from sweeper import cli, config
from sweeper.adapters import command as adapters
from sweeper.config import grid
from sweeper.rescoring import command as rescoring
from tests.docs.carried_out import ROOT, recipes, split, surroundings
from tools import printed_commands
from tools.printed_commands import Command

EVERY = printed_commands.printed(ROOT)
PROGRAMS = ("train.py", "evaluate.py", "adapters.py")


def of(*names: str) -> list[Command]:
    """The printed commands of some programs, each once, whichever pages print them."""
    found = {tuple(one.words): one for one in EVERY if one.words[1:2] and one.words[1] in names}
    return list(found.values())


def shown(command: Command) -> str:
    return f"{command.page}:{command.line}"


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word and not word.startswith("-")]


def test_there_are_commands_of_every_kind() -> None:
    assert len(EVERY) > 100
    assert {len(of(program)) > 3 for program in PROGRAMS} == {True}
    assert len(of("-m")) > 10


def test_no_command_needs_an_activated_environment() -> None:
    """But for the page on the wheel, whose environment is the reader's own and is activated there."""
    clones = [one for one in EVERY if one.page != "docs/install.md"]
    bare = [shown(one) for one in clones if re.match(r"(\$ )?(python3?|pip|pytest|optuna-dashboard) ", one.text)]
    assert bare == []


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in printed_commands.pages(ROOT)])
def test_training_commands_compose(
    page: str, composer: Any, registering: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole grid as it is printed; no model is loaded, and of the data no more than that its file is there."""
    monkeypatch.chdir(tmp_path)
    surroundings(tmp_path)
    for name, text in printed_commands.files(ROOT / page).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for command in of("train.py"):
        if command.page == page and not {"--help", "-sc", "--from"} & set(command.words):
            accepted(command.words[2:], composer)


def accepted(words: list[str], composer: Any) -> None:
    """Composes what a command asks for.

    Raises:
        SweeperError, HydraException: the command would be refused.
    """
    given = config.unquoted(overrides(words))
    if "--config-dir" in words:
        composer = config.composer_of(words[words.index("--config-dir") + 1])
    config.load_plugins(given)
    multirun = "-m" in words or cli.is_multirun(composer, given)
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    cfg = composer.loader.load_configuration("config", given, mode, validate_sweep_overrides=False)
    typed = list(config.as_typed(cfg.hydra.overrides.task))
    presets = config.axes_of(cfg.hydra.sweeper.get("params")) if multirun else []
    if not multirun:
        assert cli.grid_without_multirun(typed, composer) == []
    problems = list(grid.twice(typed, composer))
    grid.read_grid([*presets, *typed], composer, problems)  # every value of every axis is one that there is
    assert problems == []
    assert config.expand([first_value(word, composer) for word in (*presets, *typed)], composer).specs


def first_value(word: str, composer: Any) -> str:
    """An axis of a group cut to its first option, for options are composed one by one, which is slow."""
    key, equals, value = word.partition("=")
    return f"{key}={split(value)[0]}" if equals and composer.is_group(key) else word


def test_recipes_of_make_compose(composer: Any) -> None:
    for target in printed_commands.TRAINING_TARGETS:
        for words in recipes(target):
            if words[0] == "train.py":
                accepted(words[1:], composer)


def test_targets_of_make_exist() -> None:
    named = {one.words[1] for one in EVERY if one.words[0] == "make"}
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", *sorted(named)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_commands_of_evaluate_compose(composer: Any) -> None:
    for command in of("evaluate.py"):
        datasets, _, _ = rescoring.composed(overrides(command.words[2:]), composer)
        assert datasets or not any(word.startswith("dataset=") for word in command.words)


def test_commands_of_adapters_parse() -> None:
    parser = adapters._parser()
    for command in of("adapters.py"):
        if "FOLDER..." not in command.text:  # a synopsis
            options = parser.parse_args(command.words[2:])
            assert options.command == command.words[2], shown(command)


def test_options_of_modules_exist() -> None:
    for command in of("-m"):
        module = command.words[2]
        if module == "pip":
            continue
        path = ROOT / f"{module.replace('.', '/')}.py"
        source = (path if path.exists() else path.with_suffix("") / "__main__.py").read_text()
        flags = {word for word in command.words[3:] if word.startswith("--")}
        missing = [flag for flag in flags if f'"{flag}"' not in source]
        assert missing == [], shown(command)


def canonical(name: str) -> str:
    """A distribution's name as package indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_extras_that_are_installed_exist_and_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    pins = {canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for command in EVERY:
        if "pip" in command.words[:4]:
            assert "-c constraints.txt" in command.text or "'lora-atlas[" in command.text, shown(command)
            for extra in re.findall(r"\[([\w,]+)\]", command.text):
                for name in extra.split(","):
                    assert {canonical(re.split(r"[^\w.-]", one)[0]) for one in known[name]} - {"pip"} <= pins, shown(
                        command
                    )


def test_what_is_not_run_says_why_and_is_on_the_page_that_lists_it() -> None:
    listed = printed_commands.not_run(ROOT)
    assert 20 < len(listed) < 80
    assert all(one.why and one.instead and pages for one, pages in listed)
    assert not [one.text for one, _ in listed if "train.py" in one.text and "model=tiny" in one.text]


def test_a_block_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "Text with `make sweep`, a bare `.venv/bin/python`, `make sure`, and\n\n"
        "    .venv/bin/python train.py -m rank=4,8 \\\n        seed=0   # why\n\n"
        "```python\nmake = 1\n```\n\n```bash\n# a comment\nmake docs\n```\n\n- item\n\n      not a command\n"
    )
    found = printed_commands.commands(page, tmp_path)
    assert [one.words for one in found if one.words[1] != "sure"] == [
        ["make", "sweep"],
        [".venv/bin/python", "train.py", "-m", "rank=4,8", "seed=0"],
        ["make", "docs"],
    ]
    assert [one.line for one in found][-1] == 12


def test_a_file_that_a_page_prints_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("This is `a/b.yaml`:\n\n```yaml\nx: 1\n```\n\nAnd:\n\n```yaml\ny: 2\n```\n")
    assert printed_commands.files(page) == {"a/b.yaml": "x: 1"}
    assert yaml.safe_load(printed_commands.files(page)["a/b.yaml"]) == {"x": 1}
