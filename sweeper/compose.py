"""The border: command-line overrides become frozen specs here, and nothing behind this module imports Hydra.

Hydra needs about 40 ms to compose one configuration. A grid is therefore composed once per combination of group
options; plain values (rank, seed, optim.lr, ...) are set directly on the composed result.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeper.arms import Arm, Dimension, Params
from sweeper.errors import Problems, SpecError, SweeperError, unknown
from sweeper.spec import RunSpec, SearchSettings, Settings, from_mapping

Plain = dict[str, Any]

SCALARS = ("rank", "alpha", "seed")
SECTIONS = {name: kind for name, kind in get_type_hints(RunSpec).items() if name not in SCALARS}
_MISSING = "???"


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """The arms of a command, each once, in grid order, and how it is carried out."""

    arms: tuple[Arm, ...]
    settings: Settings

    @property
    def tuned(self) -> bool:
        return any(arm.space for arm in self.arms)

    @property
    def specs(self) -> tuple[RunSpec, ...]:
        """Every arm with its default hyperparameters at every seed: all runs there are where nothing is tuned."""
        return tuple(spec for arm in self.arms for spec in arm.defaults)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One swept field or group: every value once as Hydra reads it and once as it is typed."""

    key: str
    values: tuple[Any, ...]
    typed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Composer:
    """Hydra's configuration loader, bound to the primary configuration and the hydra.* overrides of the command."""

    loader: Any
    config_name: str = "config"
    hydra_overrides: tuple[str, ...] = ()

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration of one job, without its hydra node."""
        try:
            cfg = self.loader.load_configuration(self.config_name, [*self.hydra_overrides, *overrides], RunMode.RUN)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise SpecError(one_line(error)) from error
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        OmegaConf.set_struct(cfg, True)
        return cast(DictConfig, cfg)

    def is_group(self, key: str) -> bool:
        return bool(self.loader.repository.group_exists(key))

    def has_option(self, group: str, option: str) -> bool:
        return bool(self.loader.repository.config_exists(f"{group}/{option}"))

    def options(self, group: str) -> list[str]:
        return list(self.loader.get_group_options(group))

    def parse(self, override: str) -> Override:
        return OverridesParser.create(config_loader=self.loader).parse_overrides([override])[0]


def from_config(cfg: DictConfig) -> tuple[RunSpec, Settings]:
    """The run a composed configuration describes.

    Raises:
        Problems: a line for each value that cannot be used.
    """
    problems: list[str] = []
    plain = _plain(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), problems)
    settings = _settings(plain, problems)
    run = _Builder(problems).run(plain, {})
    if problems or run is None or settings is None:
        raise Problems(problems)
    return run, settings


def expand(overrides: Sequence[str], composer: Composer) -> Composition:
    """Every combination of a command's grid, exactly once.

    A comma list, choice(), range() and glob() are axes; interval() and tag(tune, ...) are tuned inside every arm, a
    range with the tag `method` within the method's own where it has one; the axis `seed` replicates. Arms that come out
    equal are one.

    Raises:
        Problems: everything wrong anywhere in the grid, one line each.
    """
    problems: list[str] = []
    grid = _read(overrides, composer, problems)
    builder = _Builder(problems)
    found: list[Settings] = []
    cells = dict(_cells(grid, composer, problems))
    for cell in cells.values():
        settings = _settings(cell.plain, problems)
        if settings is not None and settings not in found:
            found.append(settings)
    arms: dict[str, Arm] = {}
    factors = [axis for axis in grid.axes if axis.key != "seed"]
    seeds = next((axis.values for axis in grid.axes if axis.key == "seed"), None)
    for choice in itertools.product(*(range(len(axis.values)) for axis in factors)):
        chosen = list(zip(factors, choice, strict=True))
        arm = _arm(chosen, seeds, grid, cells, builder)
        if arm is not None:
            arms.setdefault(arm.key, arm)
    if len(found) > 1:
        problems.append(_differing(found))
    if not problems and grid.space:
        for arm in {arm.space: arm for arm in reversed(arms.values())}.values():
            _try_ends(arm, problems)
    if problems:
        raise Problems(problems)
    return Composition(arms=tuple(arms.values()), settings=found[0])


def _arm(
    chosen: Sequence[tuple["Axis", int]], seeds: Sequence[Any] | None, grid: "_Grid",
    cells: Mapping[tuple[int, ...], "_Cell"], builder: "_Builder",
) -> Arm | None:  # fmt: skip
    options = {axis.key: place for axis, place in chosen if axis.key in grid.groups}
    values = {axis.key: axis.values[place] for axis, place in chosen if axis.key not in grid.groups}

    def cell(params: Params) -> _Cell | None:
        tuned = {axis.key: axis.values.index(params[axis.key]) if axis.key in params else 0 for axis in grid.tuned}
        return cells.get(tuple((options | tuned)[axis.key] for axis in grid.cell_axes))

    def make(params: Params, seed: int) -> RunSpec:
        wrong: list[str] = []
        where = cell(params)
        plain = {key: value for key, value in params.items() if all(key != axis.key for axis in grid.tuned)}
        run = None if where is None else where.run({**values, **plain, "seed": seed}, _Builder(wrong))
        if run is None:
            raise Problems(wrong)
        return run

    where = cell({})
    if where is None:
        return None
    of_seeds = [values] if seeds is None else [{**values, "seed": seed} for seed in seeds]
    defaults = {run.run_id: run for run in (where.run(one, builder) for one in of_seeds) if run is not None}
    if not defaults:
        return None
    typed = tuple(f"{axis.key}={axis.typed[place]}" for axis, place in chosen)
    runs = tuple(defaults.values())
    return Arm(defaults=runs, space=grid.space_of(runs[0]), make=make, overrides=(*grid.fixed, *typed))


def _try_ends(arm: Arm, problems: list[str]) -> None:
    """A run at either end of every tuned range, so that a range no run can use is met before work starts."""
    middle = arm.default_params or {
        dimension.key: dimension.choices[0] if dimension.choices else dimension.low for dimension in arm.space
    }
    for dimension in arm.space:
        for value in dimension.choices or (dimension.low, dimension.high):
            try:
                arm.make({**middle, dimension.key: value}, arm.seeds[0])
            except SweeperError as error:
                problems.extend(f"{dimension}: {line}" for line in error.lines)


def search_settings(plain: Mapping[str, Any]) -> SearchSettings:
    """The search settings that `hydra.sweeper` describes; one name stands for a list of one.

    Raises:
        SpecError: a value that cannot be used.
    """
    values = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in plain.items()}
    for name in ("objectives", "direction", "confirm_seeds"):
        value = values.get(name)
        values[name] = [] if value is None else value if isinstance(value, list) else [value]
    for name in ("sampler_options", "pruner_options"):
        values[name] = values.get(name) or {}
    return from_mapping(SearchSettings, values, prefix="hydra.sweeper.")


def one_line(error: BaseException) -> str:
    """The gist of a Hydra or OmegaConf message, which may have many lines."""
    cause = error.__cause__ if not str(error).strip() and error.__cause__ is not None else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if lines and lines[0].startswith("Error merging override") and len(lines) == 1 and cause.__cause__ is not None:
        lines.append(str(cause.__cause__).strip().splitlines()[0])
    if len(lines) > 1 and lines[0].startswith(("Error merging override", "Could not")):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(cause).__name__


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """`tuned` are the groups whose option is tuned, as axes; `space` is all that is tuned.

    `by_method` are the tuned fields whose range, where a method has one of its own, is the method's.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    groups: frozenset[str]
    space: tuple[Dimension, ...] = ()
    tuned: tuple[Axis, ...] = ()
    by_method: frozenset[str] = frozenset()

    @property
    def cell_axes(self) -> tuple[Axis, ...]:
        return (*(axis for axis in self.axes if axis.key in self.groups), *self.tuned)

    def space_of(self, spec: RunSpec) -> tuple[Dimension, ...]:
        """What is tuned in the arm of a run."""
        if not self.by_method or any(axis.key == "method" for axis in self.tuned):
            return self.space
        from sweeper import methods

        own = methods.find(spec.method.name).ranges
        return tuple(
            replace(d, low=own[d.key][0], high=own[d.key][1]) if d.key in self.by_method and d.key in own else d
            for d in self.space
        )


