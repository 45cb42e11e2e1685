"""Every arm of a command: the grid times the cells, each combination once."""

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sweeper import register
from sweeper.arms import Arm, Params, look_up
from sweeper.config.build import SECTIONS, Builder, differing, one_option, settings_of
from sweeper.config.cells import Cell, cells_of, plain_of, unused
from sweeper.config.composer import Composer, composer_of
from sweeper.config.grid import MOST_ARMS, Axis, Grid, read_grid, twice
from sweeper.errors import Problems, SweeperError
from sweeper.identity import Identities
from sweeper.spec import RunSpec, Settings, to_mapping


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


def from_config(
    cfg: DictConfig, loader: Any = None, chosen: Container[str] = SECTIONS
) -> tuple[RunSpec, Settings]:  # fmt: skip
    """The run a composed configuration describes.

    Args:
        loader: Hydra's configuration loader, for options that others name; without it, one of the project's `conf/`.
        chosen: the groups of which one option was.

    Raises:
        Problems: a line for each value that cannot be used.
    """
    problems: list[str] = []
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    plain = plain_of(ours, problems)
    problems.extend(unused(ours))
    problems.extend(one_option(name) for name in SECTIONS if name in plain and name not in chosen)
    settings = settings_of(plain, problems)
    composer = composer_of() if loader is None else Composer(loader=loader)
    run = Builder(problems, composer).run(plain, {})
    if problems or run is None or settings is None:
        raise Problems(problems)
    return run, settings


def expand(overrides: Sequence[str], composer: Composer, *, typed: Sequence[str] = ()) -> Composition:
    """Every combination of a command's grid, exactly once.

    A comma list, choice(), range() and glob() are axes; interval() and tag(tune, ...) are tuned inside every arm, a
    range with the tag `method` within the method's own where it has one; the axis `seed` replicates. Arms that come out
    equal are one.

    Args:
        typed: those of the overrides that a person gave, rather than a preset.

    Raises:
        Problems: everything wrong anywhere in the grid, one line each.
    """
    problems: list[str] = [*twice(typed, composer)]
    grid = read_grid(overrides, composer, problems)
    if (arms_asked := math.prod(len(axis.values) for axis in grid.axes)) > MOST_ARMS:
        raise Problems([*problems, f"a grid of {arms_asked:,} runs: more than {MOST_ARMS:,} are not made at once"])
    builder = Builder(problems, composer, grid.unread)
    found: list[Settings] = []
    cells = dict(cells_of(grid, composer, problems))
    for cell in cells.values():
        settings = settings_of(cell.plain, problems)
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
        problems.append(differing(found))
    if not problems and grid.space:
        for arm in {arm.space: arm for arm in reversed(arms.values())}.values():
            _try_ends(arm, problems)
    if problems:
        raise Problems([*problems, *_of_plugins(grid, found)])
    return Composition(arms=tuple(arms.values()), settings=found[0])


def _of_plugins(grid: Grid, found: Sequence[Settings]) -> Iterator[str]:
    """A line for each unknown option that runs of the study have, by code that is not loaded."""
    for group, name in grid.unknown if found else ():
        plugin = Identities(found[0].folder).plugin_of(group, name) if group in register.KEYS else None
        if plugin is not None:
            yield f"{group}={name} is code of your own in {found[0].folder}: {register.how_to_give(plugin)}"


def _arm(
    chosen: Sequence[tuple[Axis, int]], seeds: Sequence[Any] | None, grid: Grid,
    cells: Mapping[tuple[int, ...], Cell], builder: Builder,
) -> Arm | None:  # fmt: skip
    options = {axis.key: place for axis, place in chosen if axis.key in grid.groups}
    values = {axis.key: axis.values[place] for axis, place in chosen if axis.key not in grid.groups}

    def cell(params: Params) -> Cell | None:
        tuned = {axis.key: axis.values.index(params[axis.key]) if axis.key in params else 0 for axis in grid.tuned}
        return cells.get(tuple((options | tuned)[axis.key] for axis in grid.cell_axes))

    def make(params: Params, seed: int) -> RunSpec:
        wrong: list[str] = []
        where = cell(params)
        plain = {key: value for key, value in params.items() if all(key != axis.key for axis in grid.tuned)}
        run = None if where is None else where.run({**values, **plain, "seed": seed}, Builder(wrong, builder.composer))
        if run is None or wrong:
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
    plain = to_mapping(arm.default)
    for dimension, params in arm.ends():
        if dimension.kind == "float" and type(look_up(plain, dimension.key)) is int:
            span = f"{dimension.low:g},{dimension.high:g}"
            problems.append(f"{dimension}: not every number is whole. Write '{dimension.key}=int(interval({span}))'")
            continue
        try:
            arm.make(params, arm.seeds[0])
        except SweeperError as error:
            problems.extend(f"{dimension}: {line}" for line in error.lines)
