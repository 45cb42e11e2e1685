"""What a method is to the planner, the engine and the record: an entry of the table `sweeper.methods.METHODS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.trainee import Trainee, UnpackedSpec
from sweeper.models import BaseModel
from sweeper.models.architecture import Target, smaller_side
from sweeper.spec import MethodSpec, RunSpec

Ranks = Mapping[Target, int]


def unpacked(spec: RunSpec, ranks: Ranks, build: Callable[[BaseModel], Trainee]) -> UnpackedSpec:
    """What a run trains by itself: what `build` puts on a twin of the base model."""
    named = {target.name: rank for target, rank in ranks.items()}
    return UnpackedSpec(build=build, ranks=named, dropout=spec.method.dropout, seed=spec.seed)


def lora_parameters(method: MethodSpec, target: Target, rank: int) -> int:
    """Trainable parameters of one module: A is rank x in, B is out x rank (Hu et al. 2021)."""
    return rank * (target.in_features + target.out_features)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One method.

    Attributes:
        parameters: trainable parameters of a placed module at a rank, as the method's paper counts them.
        adapter: the adapter of a run that packs; None for a method that the engine trains by itself alone.
        unpacked: what a run that does not pack trains, on a model of its own.
        packs: whether a run packs, for methods where that depends on its other fields.
        options: name -> default of what `method.options` may hold; a default of None takes anything.
        check: raises SpecError for a run that the method cannot train.
        ranked: whether the method has a rank at all.
        even: whether every module must have the same rank.
        scaled: whether the update has the factor alpha / rank.
        highest: the highest rank that makes sense in a module.
        embeddings: whether it can adapt the token embedding. blocks: whether its ranks can be shared out to tasks.
        whole: whether it trains every weight of the model, wherever the placement is.
        work: what a placed module adds to the operations of a step: those of a low-rank product, of the gradient of its
            own matrix, or nothing that is counted.
        inner_rank: the rank of a low-rank product while it trains, where that is not the run's.
        leaves: what is saved of a run that has an adapter: its form, or PEFT's type of it; none for weights.
        quantised: whether the base is quantised to 4 bits.
        ranges: tuned field -> lowest and highest value, where those that suit LoRA do not suit this method.
    """

    parameters: Callable[[MethodSpec, Target, int], int] = lora_parameters
    adapter: Callable[[RunSpec, Ranks], AdapterSpec] | None = None
    unpacked: Callable[[RunSpec, Ranks], UnpackedSpec] | None = None
    packs: Callable[[RunSpec], bool] = lambda spec: True
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[RunSpec], None] = lambda spec: None
    ranked: bool = True
    even: bool = False
    scaled: bool = True
    highest: Callable[[Target], int] = smaller_side
    embeddings: bool = False
    blocks: bool = False
    whole: Callable[[MethodSpec], bool] = lambda method: False
    work: Literal["product", "weight", "none"] = "product"
    inner_rank: Callable[[MethodSpec, int], int] = lambda method, rank: rank
    leaves: Callable[[MethodSpec], str | None] = lambda method: "lora"
    quantised: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def trainable(self, spec: MethodSpec, ranks: Ranks) -> int:
        """Trainable parameters of some modules; of a weight that two of them share, once."""
        names = {target.name for target in ranks}
        once = {t: rank for t, rank in ranks.items() if self.work != "weight" or t.shares not in names}
        return sum(self.parameters(spec, target, rank) for target, rank in once.items())

    def option(self, method: MethodSpec, name: str) -> Any:
        """A run's value of an option, or its default."""
        return method.options.get(name, self.options[name])

    def check_options(self, method: MethodSpec) -> None:
        """Raises SpecError for an option that there is not, or whose type is wrong."""
        for name, value in method.options.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise SpecError(f"method.options.{name}: method={method.name} has no such option. Options: {known}.")
            default = self.options[name]
            if default is not None and not _like(value, default):
                kind = _KINDS[type(default)]
                raise SpecError(f"method.options.{name} must be {kind}, such as {default}, got {value}")


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
          dict: "a mapping"}  # fmt: skip


def _like(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
