"""Configurations composed by Hydra, as few as will do.

Hydra needs about 40 ms to compose one configuration. A grid is therefore composed once per combination of group
options, a cell; plain values (rank, seed, optim.lr, ...) are set directly on the composed result.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeper.config.build import SCALARS, SECTIONS, SETTINGS, Builder, Plain
from sweeper.config.composer import Composer, one_line
from sweeper.config.grid import PLACEMENT, Axis, Grid
from sweeper.errors import SpecError, no_such_field
from sweeper.placement import lattice
from sweeper.spec import RunSpec


@dataclass(kw_only=True, slots=True)
class Cell:
    """One combination of group options: its composed configuration, ready to take plain values."""

    compose: Callable[[], DictConfig]
    plain: Plain
    live: bool
    working: DictConfig | None = None
    sections: dict[tuple[str, str], Any] = field(default_factory=dict)

    def run(self, values: Mapping[str, Any], builder: Builder) -> RunSpec | None:
        if self.live or not all(_is_simple(self.plain, key, value) for key, value in values.items()):
            plain = self._through_omegaconf(values, builder.problems)
            return None if plain is None else builder.run(plain, {})
        plain = dict(self.plain)
        for key, value in values.items():
            _put(plain, key, value)
        return builder.run(plain, self.sections, values)

    def _through_omegaconf(self, values: Mapping[str, Any], problems: list[str]) -> Plain | None:
        if self.working is None or any(isinstance(value, dict) for value in values.values()):
            self.working = copy.deepcopy(self.compose())
        cfg = self.working  # every run of a cell sets the same keys, so nothing of another run stays
        for key, value in values.items():
            name, add = key.lstrip("+"), key.startswith("+")
            try:
                OmegaConf.update(cfg, name, value, merge=True, force_add=add)
            except OmegaConfBaseException:
                problems.append(_no_such_field(name, self.plain))
                return None
        problems.extend(unused(cfg))
        return plain_of(cfg, problems)


def cells_of(grid: Grid, composer: Composer, problems: list[str]) -> Iterator[tuple[tuple[int, ...], Cell]]:
    """The composed configuration of each combination of group options, by the options' places."""
    axes = grid.cell_axes
    cells: dict[tuple[int, ...], Cell] = {}

    def typed(choice: tuple[int, ...]) -> list[str]:
        return [f"{axis.key}={axis.typed[place]}" for axis, place in zip(axes, choice, strict=True)]

    def cell(choice: tuple[int, ...]) -> Cell | None:
        if choice not in cells:
            cfg = _compose(grid.fixed, typed(choice), composer, problems)
            if cfg is None:
                return None
            problems.extend(unused(cfg))
            live = _has_interpolation(OmegaConf.to_container(cfg, resolve=False), (*SECTIONS, *SCALARS))
            cells[choice] = Cell(compose=lambda: cfg, plain=plain_of(cfg, problems), live=live)
        return cells[choice]

    sections = _separable(axes, cell)
    for choice in itertools.product(*(range(len(axis.values)) for axis in axes)):
        if sections is None or choice in cells:
            found = cell(choice)
        else:
            parts = {axis.key: sections[axis.key][place] for axis, place in zip(axes, choice, strict=True)}
            found = Cell(
                compose=partial(composer.compose, [*grid.fixed, *typed(choice)]),
                plain={**cells[(0,) * len(axes)].plain, **parts},
                live=False,
            )
        if found is not None:
            yield choice, found


def _separable(axes: Sequence[Axis], cell: Callable[[tuple[int, ...]], Cell | None]) -> dict[str, list[Plain]] | None:
    """Each group's section for each of its options, where options of one group change no other part; else None.

    Then composing each option once is enough, instead of each combination of options.
    """
    if len(axes) < 2 and all(_sum_of_roles(axis.key, name) is None for axis in axes for name in axis.values):
        return None
    sections: dict[str, list[Plain]] = {}
    for number, axis in enumerate(axes):
        sums = {place: made for place, one in enumerate(axis.values) if (made := _sum_of_roles(axis.key, one))}
        first = min(sums, default=None)  # the other sums differ from it in name and roles alone
        composed = [place for place in range(len(axis.values)) if place not in sums or place == first]
        found = [cell((0,) * number + (place,) + (0,) * (len(axes) - number - 1)) for place in composed]
        rests = [{key: value for key, value in one.plain.items() if key != axis.key} for one in found if one]
        if any(one is None or one.live for one in found) or any(rest != rests[0] for rest in rests):
            return None
        parts = {place: one.plain[axis.key] for place, one in zip(composed, found, strict=True) if one is not None}
        if first is not None:
            parts |= {place: parts[first] | made for place, made in sums.items() if place != first}
        sections[axis.key] = [parts[place] for place in range(len(axis.values))]
    return sections


def _sum_of_roles(group: str, name: Any) -> Plain | None:
    made = lattice.option(str(name)) if group == PLACEMENT else None
    return None if made is None else {key: made[key] for key in ("name", "roles")}