def _read(overrides: Sequence[str], composer: Composer, problems: list[str]) -> _Grid:
    fixed: dict[str, str] = {}
    axes: dict[str, Axis] = {}
    space: dict[str, Dimension] = {}
    groups: set[str] = set()
    by_method: set[str] = set()
    for line in overrides:
        try:
            override = composer.parse(line)
        except HydraException:
            problems.append(f"{line}: cannot be read. Write field=value; quote values with commas, brackets or spaces.")
            continue
        if override.is_hydra_override():
            if composer.is_group(override.key_or_group) and not override.is_sweep_override():
                _known_options(override, [override.value()], composer, problems)
            continue
        key = override.get_key_element()
        fixed.pop(key, None)
        space.pop(key, None)
        group = composer.is_group(override.key_or_group) and not isinstance(override.value(), dict)
        if not override.is_sweep_override():
            options = _known_options(override, [override.value()], composer, problems) if group else [line]
            if options:
                axes.pop(key, None)
                fixed[key] = line
            continue
        if override.is_interval_sweep() or "tune" in getattr(override.value(), "tags", ()):
            axes.pop(key, None)
            dimension = _dimension(override, group, problems)
            if dimension is None:
                continue
            space[key] = dimension
            tagged = "method" in getattr(override.value(), "tags", ())
            by_method = by_method | {key} if tagged else by_method - {key}
            if not group:
                continue
        axis = _axis(override, problems)
        if axis is None:
            continue
        if group:
            kept = _known_options(override, axis.values, composer, problems)
            places = [place for place, value in enumerate(axis.values) if value in kept]
            if not places:
                continue
            axis = Axis(
                key=key,
                values=tuple(axis.values[place] for place in places),
                typed=tuple(axis.typed[place] for place in places),
            )
            groups.add(key)
        axes[key] = axis
    return _Grid(
        fixed=tuple(fixed.values()),
        axes=tuple(axis for key, axis in axes.items() if key not in space),
        groups=frozenset(groups & axes.keys() - space.keys()),
        space=tuple(space.values()),
        tuned=tuple(axes[key] for key in space if key in axes),
        by_method=frozenset(by_method & space.keys()),
    )


