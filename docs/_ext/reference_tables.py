"""Tables of the reference, made from the source when the site is built: they cannot say what the code does not.

A field's type and default are those of its dataclass and of `conf/`; its meaning is the `Attributes:` entry of the
dataclass, else the comment behind it in `conf/`.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar

import yaml

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
LINE = re.compile(
    r"""^(?P<indent> *)(?P<key>[\w-]+):(?P<value>(?:"[^"]*"|'[^']*'|[^#"'])*?)(?:\s+#\s*(?P<comment>.*))?$"""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A field as a user gives it: its name on the command line, what it takes, its default and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def defaults() -> dict[str, str]:
    """Group -> the option that `conf/config.yaml` chooses."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return {key: value for one in listed if isinstance(one, dict) for key, value in one.items() if value}


def comments(path: Path) -> dict[str, str]:
    """Dotted key -> the comment behind it in a YAML file."""
    found, stack = {}, []
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"])
        stack = [(at, key) for at, key in stack if at < depth] + [(depth, match["key"])]
        if match["comment"]:
            found[".".join(key for _, key in stack)] = match["comment"]
    return found


def purpose(path: Path) -> str:
    """The first sentence of the comment at the head of a YAML file."""
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# ").rstrip())
    sentence = re.split(r"\.(?=\s+[A-Z\d]|$)(?<!al\.)|[.:]? docs/|\. \"", " ".join(head), maxsplit=1)[0]
    return sentence[:1].upper() + sentence[1:]


def attributes(kind: Any) -> dict[str, str]:
    """Field -> its entry in the `Attributes:` section of a dataclass's docstring."""
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.getdoc(kind) or "", re.M | re.S)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", section[1] + "\n", re.M | re.S)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def in_words(kind: Any) -> str:
    """What a field takes, in the words of the command line."""
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "any"}
    if isinstance(kind, str):
        return kind
    try:
        return words[kind]
    except (KeyError, TypeError):
        pass
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {in_words(inner[0])}" if inner and inner[0] is not Any else "list"
    return "section" if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))


def sections() -> dict[str, tuple[Any, str, Path | None]]:
    """Section -> its dataclass, the prefix of its fields, and the YAML file that has its defaults."""
    from hydra_plugins.lora_sweeper.ray_launcher import RayLauncherConf  # noqa: F401  registers the launcher

    from sweeper import spec
    from sweeper.study.ray_workers import RaySettings
    from sweeper.study.search_settings import SearchSettings

    kinds = {
        "model": spec.ModelSpec, "dataset": spec.DatasetSpec, "placement": spec.PlacementSpec,
        "allocation": spec.AllocationSpec, "sharing": spec.SharingSpec, "method": spec.MethodSpec,
        "objective": spec.ObjectiveSpec, "optim": spec.OptimSpec, "trainer": spec.TrainerSpec,
        "evaluation": spec.EvaluationSpec,
    }  # fmt: skip
    chosen = defaults()
    # what these say is each option's own, in a table beside this one
    differing = {"model", "dataset", "placement"}
    found: dict[str, tuple[Any, str, Path | None]] = {
        name: (kind, f"{name}.", None if name in differing else CONF / name / f"{chosen[name]}.yaml")
        for name, kind in kinds.items()
    }
    found["run"] = (spec.RunSpec, "", CONF / "config.yaml")
    found["sweep"] = (spec.Settings, "sweep.", CONF / "config.yaml")
    found["search"] = (SearchSettings, "hydra.sweeper.", None)
    found["ray"] = (RaySettings, "hydra.launcher.", None)
    return found


def fields_of(section: str) -> list[Field]:
    """Every field of a section that a user gives, in the order of its dataclass."""

    kind, prefix, path = sections()[section]
    hints = typing.get_type_hints(kind)
    told = attributes(kind)
    shown = yaml.safe_load(path.read_text()) if path else {}
    said = comments(path) if path else {}
    if section == "sweep":
        shown = {
            **shown,
            **shown["sweep"],
            "device": yaml.safe_load((CONF / "trainer/default.yaml").read_text())["device"],
        }
        said |= {key.removeprefix("sweep."): text for key, text in said.items() if key.startswith("sweep.")}
        said["device"] = comments(CONF / "trainer/default.yaml")["device"]
    elif path and section != "run":  # a field that the default option leaves out may be explained by another one
        for other in sorted(path.parent.glob("*.yaml")):
            said = comments(other) | said
        shown = shown.get(section, shown)  # an option with `@package _global_`
    where = {"study": "study", "output_root": "output_root", "plugins": "plugins", "device": "trainer.device",
             "tracking": "tracking", "tracking_options": "tracking.*"}  # fmt: skip
    found = []
    for item in dataclasses.fields(kind):
        if (
            item.metadata.get("made")
            or (item.name == "name" and section != "run")
            or (section == "run" and item.name not in ("rank", "alpha", "seed"))
        ):
            continue
        name = where.get(item.name, f"{prefix}{item.name}") if section == "sweep" else f"{prefix}{item.name}"
        default = shown[item.name] if item.name in shown else _default(item)
        meaning = told.get(item.name) or said.get(item.name) or said.get(f"{section}.{item.name}", "")
        kind_text = in_words(hints[item.name])
        if section == "run" and item.name == "alpha":  # null on the command line becomes twice the rank
            kind_text = f"{kind_text} or null"
        found.append(Field(name=name, kind=kind_text, default=_shown(default), meaning=meaning))
    return found


def _default(item: Any) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else "???"


