"""A command's overrides read as a grid: what is fixed, what are axes, what is tuned inside every arm."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from sweeper.arms import Dimension
from sweeper.config.build import SECTIONS, one_option
from sweeper.config.composer import Composer
from sweeper.errors import SpecError, unknown
from sweeper.placement import lattice
from sweeper.spec import RunSpec

PLACEMENT, LATTICE_FIELDS = "placement", ("placement.of", "placement.sizes")
MOST_VALUES, MOST_ARMS = 10_000, 100_000  # of one axis, of a grid: more are a slip, and would take all memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One swept field or group: every value once as Hydra reads it and once as it is typed."""

    key: str
    values: tuple[Any, ...]
    typed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """`tuned` are the groups whose option is tuned, as axes; `space` is all that is tuned.

    `by_method` are the tuned fields whose range, where a method has one of its own, is the method's; a grid of numbers
    is moved there. `unread` are the keys of overrides that cannot be read, `unknown` groups and options that there are
    not.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    groups: frozenset[str]
    space: tuple[Dimension, ...] = ()
    tuned: tuple[Axis, ...] = ()
    by_method: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    unknown: tuple[tuple[str, str], ...] = ()

    @property
    def cell_axes(self) -> tuple[Axis, ...]:
        return (*(axis for axis in self.axes if axis.key in self.groups), *self.tuned)

    def space_of(self, spec: RunSpec) -> tuple[Dimension, ...]:
        """What is tuned in the arm of a run."""
        if not self.by_method or any(axis.key == "method" for axis in self.tuned):
            return self.space
        from sweeper import methods

        own = methods.find(spec.method.name).ranges
        return tuple(d.moved(*own[d.key]) if d.key in self.by_method and d.key in own else d for d in self.space)


def read_grid(overrides: Sequence[str], composer: Composer, problems: list[str]) -> Grid:
    """The grid of a command; of several overrides of one key the last counts.

    Overrides that cannot be used are left out, and `problems` gets a line for each.
    """
    reader = _Reader(composer=composer, problems=problems)
    for line in _joined(overrides, problems):
        try:
            override = composer.parse(line)
        except HydraException:
            problems.append(_unreadable(line))
            reader.unread.add(line.partition("=")[0].lstrip("+~"))
            continue
        if not override.is_hydra_override():
            reader.take(override)
        elif override.is_sweep_override():
            key, _, values = line.partition("=")
            problems.append(f"{line}: {key} is no axis of a grid. Give one value; a list is '{key}=[{values}]'")
        elif composer.is_group(override.key_or_group):
            reader.known_options(override, [override.value()])
    return reader.grid()


def twice(typed: Sequence[str], composer: Composer) -> Iterator[str]:
    """A line for each axis that is typed twice; of single values the last counts, as Hydra has it.

    Args:
        typed: what a person gave. A preset's axes are not in it: they are there to be given anew.
    """
    found: dict[str, list[Override]] = {}
    for line in _joined(typed, []):
        with contextlib.suppress(HydraException):  # which has a line elsewhere
            override = composer.parse(line)
            found.setdefault(override.get_key_element(), []).append(override)
    for key, own in found.items():
        if len(own) > 1 and any(one.is_sweep_override() for one in own):
            both = " and ".join(str(one.input_line) for one in own)
            yield f"{key} is there {'twice' if len(own) == 2 else f'{len(own)} times'}: {both}. Give one of them."


def _joined(overrides: Sequence[str], problems: list[str]) -> list[str]:
    """The overrides, less those that white space took apart, which get a line each."""
    kept, words = [], list(overrides)
    while words:
        word = words.pop(0)
        follows = "" if not words or "=" in words[0].strip("=") else words[0]
        if "=" not in word and follows.startswith("="):
            value = follows[1:] or (words[1] if len(words) > 1 else "...")
            problems.append(f"{word} {follows}: no spaces around the equals sign: '{word}={value}'")
            del words[: 1 if follows[1:] else 2]
        elif word.endswith("=") and follows:
            problems.append(f"{word} {follows}: no spaces around the equals sign: '{word}{follows}'")
            del words[:1]
        elif "=" in word and word.endswith(","):
            problems.append(f"{word} {follows}".strip() + f": no spaces in a list: '{word}{follows or '...'}'")
            del words[: bool(follows)]
        else:
            kept.append(word)
    return kept


def _unreadable(line: str) -> str:
    key, equals, value = line.partition("=")
    if not equals:
        return f"{line}: cannot be read. Write field=value; quote values with commas, brackets or spaces."
    if re.fullmatch(r"\([^()=]*,[^()=]*\)", value):
        inner = value[1:-1]
        return f"{line}: cannot be read. Several values are '{key}={inner}' with -m, one list is '{key}=[{inner}]'"
    if not value.isascii() and not _QUOTED.fullmatch(value):
        return f"{line}: cannot be read. Letters beyond ASCII need quotes of their own: '{key}=\"{value}\"'"
    if (inside := _SWEEP_OF_NULL.search(value)) and not value.startswith("tag"):
        return f"{line}: cannot be read. Hydra takes no null in {inside[1]}(): write '{key}={inside[2]}'"
    if inside:
        return f"{line}: cannot be read. Hydra takes no null in {inside[1]}(): make it an axis, '{key}={inside[2]}'"
    if value.startswith("{") and (readable := _readable(key.lstrip("+"), value)):
        return f"{line}: cannot be read. Hydra has no quoted keys: write '{key}={readable}'"
    if '"' in value or "'" in value:
        return f"{line}: cannot be read. Write field=value; quote values with commas, brackets or spaces."
    if value.startswith("[") and value.endswith("]"):
        parts = [value[1:-1]] if set("{(") & set(value) else value[1:-1].split(",")
        value = "[" + ",".join(f'"{part.strip()}"' for part in parts) + "]"
        return f"{line}: cannot be read. Regular expressions need quotes of their own: '{key}={value}'"
    return (
        f"{line}: cannot be read. Values with commas, brackets or spaces need quotes of their own: '{key}=\"{value}\"'"
    )


_QUOTED_KEY = re.compile(r"""[{,]\s*("[^"]*"|'[^']*')\s*:""")
_QUOTED = re.compile(r"""("|').*\1""")
_SWEEP_OF_NULL = re.compile(r"\b(choice|sort|shuffle)\(((?:[^()]*,)?\s*null\s*(?:,[^()]*)?)\)", re.IGNORECASE)
_PAIR = re.compile(
    r"""\s*("(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>.*?))\s*:"""
    r"""\s*(?P<value>[^,:{}"']+|"[^"]*"|'[^']*')\s*(,|$)"""
)
_BARE_KEY = re.compile(
    r"([\w/+.$%*@?|\- ]|\\(?![\\()\[\]{}:=, ]))+"
)  # what is no quote, no bracket, no escape to Hydra
_AS_LISTS = ("allocation.pattern", "model.roles")