def _dimension(override: Override, group: bool, problems: list[str]) -> Dimension | None:
    key, line = override.get_key_element(), override.input_line
    value: Any = override.value()
    if key == "seed" or _is_setting(override.key_or_group):
        problems.append(f"{line}: {key} is not tuned. Tune what changes how well a run learns, such as optim.lr.")
        return None
    if group and override.is_interval_sweep():
        problems.append(f"{line}: {key} is a group of options. Tune among them: '{key}=tag(tune,choice(a,b))'")
        return None
    try:
        if override.is_interval_sweep():
            kind: Any = "int" if isinstance(value.start, int) and isinstance(value.end, int) else "float"
            return Dimension(key=key, kind=kind, low=value.start, high=value.end, log="log" in value.tags)
        choices = tuple(Override._convert_value(one) for one in override.sweep_iterator(Transformer.identity))
        return Dimension(key=key, kind="choice", choices=tuple(dict.fromkeys(choices)))
    except (SpecError, TypeError) as error:
        problems.append(f"{line}: {error}" if isinstance(error, SpecError) else f"{line}: choose among plain values")
        return None


def _axis(override: Override, problems: list[str]) -> Axis | None:
    key, line = override.get_key_element(), override.input_line
    found = list(override.sweep_iterator(transformer=Transformer.identity))
    if not found:
        problems.append(f"{line}: there is no value in this axis. Give a list: {key}=a,b,c")
        return None
    if _is_setting(override.key_or_group):
        problems.append(f"{line}: {key} does not change a result, so it is no axis of a grid. Give one value.")
        return None
    return Axis(
        key=key,
        values=tuple(Override._convert_value(value) for value in found),
        typed=tuple(Transformer.str(value) for value in found),
    )