def _compose(fixed: Sequence[str], chosen: Sequence[str], composer: Composer, problems: list[str]) -> DictConfig | None:
    try:
        return composer.compose([*fixed, *chosen])
    except SpecError as error:
        whole = error
    # Which override is to blame? Leave each out in turn, so that the others are still checked.
    good: list[str] = []
    for line in (*fixed, *chosen):
        try:
            composer.compose([*good, line])
        except SpecError as error:
            problems.append(_blame(composer.parse(line), composer, good, error))
        else:
            good.append(line)
    if len(good) == len(fixed) + len(chosen):
        problems.append(str(whole))
    try:
        return composer.compose(good)
    except SpecError as error:
        problems.append(str(error))
        return None


def _blame(override: Override, composer: Composer, good: Sequence[str], error: SpecError) -> str:
    if "Could not override" in str(error):
        cfg, key, value = composer.compose(good), override.key_or_group, override.value()
        known = OmegaConf.select(cfg, key)
        if isinstance(value, dict) and known:  # a mapping is merged: one of its fields is not there
            key = next((f"{key}.{name}" for name in value if name not in known), key)
        given = None if isinstance(value, dict) else str(override.input_line).partition("=")[2]
        return _no_such_field(key, plain_of(cfg, []), lambda name: _with_value(name, given, composer, good))
    return str(error)


def _with_value(name: str, value: str | None, composer: Composer, good: Sequence[str]) -> str:
    """A field that was meant with the value that was given, or with the nearest that it takes."""
    if value is None:
        return name
    wrong: list[str] = []
    with suppress(SpecError):
        Builder(wrong, composer).run(plain_of(composer.compose([*good, f"{name}={value}"]), wrong), {})
    nearest = next((found[1] for line in wrong if (found := re.search(r"Did you mean (\S+)\?$", line))), value)
    return f"{name}={nearest}"


def _no_such_field(key: str, plain: Plain, spelled: Callable[[str], str] = str) -> str:
    """Names the fields of the deepest part of `key` that exists; `spelled` is how one is written that was meant."""
    *parents, leaf = key.split(".")
    node: Any = plain
    path: list[str] = []
    for part in parents:
        if not isinstance(node, dict) or not isinstance(node.get(part), dict):
            leaf = part
            break
        node = node[part]
        path.append(part)
    choices = [".".join([*path, name]) for name in node if name != "options"]
    whole = ".".join([*path, leaf])
    if leaf in node and not isinstance(node[leaf], dict | None):
        return f"{key}: {whole} is one value without fields. Give it as {whole}=..."
    if leaf in node:
        return f"{whole} has no keys yet; where it takes any, they are added with '+{whole}={{...}}'"
    if not choices:
        return f"{'.'.join([*path, leaf])}: no such field; {'.'.join(path)} has none here."
    meant = () if path else sorted(_paths_to(leaf, plain))
    return no_such_field(whole, choices, meant=list(map(spelled, meant)))


def _paths_to(leaf: str, node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields that end in a name."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == leaf and prefix:
            yield f"{prefix}{key}"
        yield from _paths_to(leaf, value, f"{prefix}{key}.")


def unused(cfg: DictConfig) -> list[str]:
    """A line for each field beside those that there are; one that another's value is interpolated from is of use."""
    known = (*SECTIONS, *SCALARS, *SETTINGS)
    plain = cast(Plain, OmegaConf.to_container(cfg, resolve=False))
    return [
        _no_such_field(name, {key: value for key, value in plain.items() if key in known})
        for name in map(str, plain)
        if name not in known and not _mentions(plain, re.compile(rf"\$\{{[^}}]*\b{re.escape(name)}\b"))
    ]


def _mentions(node: Any, what: re.Pattern[str]) -> bool:
    if isinstance(node, dict | list):
        return any(_mentions(value, what) for value in (node.values() if isinstance(node, dict) else node))
    return isinstance(node, str) and what.search(node) is not None


def plain_of(cfg: DictConfig, problems: list[str]) -> Plain:
    try:
        return cast(Plain, OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        problems.append(one_line(error))
        return cast(Plain, OmegaConf.to_container(cfg, resolve=False))


def _has_interpolation(node: Any, names: Sequence[str] | None = None) -> bool:
    if isinstance(node, dict):
        return any(_has_interpolation(value) for key, value in node.items() if names is None or key in names)
    if isinstance(node, list):
        return any(_has_interpolation(value) for value in node)
    return isinstance(node, str) and "${" in node


def _is_simple(plain: Plain, key: str, value: Any) -> bool:
    """Whether `key` names an existing field that `value` replaces whole and as it is."""
    node: Any = plain
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return (
        isinstance(node, dict)
        and leaf in node
        and not isinstance(value, dict)
        and not isinstance(node[leaf], dict)
        and not _has_interpolation(value)
    )


def _put(plain: Plain, key: str, value: Any) -> None:
    """Sets a dotted key, copying only the mappings on the way; `plain` itself is changed."""
    node = plain
    *parents, leaf = key.split(".")
    for part in parents:
        node[part] = dict(node[part])
        node = node[part]
    node[leaf] = value
