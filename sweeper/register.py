"""Tasks, methods, placements and objectives of your own beside the built-in ones, without a fork (docs/extending.md).

What is registered is an option of its group (`dataset=mine`). A digest of the file or notebook cell that registers it
is part of the id of every run made with it. `load` imports modules and files; an installed package names its module as
an entry point of the group `sweeper.plugins`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import linecache
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper.errors import SpecError, SweeperError, gist
from sweeper.spec import OF_FILES, CodeSpec, DatasetSpec, MethodSpec, PlacementSpec, RunSpec, from_mapping, to_mapping

if TYPE_CHECKING:
    from sweeper.lora.forms import AdapterSpec
    from sweeper.lora.trainee import UnpackedSpec
    from sweeper.methods.method import Method, Ranks
    from sweeper.models.architecture import Target
    from sweeper.tasks import Example, Family

ENTRY_POINTS = "sweeper.plugins"


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """`option` is the mapping that the command line chooses by the name."""

    code: CodeSpec
    option: Mapping[str, Any]


KEYS = {"dataset": "family", "method": "name", "placement": "name", "objective": "name"}
"""Group -> the field that has the name of what is registered."""

FOUND: dict[tuple[str, str], Registered] = {}
"""By group and name."""

_loading: list[str] = []  # plugins being imported, the innermost last
_loaded: dict[str, str] = {}  # file -> digest of what was imported


def task(
    name: str, family: "Family | Callable[[DatasetSpec], dict[str, tuple[Example, ...]]] | None" = None, *,
    options: Mapping[str, Any] | None = None, **fields: Any,
) -> Any:  # fmt: skip
    """Registers a task; without `family`, a decorator.

    Args:
        family: a function from the `DatasetSpec` to the splits as text, or all of a `sweeper.tasks.Family`.
        options: defaults of `dataset.options`. fields: defaults of other fields of `DatasetSpec`.

    Raises:
        SpecError: a built-in family has the name, a field is wrong, or the source cannot be read.
    """
    given_fields = {"name": name, "family": name, "options": dict(options or {}), **fields}
    spec = from_mapping(DatasetSpec, given_fields, prefix="dataset.")
    code = _code("dataset", name)

    def add(given: Any) -> Any:
        from sweeper.tasks import FAMILIES

        _add("dataset", name, _Family(given, code, spec.options), FAMILIES, code, to_mapping(spec))
        return given

    return add if family is None else add(family)


def method(
    name: str, made: "Method | Callable[[RunSpec, Ranks], AdapterSpec | UnpackedSpec] | None" = None, **fields: Any
) -> Any:
    """Registers a method; without `made`, a decorator.

    Args:
        made: a `sweeper.methods.Method`, or the function that is its `adapter`. fields: of `Method`, for a function.

    Raises:
        SpecError: as `task`.
    """
    code = _code("method", name)

    def add(given: Any) -> Any:
        from sweeper.methods import METHODS, Method

        found = given if isinstance(given, Method) else Method(adapter=given, **fields)
        option = to_mapping(MethodSpec(name=name, options=dict(found.options)))
        _add("method", name, found, METHODS, code, option)
        return given

    return add if made is None else add(made)


def placement(name: str, pick: "Callable[[Sequence[Target]], Iterable[Target]] | None" = None, **fields: Any) -> Any:
    """Registers a placement; also a decorator of `pick`.

    Args:
        pick: of the modules that roles, patterns and layers choose, those to adapt; left out, all of them.
        fields: of `PlacementSpec`; without roles and patterns, the roles of placement=all.

    Raises:
        SpecError: as `task`.
    """
    from sweeper.placement.placement import PICKS, PLACEMENTS

    code = _code("placement", name)
    roles = {} if {"roles", "patterns"} & fields.keys() else {"roles": PLACEMENTS["all"]}
    spec = from_mapping(PlacementSpec, {"name": name, **roles, **fields}, prefix="placement.")

    def add(given: Any) -> Any:
        PICKS[name] = given
        return given

    _add("placement", name, spec.roles, PLACEMENTS, code, to_mapping(spec))
    PICKS.pop(name, None)
    return add if pick is None else add(pick)


def objective(name: str, made: Any = None, **fields: Any) -> Any:
    """Registers an objective; without `made`, a decorator. `fields` are what `objective=NAME` has.

    Raises:
        SpecError: as `task`.
    """
    code = _code("objective", name)

    def add(given: Any) -> Any:
        from sweeper.objectives import OBJECTIVES

        _add("objective", name, given, OBJECTIVES, code, {"name": name, **fields})
        return given

    return add if made is None else add(made)


def load(plugins: Iterable[str] = ()) -> None:
    """Imports what installed packages name as plugins, then modules and files; each once, a changed file again.

    Raises:
        SpecError: there is no such module or file, or importing it fails.
    """
    for plugin in (*_of_packages(), *plugins):
        with _named(plugin):
            path = Path(plugin).expanduser().absolute()
            if path.suffix == ".py" or path.is_file():
                _load_file(path)
            else:
                _load_module(plugin)


def coded(spec: RunSpec) -> RunSpec:
    """A spec with the code of what is registered here filled in; itself where all of it is built in."""
    parts: dict[str, Any] = {}
    for group, name, section in _sections(spec):
        if (group, name) in FOUND:
            parts[group] = replace(section, code=FOUND[group, name].code)
    return replace(spec, **parts) if parts else spec


def plugins_of(specs: Iterable[RunSpec]) -> tuple[str, ...]:
    """The modules and files that other processes need for some runs; an empty text where they cannot have the code."""
    codes = (section.code for spec in specs for _, _, section in _sections(spec) if section.code)
    return tuple(dict.fromkeys(code.plugin for code in codes))


def missing(spec: RunSpec, groups: Collection[str] = tuple(KEYS)) -> Iterator[str]:
    """A line for each part of a run that is not registered here, or of another source."""
    for group, name, section in _sections(spec):
        if section.code is None or group not in groups:
            continue
        here = FOUND.get((group, name))
        if here is None:
            yield f"{group}={name} is code of your own that is not loaded: {how_to_give(section.code.plugin)}"
        elif here.code.content != section.code.content:
            then, now = str(section.code.content)[:19], str(here.code.content)[:19]
            yield f"{group}={name}: its source is not what it was for the run (then {then}, now {now})"


def _sections(spec: RunSpec) -> Iterator[tuple[str, str, Any]]:
    """Group, name and section of all that can be registered."""
    for group, key in KEYS.items():
        section = getattr(spec, group, None)
        if section is not None:
            yield group, getattr(section, key), section


def how_to_give(plugin: str) -> str:
    """The end of a line on code that is missing."""
    if plugin:
        return f"give plugins=[{plugin}]"
    return "it was registered by a script or notebook; put it into a file and give plugins=[FILE.py]"


def _code(group: str, name: str) -> CodeSpec:
    """The source of whoever calls a function of this module: its file, or its notebook cell."""
    frame = sys._getframe(2)
    path = Path(frame.f_code.co_filename)
    source = path.read_bytes() if path.is_file() else "".join(linecache.getlines(str(path))).encode()
    if not source:
        raise SpecError(f"{group}={name}: its source cannot be read: register it in a file or in a notebook cell")
    module = frame.f_globals.get("__name__", "__main__")
    plugin = _loading[-1] if _loading else "" if module == "__main__" else module
    return CodeSpec(plugin=plugin, content=f"{OF_FILES}{hashlib.sha256(source).hexdigest()}")


def _add(group: str, name: str, value: Any, table: MutableMapping[str, Any], code: CodeSpec, option: Any) -> None:
    key = (group, name)
    if name == "custom" or (name in table and key not in FOUND):
        raise SpecError(f"{group}={name} is built in: give yours another name")
    table[name] = value
    FOUND[key] = Registered(code=code, option=option)


class _Family:
    """A family of tasks as given, or made of the function that loads it; another source is another version."""

    def __init__(self, given: Any, code: CodeSpec, options: Mapping[str, Any]) -> None:
        self.given, self.code = given, code
        self.OPTIONS = {**dict.fromkeys(options, ""), **getattr(given, "OPTIONS", {})}

    def check(self, spec: DatasetSpec) -> None:
        self.given.check(spec) if hasattr(self.given, "check") else self.load(spec)

    def version(self, spec: DatasetSpec) -> str:
        own = self.given.version(spec) if hasattr(self.given, "version") else ""
        return f"{self.code.content} {own}"

    def load(self, spec: DatasetSpec) -> "dict[str, tuple[Example, ...]]":
        from sweeper.tasks import SPLITS

        found = (self.given.load if hasattr(self.given, "load") else self.given)(spec)
        if not isinstance(found, Mapping) or not set(SPLITS) <= found.keys():
            raise SpecError(f"dataset={spec.name}: its function must return the splits {', '.join(SPLITS)}")
        return dict(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)


@functools.cache
def _of_packages() -> tuple[str, ...]:
    return tuple(point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS))


@contextmanager
def _named(plugin: str) -> Iterator[None]:
    try:
        yield
    except SweeperError:
        raise
    except Exception as error:
        raise SpecError(f"plugins={plugin}: cannot be imported ({type(error).__name__}: {gist(error)})") from error


@contextmanager
def _noting(plugin: str) -> Iterator[None]:
    _loading.append(plugin)
    try:
        yield
    finally:
        _loading.pop()


def _load_module(name: str) -> None:
    if name in sys.modules:
        return
    here = str(Path.cwd())
    if here not in sys.path:  # a script's own folder is on the path, not the one it is called from
        sys.path.append(here)
    with _noting(name):
        importlib.import_module(name)


def _load_file(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if _loaded.get(str(path)) == digest:
        return
    name, known = path.stem, sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) != str(path):
        raise SpecError(f"plugins={path}: there is another module {name}: give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _noting(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[str(path)] = digest
