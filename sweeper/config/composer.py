"""Hydra's configuration loader, and what it says when it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeper.errors import SpecError


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