def unquoted(words: Iterable[str]) -> list[str]:
    """Words of a command in which mappings with quoted keys, which Hydra cannot read, have a form that it can."""
    return [_unquoted(word) for word in words]


def _unquoted(word: str) -> str:
    key, _, value = word.partition("=")
    if not (value.startswith("{") and _QUOTED_KEY.search(value)):
        return word
    readable = _readable(key.lstrip("+"), value)
    return word if readable is None else f"{key}={readable}"


def _readable(key: str, value: str) -> str | None:
    """A mapping with keys that Hydra cannot read in a form that it can; None where there is none."""
    inner, pairs, at = value.strip()[1:-1], [], 0
    while at < len(inner):
        match = _PAIR.match(inner, at)
        if match is None:
            return None
        name = next(text for text in (match["double"], match["single"], match["bare"]) if text is not None)
        pairs.append((name, match["value"].strip()))
        at = match.end()
    if pairs and all(_BARE_KEY.fullmatch(name) for name, _ in pairs):
        return "{" + ", ".join(f"{name}: {given}" for name, given in pairs) + "}"
    if pairs and key in _AS_LISTS:
        return "[" + ",".join(f'"{name}:{given.strip(_QUOTES)}"' for name, given in pairs) + "]"
    return None


_QUOTES = "\"'"


