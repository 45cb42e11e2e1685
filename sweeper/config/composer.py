"""Hydra's configuration loader, and what it says when it refuses."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeper import register
from sweeper.errors import SpecError, unknown
from sweeper.installation import CONF, program
from sweeper.placement import lattice

# the help page says how the command is typed: ${program:train}
OmegaConf.register_new_resolver("program", program, replace=True)


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

    def option(self, group: str, name: str) -> dict[str, Any]:
        """An option of a group as plain data.

        Raises:
            SpecError: there is no such option.
        """
        if not self.has_option(group, name):
            raise SpecError(unknown(group, name, self.options(group)))
        return dict(_option(self, group, name))

    def is_group(self, key: str) -> bool:
        return bool(self.loader.repository.group_exists(key))

    def has_option(self, group: str, option: str) -> bool:
        if group == "placement":
            make_known(option)
        return bool(self.loader.repository.config_exists(f"{group}/{option}"))

    def options(self, group: str) -> list[str]:
        found = list(self.loader.get_group_options(group))
        return [name for name in found if group != "placement" or lattice.option(name) is None]

    def parse(self, override: str) -> Override:
        return OverridesParser.create(config_loader=self.loader).parse_overrides([override])[0]


def make_known(placement: str) -> None:
    """Makes an option of a placement that is written as a sum of roles; one that is not is left as it is."""
    try:
        node = lattice.option(placement)
    except SpecError:  # is no option, which has a line of its own
        return
    if node is not None:
        ConfigStore.instance().store(group="placement", name=placement, node=node, provider="lattice")


@lru_cache(maxsize=256)
def _option(composer: Composer, group: str, name: str) -> dict[str, Any]:
    found = OmegaConf.to_container(composer.compose([f"{group}={name}"])[group], resolve=True)
    return cast(dict[str, Any], found)


def composer_of(config_dir: str | Path | None = None) -> Composer:
    """The loader of `conf/`, the user's own and ours, with the folder that --config-dir names."""
    GlobalHydra.instance().clear()
    search_path = create_config_search_path(str(CONF))
    if config_dir:
        folder = f"file://{Path(config_dir).resolve()}"
        search_path.prepend(provider="command-line", path=folder, anchor=SearchPathQuery(provider="schema"))
    return Composer(loader=Hydra.create_main_hydra2("train", search_path).config_loader)


def load_plugins(overrides: Iterable[str]) -> None:
    """Loads what `plugins=...` names, and makes all that is registered, and sums of roles, options of their group.

    Raises:
        SpecError: as `register.load`.
    """
    plugins: list[str] = []
    for line in overrides:
        key, _, given = line.partition("=")
        if key == "placement":
            for text in given.split(","):
                make_known(text.strip())
        if key.lstrip("+") == "plugins":
            with suppress(HydraException):  # which has a line of its own
                value = OverridesParser.create().parse_overrides([line])[0].value()
                plugins = list(map(str, value)) if isinstance(value, list) else [str(value)] if value else []
    register.load(plugins)
    for (group, name), one in register.FOUND.items():
        ConfigStore.instance().store(group=group, name=name, node=dict(one.option), provider="register")


def as_typed(overrides: ListConfig) -> tuple[str, ...]:
    """Overrides as they were typed: read as a list of the configuration, what they interpolate would be filled in."""
    return tuple(cast(list[str], OmegaConf.to_container(overrides, resolve=False)))


def one_line(error: BaseException) -> str:
    """The gist of a Hydra or OmegaConf message, which may have many lines."""
    cause = error.__cause__ if not str(error).strip() and error.__cause__ is not None else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if lines and lines[0].startswith("Error merging override") and len(lines) == 1 and cause.__cause__ is not None:
        lines.append(str(cause.__cause__).strip().splitlines()[0])
    if len(lines) > 1 and lines[0].startswith(("Error merging override", "Could not")):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(cause).__name__