def _shown(value: Any) -> str:
    if value == "???":
        return "the option's"
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, str):
        line = value.replace("\n", "\\n")
        return f"`` {line} ``" if "`" in line else f"`{line}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def options_of(group: str) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Options of a group: name, purpose, and their own fields in `options` with default and meaning."""
    found = []
    for path in sorted((CONF / group).glob("*.yaml")):
        plain = yaml.safe_load(path.read_text()) or {}
        plain = plain.get(group, plain) if isinstance(plain.get(group), dict) else plain
        said = {key.removeprefix(f"{group}."): text for key, text in comments(path).items()}
        options = plain.get("options") or {}
        own = [(f"{group}.options.{key}", _shown(one), said.get(f"options.{key}", "")) for key, one in options.items()]
        found.append((path.stem, purpose(path), own))
    return found


def program(words: list[str]) -> str:
    """What a command prints, as a reader types it: with the interpreter of the clone's virtual environment."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=_plain(), check=True)
    return done.stdout


def _plain() -> dict[str, str]:
    import os

    path = os.pathsep.join([str(ROOT), str(ROOT / "sweeper" / "plugins")])
    return os.environ | {"COLUMNS": "100", "PYTHONPATH": path, "NO_COLOR": "1"}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def fields_page(section: str) -> str:
    """A table of a section's fields."""
    rows = [(f"`{one.name}`", one.kind, one.default, one.meaning) for one in fields_of(section)]
    return table(("field", "takes", "default", "meaning"), rows)


def options_page(group: str) -> str:
    """A table of a group's options, and one of their own fields."""
    found = options_of(group)
    text = table((f"`{group}=`", "is"), [(f"`{name}`", purpose) for name, purpose, _ in found])
    own = [(f"`{name}`", key, default, meaning) for name, _, options in found for key, default, meaning in options]
    if not own:
        return text
    rows = [(name, f"`{key}`", default, meaning) for name, key, default, meaning in own]
    return f"{text}\n\nFields of their own:\n\n{table((f'`{group}=`', 'field', 'default', 'meaning'), rows)}"


def help_page(command: str) -> str:
    """What a command prints, as a block of text."""
    return f"```text\n{program(command.split()).rstrip()}\n```"


def commands_page(_: str = "") -> str:
    """The commands of these pages that the tests do not carry out, by what they need and what is done instead."""
    from tools import printed_commands

    groups: dict[tuple[str, str], list[str]] = {}
    for one, pages in printed_commands.not_run(ROOT):
        where = ", ".join(page.removeprefix("docs/") for page in pages)
        groups.setdefault((one.why, one.instead), []).append(f"- `{one.text}` ({where})")
    return "\n\n".join(
        f"**Needs {why}.** Instead: {instead}.\n\n" + "\n".join(lines) for (why, instead), lines in groups.items()
    )


def make_targets(_: str = "") -> str:
    """What `make` lists."""
    listed = re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(), re.M)
    return table(("target", "does"), [(f"`make {name}`", does) for name, does in listed])


def gallery(lines: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Picture and caption of each line "name: caption".

    Raises:
        ValueError: a picture of the folder has no caption, or a caption no picture.
    """
    told = dict(line.split(": ", 1) for line in lines if line.strip())
    there = {path.stem for path in folder.glob("*.png")}
    if told.keys() != there:
        alone, missing = sorted(there - told.keys()), sorted(told.keys() - there)
        raise ValueError(f"{folder}: without a caption {alone}, without a picture {missing}")
    yield from told.items()


def setup(app: Any) -> dict[str, bool]:
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    def made_by(write: Callable[[str], str]) -> type:
        class Made(SphinxDirective):
            required_arguments: ClassVar[int] = 0
            optional_arguments: ClassVar[int] = 1
            final_argument_whitespace: ClassVar[bool] = True

            def run(self) -> list[Any]:
                return self.parse_text_to_nodes(write(self.arguments[0] if self.arguments else ""))

        return Made

    class Gallery(SphinxDirective):
        has_content: ClassVar[bool] = True

        def run(self) -> list[Any]:
            try:
                found = list(gallery(list(self.content), ROOT / "docs" / "example"))
            except ValueError as error:
                raise self.error(str(error)) from None
            figure = "```{{figure}} /example/{0}.png\n:alt: {1}\n\n`{0}`: {1}\n```"
            text = "\n\n".join(figure.format(name, caption) for name, caption in found)
            return self.parse_text_to_nodes(text)

    class Mermaid(SphinxDirective):
        """A diagram: its picture where there is one of this very source, else the source.

        The picture is made once, so that the site needs no script of another host:
        `mmdc -i diagram.mmd -o docs/_static/diagrams/DIGEST.svg`, the first 12 digits of the source's SHA-256.
        """

        has_content: ClassVar[bool] = True

        def run(self) -> list[Any]:
            source = "\n".join(self.content)
            name = f"_static/diagrams/{hashlib.sha256(source.strip().encode()).hexdigest()[:12]}.svg"
            if (ROOT / "docs" / name).exists():
                return self.parse_text_to_nodes(f"```{{image}} /{name}\n:alt: diagram\n:class: diagram\n```")
            return [nodes.literal_block("", source, language="text")]

    for name, write in (("fields", fields_page), ("options", options_page), ("program", help_page),
                        ("make-targets", make_targets), ("not-run", commands_page)):  # fmt: skip
        app.add_directive(name, made_by(write))
    app.add_directive("gallery", Gallery)
    app.add_directive("mermaid", Mermaid)
    return {"parallel_read_safe": True}