@dataclass(kw_only=True, slots=True)
class _Reader:
    """What the overrides read so far make of each key."""

    composer: Composer
    problems: list[str]
    fixed: dict[str, str] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    space: dict[str, Dimension] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    by_method: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    lattice: dict[str, Any] = field(default_factory=dict)

    def take(self, override: Override) -> None:
        key = override.get_key_element()
        if key in LATTICE_FIELDS and not override.is_sweep_override():
            self.lattice[key.partition(".")[2]] = override.value()
        self.fixed.pop(key, None)
        self.space.pop(key, None)
        group = self.composer.is_group(override.key_or_group) and not isinstance(override.value(), dict)
        if not override.is_sweep_override():
            self._fix(key, override, group)
        elif override.is_interval_sweep() or "tune" in getattr(override.value(), "tags", ()):
            self.axes.pop(key, None)
            if self._tune(key, override, group) and group:
                self._vary(key, override, group)
        else:
            self._vary(key, override, group)

    def grid(self) -> Grid:
        self._spread_lattice()
        return Grid(
            fixed=tuple(self.fixed.values()),
            axes=tuple(axis for key, axis in self.axes.items() if key not in self.space),
            groups=frozenset(self.groups & self.axes.keys() - self.space.keys()),
            space=tuple(self.space.values()),
            tuned=tuple(self.axes[key] for key in self.space if key in self.axes),
            by_method=frozenset(self.by_method & self.space.keys()),
            unread=frozenset(self.unread),
            unknown=tuple(self.unknown),
        )

    def _spread_lattice(self) -> None:
        """Puts the placements that `placement=lattice` stands for in its place."""
        axis = self.axes.get(PLACEMENT)
        given = axis.values if axis is not None else (self.fixed.get(PLACEMENT, "").partition("=")[2],)
        if lattice.LATTICE not in given or PLACEMENT in self.space:
            return
        preset = self.composer.option(PLACEMENT, lattice.LATTICE)
        for key in (PLACEMENT, *LATTICE_FIELDS):
            self.fixed.pop(key, None)
        try:
            every = lattice.placements(**{key: self.lattice.get(key, preset[key]) for key in ("of", "sizes")})
        except SpecError as error:
            self.problems.extend(error.lines)
            every = ()
        names = dict.fromkeys(name for one in given for name in (every if one == lattice.LATTICE else (str(one),)))
        names = names or {"full": None}  # what is wrong has a line, and the rest of the grid is checked
        for name in names:
            self.composer.has_option(PLACEMENT, name)
        self.groups.add(PLACEMENT)
        self.axes.pop(PLACEMENT, None)
        self.axes = {PLACEMENT: Axis(key=PLACEMENT, values=tuple(names), typed=tuple(names)), **self.axes}

    def _fix(self, key: str, override: Override, group: bool) -> None:
        if not group or self.known_options(override, [override.value()]):
            self.axes.pop(key, None)
            self.fixed[key] = str(override.input_line)

    def _tune(self, key: str, override: Override, group: bool) -> bool:
        """Adds a dimension to the space; false where it cannot be tuned."""
        dimension = _dimension(override, group, self.problems)
        if dimension is None:
            return False
        self.space[key] = dimension
        self.by_method.discard(key)
        if "method" in getattr(override.value(), "tags", ()):
            self.by_method.add(key)
        return True

    def _vary(self, key: str, override: Override, group: bool) -> None:
        """Adds an axis; of a group, with the options that there are."""
        axis = _axis(override, self.composer.options(override.key_or_group) if group else (), self.problems)
        if axis is None:
            return
        if group:
            kept = self.known_options(override, axis.values)
            places = [place for place, value in enumerate(axis.values) if value in kept]
            if not places:
                return
            axis = Axis(
                key=key,
                values=tuple(axis.values[place] for place in places),
                typed=tuple(axis.typed[place] for place in places),
            )
            self.groups.add(key)
        self.axes[key] = axis

    def known_options(self, override: Override, values: Sequence[Any]) -> list[Any]:
        """Those of `values` that are options of the override's group; a line for each other."""
        group, kept = override.key_or_group, []
        if override.is_delete():
            return list(values)
        for value in values:
            if isinstance(value, list) and group in SECTIONS:
                self.problems.append(one_option(group))
                continue
            names = value if isinstance(value, list) else [value]
            strange = [n for n in names if not isinstance(n, str) or not self.composer.has_option(group, n)]
            if not strange:
                kept.append(value)
            self.problems.extend(_no_option(group, name, self.composer) for name in strange)
            self.unknown.extend((group, str(name)) for name in strange)
        return kept