def _known_options(override: Override, values: Sequence[Any], composer: Composer, problems: list[str]) -> list[Any]:
    """Those of `values` that are options of the override's group; a line for each other."""
    group, kept = override.key_or_group, []
    if override.is_delete():
        return list(values)
    for value in values:
        names = value if isinstance(value, list) else [value]
        strange = [name for name in names if not isinstance(name, str) or not composer.has_option(group, name)]
        if not strange:
            kept.append(value)
        problems.extend(
            unknown(group, "null" if name is None else str(name), composer.options(group)) for name in strange
        )
    return kept


@dataclass(kw_only=True, slots=True)
class _Cell:
    """One combination of group options: its composed configuration, ready to take plain values."""

    compose: Callable[[], DictConfig]
    plain: Plain
    live: bool
    working: DictConfig | None = None
    sections: dict[tuple[str, str], Any] = field(default_factory=dict)

    def run(self, values: Mapping[str, Any], builder: "_Builder") -> RunSpec | None:
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
        return _plain(cfg, problems)


def _cells(grid: _Grid, composer: Composer, problems: list[str]) -> Iterator[tuple[tuple[int, ...], _Cell]]:
    """The composed configuration of each combination of group options, by the options' places."""
    axes = grid.cell_axes
    cells: dict[tuple[int, ...], _Cell] = {}

    def cell(choice: tuple[int, ...]) -> _Cell | None:
        if choice not in cells:
            chosen = [f"{axis.key}={axis.typed[place]}" for axis, place in zip(axes, choice, strict=True)]
            cfg = _compose(grid.fixed, chosen, composer, problems)
            if cfg is None:
                return None
            live = _has_interpolation(OmegaConf.to_container(cfg, resolve=False), (*SECTIONS, *SCALARS))
            cells[choice] = _Cell(compose=lambda: cfg, plain=_plain(cfg, problems), live=live)
        return cells[choice]

    sections = _separable(axes, cell)
    for choice in itertools.product(*(range(len(axis.values)) for axis in axes)):
        if sections is None or choice in cells:
            found = cell(choice)
        else:
            chosen = [f"{axis.key}={axis.typed[place]}" for axis, place in zip(axes, choice, strict=True)]
            parts = {axis.key: sections[axis.key][place] for axis, place in zip(axes, choice, strict=True)}
            found = _Cell(
                compose=partial(composer.compose, [*grid.fixed, *chosen]),
                plain={**cells[(0,) * len(axes)].plain, **parts},
                live=False,
            )
        if found is not None:
            yield choice, found


def _separable(axes: Sequence[Axis], cell: Callable[[tuple[int, ...]], _Cell | None]) -> dict[str, list[Plain]] | None:
    """Each group's section for each of its options, where options of one group change no other part; else None.

    Then composing each option once is enough, instead of each combination of options.
    """
    if len(axes) < 2:
        return None
    sections: dict[str, list[Plain]] = {}
    for number, axis in enumerate(axes):
        found = [cell((0,) * number + (place,) + (0,) * (len(axes) - number - 1)) for place in range(len(axis.values))]
        rests = [{key: value for key, value in one.plain.items() if key != axis.key} for one in found if one]
        if any(one is None or one.live for one in found) or any(rest != rests[0] for rest in rests):
            return None
        sections[axis.key] = [one.plain[axis.key] for one in found if one is not None]
    return sections


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
        return _no_such_field(override.key_or_group, _plain(composer.compose(good), []))
    return str(error)


def _no_such_field(key: str, plain: Plain) -> str:
    """Names the fields of the deepest part of `key` that exists."""
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
    if not choices:
        return f"{'.'.join([*path, leaf])}: no such field; {'.'.join(path)} has none here."
    return unknown("field", ".".join([*path, leaf]), choices).replace("field=", "", 1)


