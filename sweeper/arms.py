"""Arms of an ablation: a cell of the grid, the seeds it is repeated over and the fields that are tuned inside it."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from sweeper import naming
from sweeper.errors import SpecError
from sweeper.spec import RunSpec, placed_by_content, to_mapping

Params = Mapping[str, Any]
"""Dotted field -> value, one for every dimension of a space."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One tuned field: a range of floats or ints (both ends included), or a choice."""

    key: str
    kind: Literal["float", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "choice":
            return
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise SpecError(
                f"{self.key}: a range goes from a lower to a higher number, got {self.low:g} to {self.high:g}"
            )
        if self.log and self.low <= 0:
            raise SpecError(f"{self.key}: a range on a log scale starts above 0, got {self.low:g}")

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the dimension."""
        if self.kind == "choice":
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = self.kind == "float" or isinstance(value, int)
        return bool(number and whole and self.low <= value <= self.high)

    @property
    def ladder(self) -> tuple[float, ...]:
        """The choices in ascending order where they are numbers, a grid that has two ends; empty otherwise."""
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in self.choices)
        return tuple(sorted(self.choices)) if numbers and len(self.choices) > 1 else ()

    def edge(self, value: Any, share: float = 0.05) -> Literal["low", "high"] | None:
        """The end that a value lies at: of a range within `share` of it, on its scale; of a grid the last number."""
        if self.kind == "choice":
            ends: dict[Any, Literal["low", "high"]] = {}
            if self.ladder:
                ends = {self.ladder[0]: "low", self.ladder[-1]: "high"}
            return ends.get(value)
        place = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return "low" if place <= share else "high" if place >= 1 - share else None

    def widened(self, end: Literal["low", "high"]) -> "Dimension":
        """The range half as wide again beyond one end, on its own scale; a grid of numbers with one more of them."""
        if self.kind == "choice":
            return self._longer(end)
        low, high = self._scaled(self.low), self._scaled(self.high)
        more = (high - low) / 2
        moved = low - more if end == "low" else high + more
        value = math.exp(moved) if self.log else moved
        value = float(f"{value:.3g}")
        if self.kind == "int":
            value = max(round(value), 1) if self.log else round(value)
        elif self.low > 0 and value <= 0:
            value = self.low / 10  # a positive field stays positive
        return replace(self, low=value) if end == "low" else replace(self, high=value)

    def _longer(self, end: Literal["low", "high"]) -> "Dimension":
        """A grid with one number beyond an end. It keeps the grid's rhythm: 1e-3, 3e-3, 1e-2 goes on with 3e-2."""
        ladder = self.ladder if end == "high" else self.ladder[::-1]
        if not ladder:
            return self
        before, last = ladder[-3:-1] if len(ladder) > 2 else ladder[-2:]
        value = ladder[-1] * last / before if min(ladder) > 0 else ladder[-1] + last - before
        value = float(f"{value:.3g}")
        if all(isinstance(one, int) for one in ladder):
            value = round(value)
        if value in self.choices or (min(ladder) > 0 and value <= 0):
            return self
        return replace(self, choices=(*self.choices, value) if end == "high" else (value, *self.choices))

    def moved(self, low: float, high: float) -> "Dimension":
        """Another range in place of this one. A grid of positive numbers keeps its length and rhythm, and its middle
        goes to the range's, on a log scale; other choices stay."""
        if self.kind != "choice":
            return replace(self, low=low, high=high)
        ladder = self.ladder
        if not ladder or not min(ladder) > 0 or not any(isinstance(one, float) for one in ladder):
            return self
        factor = math.sqrt(low * high / (ladder[0] * ladder[-1]))
        return replace(self, choices=tuple(float(f"{one * factor:.3g}") for one in self.choices))

    def distance(self, one: Any, other: Any) -> float:
        """How far two values lie apart, as a share of the dimension: 0 to 1; choices that are no numbers 0 or 1."""
        if self.kind != "choice":
            span = self._scaled(self.high) - self._scaled(self.low)
            return abs(self._scaled(one) - self._scaled(other)) / span
        if not self.ladder:
            return float(one != other)
        return abs(self.ladder.index(one) - self.ladder.index(other)) / (len(self.ladder) - 1)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"{self.key} in {', '.join(map(str, self.choices))}"
        return f"{self.key} from {self.low:g} to {self.high:g}{', log scale' if self.log else ''}"


Space = tuple[Dimension, ...]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A cell of the grid.

    Attributes:
        defaults: its spec with the default hyperparameters, for every seed; replicates never make a new arm.
        space: what is tuned inside it; empty for a plain grid.
        make: (tuned values, seed) -> spec. Raises SweeperError for values that cannot be used.
        overrides: what composes the arm on the command line, without seed and tuned fields.
        known_as: the key of a search that an earlier version began and that goes on.
    """

    defaults: tuple[RunSpec, ...]
    space: Space = ()
    make: Callable[[Params, int], RunSpec] = field(compare=False)
    overrides: tuple[str, ...] = ()
    known_as: str = ""

    @property
    def default(self) -> RunSpec:
        return self.defaults[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(spec.seed for spec in self.defaults)

    @cached_property
    def key(self) -> str:
        """First 8 hex digits of a hash of the arm's spec without its seed and tuned fields."""
        if self.known_as:
            return self.known_as
        plain = to_mapping(self.default)
        plain.pop("seed")
        for name in ("model", "dataset", "trainer"):
            plain[name].pop(placed_by_content(getattr(self.default, name)), None)
        for part, own in zip(self.default.dataset.parts, plain["dataset"].get("parts", ()), strict=True):
            own.pop(placed_by_content(part), None)
        if self.default.dataset.ordered_by_seed:
            plain["dataset"]["parts"].sort(key=lambda part: part["name"])
        for section in plain.values():
            if isinstance(section, dict) and "code" in section:
                section["code"].pop("plugin")
        for dimension in self.space:
            _forget(plain, dimension.key)
        if plain["trainer"].get("accumulation") != 1:  # also where it is tuned: once it changed a step's examples
            plain["trainer"]["order"] = "by step"
        return short_hash(plain)

    @property
    def default_params(self) -> dict[str, Any] | None:
        """The default hyperparameters as a point of the space; None where they lie outside of it."""
        plain = to_mapping(self.default)
        found = {dimension.key: look_up(plain, dimension.key) for dimension in self.space}
        return found if all(dimension.holds(found[dimension.key]) for dimension in self.space) else None

    def ends(self) -> Iterator[tuple[Dimension, dict[str, Any]]]:
        """Points at both ends of every range and at every choice, else by default or at the first value of each."""
        middle = self.default_params or {d.key: d.choices[0] if d.choices else d.low for d in self.space}
        for dimension in self.space:
            for value in dimension.choices or (dimension.low, dimension.high):
                yield dimension, {**middle, dimension.key: value}

    @cached_property
    def widest(self) -> RunSpec | None:
        """The run with every tuned number at its highest: a slot for it holds all. None where nothing is tuned."""
        numbers = {
            d.key: d.high if d.kind == "float" else int(d.high) if d.kind == "int" else max(d.choices, key=_size)
            for d in self.space
        }
        return self.make(numbers, self.default.seed) if numbers else None

    def typed(self, params: Params, seed: int) -> tuple[str, ...]:
        """The overrides that compose one run of the arm alone."""
        return (*self.overrides, *(f"{key}={value}" for key, value in params.items()), f"seed={seed}")


def single(spec: RunSpec) -> Arm:
    """An arm of one run."""
    return Arm(defaults=(spec,), make=lambda params, seed: replace(spec, seed=seed))


def grouped(specs: Sequence[RunSpec]) -> list[Arm]:
    """Specs as arms of a plain grid; those that differ only in their seed are one arm."""
    return merged([single(spec) for spec in specs])


def merged(arms: Sequence[Arm]) -> list[Arm]:
    """Arms of one key as one arm: those that were given a seed each, say. A run is in it once."""
    found: dict[str, Arm] = {}
    for arm in arms:
        former = found.get(arm.key)
        known = () if former is None else former.defaults
        new = dict.fromkeys(spec.run_id for spec in known)
        more = {spec.run_id: spec for spec in arm.defaults if spec.run_id not in new}
        found[arm.key] = replace(former or arm, defaults=(*known, *more.values()))
    return list(found.values())


def labels(arms: Sequence[Arm]) -> dict[str, str]:
    """Key -> a short name, of what tells an arm from the others and is not tuned."""
    plain = [to_mapping(arm.default) for arm in arms]
    tuned = {dimension.key for arm in arms for dimension in arm.space}
    fields = naming.varying(plain)
    return {arm.key: naming.label(spec, fields, tuned) for arm, spec in zip(arms, plain, strict=True)}


def short_hash(content: Any) -> str:
    """First 8 hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def number_of_points(space: Sequence[Dimension]) -> float:
    """How many different points a space has; infinite with a range of floats."""
    sizes = []
    for dimension in space:
        if dimension.kind == "float":
            return math.inf
        sizes.append(len(dimension.choices) or int(dimension.high) - int(dimension.low) + 1)
    return math.prod(sizes)


def _size(choice: Any) -> float:
    return float(choice) if isinstance(choice, int | float) else 0.0


def _forget(plain: dict[str, Any], key: str) -> None:
    *parents, leaf = key.split(".")
    node: Any = plain
    for part in parents:
        node = node.get(part)
        if not isinstance(node, dict):
            return
    node.pop(leaf, None)


def look_up(plain: Mapping[str, Any], key: str) -> Any:
    node: Any = plain
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node.get("name") if isinstance(node, Mapping) else node