def _dimension(override: Override, group: bool, problems: list[str]) -> Dimension | None:
    key, line = override.get_key_element(), override.input_line
    value: Any = override.value()
    if key == "seed" or is_setting(override.key_or_group):
        problems.append(f"{line}: {key} is not tuned. Tune what changes how well a run learns, such as optim.lr.")
        return None
    if group and override.is_interval_sweep():
        problems.append(f"{line}: {key} is a group of options. Tune among them: '{key}=tag(tune,choice(a,b))'")
        return None
    try:
        if override.is_interval_sweep():
            kind: Any = "int" if isinstance(value.start, int) and isinstance(value.end, int) else "float"
            return Dimension(key=key, kind=kind, low=value.start, high=value.end, log="log" in value.tags)
        every = itertools.islice(override.sweep_iterator(Transformer.identity), MOST_VALUES + 1)
        choices = tuple(Override._convert_value(one) for one in every)
        if len(choices) > MOST_VALUES:
            problems.append(f"{line}: more than {MOST_VALUES:,} values. Give fewer, or tune over interval(...)")
            return None
        return Dimension(key=key, kind="choice", choices=tuple(dict.fromkeys(choices)))
    except (SpecError, TypeError) as error:
        problems.append(f"{line}: {error}" if isinstance(error, SpecError) else f"{line}: choose among plain values")
        return None


def _axis(override: Override, options: Sequence[str], problems: list[str]) -> Axis | None:
    key, line = override.get_key_element(), override.input_line
    try:
        found = list(itertools.islice(override.sweep_iterator(transformer=Transformer.identity), MOST_VALUES + 1))
    except ValueError as error:  # a step of 0
        problems.append(f"{line}: {error}")
        return None
    if len(found) > MOST_VALUES:
        problems.append(f"{line}: more than {MOST_VALUES:,} values. Give fewer, or tune over interval(...)")
        return None
    if not found:
        advice = f"Choose from {', '.join(options)}." if options else f"Give a list: {key}=a,b,c"
        problems.append(f"{line}: there is no value in this axis. {advice}")
        return None
    if is_setting(override.key_or_group):
        problems.append(f"{line}: {key} does not change a result, so it is no axis of a grid. Give one value.")
        return None
    return Axis(
        key=key,
        values=tuple(Override._convert_value(value) for value in found),
        typed=tuple(Transformer.str(value) for value in found),
    )


# parts of Hydra that people know by name, and the packages they come in
PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "rq": "hydra-rq-launcher",
    "optuna": "hydra-optuna-sweeper",
    "ax": "hydra-ax-sweeper",
    "nevergrad": "hydra-nevergrad-sweeper",
}


def _no_option(group: str, name: Any, composer: Composer) -> str:
    if group == PLACEMENT and "+" in str(name):
        try:
            lattice.roles_of(str(name))
        except SpecError as error:
            return str(error)
    line = unknown(group, "null" if name is None else str(name), composer.options(group))
    if group in ("hydra/launcher", "hydra/sweeper") and name in PLUGINS:
        return f"{line} {name} comes with pip install {PLUGINS[name]}."
    if group == "model" and "/" in str(name):
        hub = "" if str(name).startswith((".", "/", "~")) else ", one of the hub with model.source=hub beside it"
        return f"model={name}: no such model. A folder is given as 'model=path model.location={name}'{hub}."
    if group == "dataset" and re.search(r"\.(jsonl?|csv|tsv|parquet)$|/", str(name)):
        return f"dataset={name}: no such dataset. A file is given as 'dataset=file dataset.path={name}'."
    return line


def is_setting(key: str) -> bool:
    """Whether a field changes no result, and so is no part of a run."""
    return key in ("study", "output_root", "plugins", "trainer.device") or key.split(".")[0] in ("tracking", "sweep")
