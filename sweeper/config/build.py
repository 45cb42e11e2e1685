"""From plain data to specs and settings, section by section, with a line for everything that cannot be used."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from sweeper.config.composer import Composer
from sweeper.errors import SpecError, SweeperError, no_such_field
from sweeper.placement.lattice import LATTICE
from sweeper.spec import DatasetSpec, RunSpec, Settings, from_mapping, typed_fields
from sweeper.study.search_settings import SearchSettings

Plain = dict[str, Any]

SCALARS = ("rank", "alpha", "seed")
SECTIONS = {name: kind for name, kind in get_type_hints(RunSpec).items() if name not in SCALARS}
SETTINGS = ("study", "output_root", "plugins", "tracking", "sweep")
OF_SWEEP = tuple(
    name
    for name in typed_fields(Settings)
    if name not in ("study", "output_root", "plugins", "device", "tracking", "tracking_options")
)
_MISSING = "???"


class Builder:
    """Makes specs of plain data, section by section, and keeps a line for everything that cannot be used.

    `unread` are the keys of overrides that cannot be read, which have a line: what they would have given is not missed.
    """

    def __init__(self, problems: list[str], composer: Composer, unread: Collection[str] = ()) -> None:
        self.problems, self.composer, self.unread = problems, composer, unread

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
            if name not in self.unread:
                self.problems.append(f"{name} is required: choose an option of the group {name}")
            return None
        for key in (key for key in _missing(mapping) if f"{name}.{key}" not in self.unread):
            self.problems.append(f"{name}.{key} is required for {name}={mapping.get('name')}: give {name}.{key}=...")
        if any(_missing(mapping)):
            return None
        if name == "placement" and mapping.get("name") == LATTICE:
            self.problems.append("placement=lattice is an axis of many placements: sweep over it with -m, not tuned")
            return None
        typed = typed_fields(kind)
        for made in {"content", "code"} & mapping.keys():  # which are filled in
            self.problems.append(no_such_field(f"{name}.{made}", [f"{name}.{field}" for field in typed]))
            return None
        if name == "trainer":
            mapping = {key: value for key, value in mapping.items() if key != "device"}
            if type(mapping.get("init_from")) is int:  # an id may have digits alone
                mapping["init_from"] = str(mapping["init_from"])
        return self._check(lambda: from_mapping(kind, self._whole(name, mapping), prefix=f"{name}."))

    def _whole(self, name: str, section: Plain) -> Plain:
        """A section with the options of other groups that it names."""
        if name == "dataset" and section.get("parts"):
            return self._with_parts(section)
        return self._with_places(section) if name == "sharing" else section

    def _with_parts(self, dataset: Plain) -> Plain:
        """A dataset made of others, which are given by name, or as a mapping of the name to fields of their own."""
        if not isinstance(dataset["parts"], list):
            raise SpecError(f"dataset.parts must be a list, got {dataset['parts']}: write 'dataset.parts=[...]'")
        return {**dataset, "parts": [self._part(part) for part in dataset["parts"]]}

    def _part(self, given: Any) -> DatasetSpec:
        named = isinstance(given, dict) and len(given) == 1
        name, fields = next(iter(given.items())) if named else (given, {})
        if not isinstance(name, str) or not isinstance(fields, dict | None):
            raise SpecError(f"dataset.parts: {given} is neither a dataset's name nor {{NAME: {{field: value}}}}")
        try:
            plain = self.composer.option("dataset", name)
            for made in {"content", "code"} & (fields or {}).keys():  # which are filled in
                raise SpecError(no_such_field(made, typed_fields(DatasetSpec)))
            return from_mapping(DatasetSpec, {**plain, **(fields or {})})
        except SpecError as error:
            raise SpecError(f"dataset.parts, {name}: {error}") from None

    def _with_places(self, sharing: Plain) -> Plain:
        """Where blocks lie, which is given by the name of a placement."""
        named = {key: sharing[key] for key in ("common", "private") if isinstance(sharing.get(key), str)}
        return {**sharing, **{key: self.composer.option("placement", name) for key, name in named.items()}}

    def _check(self, build: Callable[[], Any]) -> Any:
        try:
            return build()
        except SweeperError as error:
            missed = isinstance(error, SpecError) and error.got is None and error.field in self._unread_parts
            self.problems.extend(() if missed else error.lines)
            return None

    @property
    def _unread_parts(self) -> set[str]:
        return {part for key in self.unread for part in (key, key.split(".")[0])}


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


def one_option(group: str) -> str:
    """A line for several options of a group in one run, which Hydra would merge so that the last one counts."""
    return f"{group}: a run has one option of this group. With -m, '{group}=a,b' runs each."


def settings_of(plain: Plain, problems: list[str]) -> Settings | None:
    tracking = dict(plain.get("tracking") or {"name": "none"})
    study, trainer, sweep = plain.get("study"), plain.get("trainer"), plain.get("sweep")
    if not isinstance(sweep, dict):
        problems.append(f"sweep must be a mapping, got {sweep}: give one of its fields, such as sweep.dry_run=true")
    known = [f"sweep.{name}" for name in OF_SWEEP]
    strange = [name for name in map("sweep.{}".format, sweep if isinstance(sweep, dict) else ()) if name not in known]
    if strange:
        problems.extend(no_such_field(name, known) for name in strange)
        return None
    mapping = {
        "study": str(study) if type(study) is int else study,  # study=2026 is a folder's name too
        "output_root": plain.get("output_root"),
        "plugins": [plugins] if isinstance(plugins := plain.get("plugins") or [], str) else plugins,
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
        problems.append(f"sweep.{error}" if isinstance(sweep, dict) and error.field in sweep else str(error))
        return None


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


def axes_of(params: Any) -> list[str]:
    """The overrides that `hydra.sweeper.params` stands for; none where it is empty or absent.

    Raises:
        SpecError: it is no mapping.
    """
    plain: Any = OmegaConf.to_container(params, resolve=False) if OmegaConf.is_config(params) else params
    if plain is None or plain == "":
        return []
    if not isinstance(plain, Mapping):
        raise SpecError(
            f"hydra.sweeper.params must be a mapping, got {plain}: write 'hydra.sweeper.params={{rank: \"4,8\"}}', or "
            "the axes by themselves"
        )
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in plain.items()]


def differing(found: Sequence[Settings]) -> str:
    names = [name for name in Settings.__slots__ if len({repr(getattr(one, name)) for one in found}) > 1]
    return f"{', '.join(names)}: must be the same over the whole grid; run the command once for each value"


def _missing(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
        elif value == _MISSING:
            yield f"{prefix}{key}"