class _Builder:
    """Makes specs of plain data, section by section, and keeps a line for everything that cannot be used."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def run(
        self, plain: Plain, cache: dict[tuple[str, str], Any], values: Mapping[str, Any] | None = None
    ) -> RunSpec | None:
        """`cache` holds sections already built for the same cell, by the swept values inside them."""
        parts: Plain = {}
        for name, kind in SECTIONS.items():
            key = (name, repr([(k, v) for k, v in (values or {}).items() if k.startswith(f"{name}.")]))
            if key not in cache:
                cache[key] = self._section(name, kind, plain)
            parts[name] = cache[key]
        scalars = {name: plain.get(name) for name in SCALARS}
        if scalars["alpha"] is None and isinstance(scalars["rank"], int):
            scalars["alpha"] = 2 * max(scalars["rank"], 1)
        if all(parts.values()):
            try:
                return from_mapping(RunSpec, {**parts, **scalars})
            except SpecError as error:
                whole = str(error)
        else:
            whole = None
        told = len(self.problems)
        for name in SCALARS:
            if name != "alpha" or plain.get("alpha") is not None:
                self._check(lambda name=name: from_mapping(RunSpec, {**_probe(), name: scalars[name]}))  # type: ignore[misc]
        if whole is not None and len(self.problems) == told:  # what is wrong lies between sections
            self.problems.append(whole)
        return None

    def _section(self, name: str, kind: type, plain: Plain) -> Any:
        mapping = plain.get(name)
        if not isinstance(mapping, dict):
            self.problems.append(f"{name} is required: choose an option of the group {name}")
            return None
        for key in _missing(mapping):
            self.problems.append(f"{name}.{key} is required for {name}={mapping.get('name')}: give {name}.{key}=...")
        if any(_missing(mapping)):
            return None
        if name == "trainer":
            mapping = {key: value for key, value in mapping.items() if key != "device"}
        return self._check(lambda: from_mapping(kind, mapping, prefix=f"{name}."))

    def _check(self, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except SweeperError as error:
            self.problems.extend(error.lines)
            return None


def _probe() -> Plain:
    """A run whose every field is fine, to check one field at a time."""
    return {
        "model": {"name": "-", "source": "random", "location": "-"},
        "dataset": {"name": "-", "family": "-"},
        "method": {"name": "-"},
        "placement": {"name": "-", "roles": ["-"]},
        "allocation": {"name": "-"},
        "optim": {"lr": 1.0},
        "trainer": {"max_steps": 1, "batch_size": 1},
        "evaluation": {"name": "-"},
        "rank": 1,
        "alpha": 1.0,
        "seed": 0,
    }


def _settings(plain: Plain, problems: list[str]) -> Settings | None:
    tracking = dict(plain.get("tracking") or {"name": "none"})
    study, trainer, sweep = plain.get("study"), plain.get("trainer"), plain.get("sweep")
    if not isinstance(sweep, dict):
        problems.append(f"sweep must be a mapping, got {sweep}: give one of its fields, such as sweep.dry_run=true")
    mapping = {
        "study": str(study) if type(study) is int else study,  # study=2026 is a folder's name too
        "output_root": plain.get("output_root"),
        "device": trainer.get("device", "auto") if isinstance(trainer, dict) else "auto",
        "tracking": tracking.pop("name", "none"),
        "tracking_options": tracking,
        **(sweep if isinstance(sweep, dict) else {}),
    }
    if isinstance(mapping.get("compile"), bool):  # YAML reads on and off as booleans
        mapping["compile"] = "on" if mapping["compile"] else "off"
    try:
        return from_mapping(Settings, mapping)
    except SpecError as error:
        name = str(error).split(" ", 1)[0]
        problems.append(f"sweep.{error}" if isinstance(sweep, dict) and name in sweep else str(error))
        return None


def _is_setting(key: str) -> bool:
    return key in ("study", "output_root", "trainer.device") or key.split(".")[0] in ("tracking", "sweep")


def _differing(found: Sequence[Settings]) -> str:
    names = [name for name in Settings.__slots__ if len({repr(getattr(one, name)) for one in found}) > 1]
    return f"{', '.join(names)}: must be the same over the whole grid; run the command once for each value"


def _plain(cfg: DictConfig, problems: list[str]) -> Plain:
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


def _missing(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
        elif value == _MISSING:
            yield f"{prefix}{key}"


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
        and not isinstance(node[leaf], dict | ListConfig)
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
