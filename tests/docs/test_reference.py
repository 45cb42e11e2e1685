"""The tables of the reference say what the source says, and links of the site lead somewhere."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.carried_out import ROOT
from tools import site_links


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs/_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = extension("reference_tables")
links = extension("repository_links")


@pytest.mark.parametrize("section", list(tables.sections()))
def test_every_field_has_a_meaning(section: str) -> None:
    found = tables.fields_of(section)
    assert found
    assert [one.name for one in found if not one.meaning] == [], "give it an entry under Attributes: of its dataclass"
    assert [one.name for one in found if not one.default] == []


def test_every_section_is_on_the_page() -> None:
    page = (ROOT / "docs/reference/fields.md").read_text()
    assert set(re.findall(r"^```\{fields\} (\w+)", page, re.M)) == set(tables.sections())


def test_every_group_of_conf_is_on_the_page() -> None:
    page = (ROOT / "docs/reference/options.md").read_text()
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and len(list(path.glob("*.yaml"))) > 1}
    shown = set(re.findall(r"^```\{options\} (\w+)", page, re.M))
    assert groups - {"hydra", "objective", "optim", "trainer"} <= shown


def test_defaults_are_those_of_a_run() -> None:
    defaults = {one.name: one.default for section in ("run", "optim", "trainer") for one in tables.fields_of(section)}
    assert defaults["rank"] == "`8`"
    assert defaults["alpha"] == "`null`"
    assert defaults["optim.lr"] == "`0.001`"
    assert defaults["trainer.max_steps"] == "`60`"
    assert "optim.name" not in defaults


def test_comments_of_yaml_belong_to_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text('# A thing (Who et al. 2024): does it. More.\na: 1 # one\nb:\n  c: "x # y"\n  d: 2 # two\ne: 3\n')
    assert tables.comments(path) == {"a": "one", "b.d": "two"}
    assert tables.purpose(path) == "A thing (Who et al. 2024): does it"


def test_every_option_says_what_it_is() -> None:
    groups = ("placement", "method", "dataset", "model", "allocation", "sharing", "experiment", "search")
    silent = [(group, name) for group in groups for name, purpose, _ in tables.options_of(group) if not purpose]
    assert silent == []


def test_a_picture_without_a_caption_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"without a caption \['a'\], without a picture \['b'\]"):
        list(tables.gallery(["b: text"], tmp_path))
    assert list(tables.gallery(["a: text: more"], tmp_path)) == [("a", "text: more")]


def test_links_to_files_of_the_repository_are_shipped(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("SECURITY.md", "docs/page.md", "docs/data.json"):
        (tmp_path / name).touch()
    text = "[a](../SECURITY.md) [b](page.md#x) [c](data.json) [d](https://e.org/f.md) [g](missing.md)"
    found = links.shipped(tmp_path / "docs/page.md", tmp_path / "docs", text)
    assert found == (
        "[a](<path:../SECURITY.md>) [b](page.md#x) [c](<path:data.json>) [d](https://e.org/f.md) [g](missing.md)"
    )


def test_broken_links_of_a_site_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there">x</a><a href="b.html#gone">x</a><a href="c.html">x</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="https://elsewhere.org/">x</a><a href="#there">x</a>')
    assert list(site_links.broken(tmp_path)) == [
        "a.html: b.html#gone: no such anchor",
        "a.html: c.html: no such file",
    ]
