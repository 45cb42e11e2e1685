"""What each method puts on the base. `METHODS` is the table of them; docs/methods.md shows it to readers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sweeper.errors import SpecError, unknown
from sweeper.lora.blocks import Block
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.trainee import UnpackedSpec
from sweeper.methods import (
    dora,
    experts,
    lora,
    lora_plus,
    principal,
    relora,
    several,
    sharing,
    sparse,
    tuners,
    vera,
    weights,
)
from sweeper.methods.method import Method, Ranks
from sweeper.models import budget
from sweeper.models.architecture import HEAD, Target, number_of_layers
from sweeper.placement import allocation, placement
from sweeper.spec import MethodSpec, PlacementSpec, RunSpec

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel

__all__ = ["METHODS", "Method", "adapter", "check", "effective", "find", "held", "packs", "parameters", "trainable"]

METHODS: dict[str, Method] = {
    "lora": lora.LORA,
    "rslora": lora.RSLORA,
    "lora_plus": lora_plus.LORA_PLUS,
    "lora_fa": lora_plus.LORA_FA,
    "dora": dora.DORA,
    "pissa": principal.PISSA,
    "olora": principal.OLORA,
    "vera": vera.VERA,
    "relora": relora.RELORA,
    "sparse": sparse.SPARSE,
    "full_ft": weights.FULL_FT,
    "bitfit": weights.BITFIT,
    "adalora": tuners.ADALORA,
    "qlora": tuners.QLORA,
    "peft": tuners.PEFT,
}


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        SpecError: there is no such method.
    """
    if name not in METHODS:
        raise SpecError(unknown("method", name, METHODS))
    return METHODS[name]


def effective(spec: RunSpec) -> RunSpec:
    """The run with one value for everything that its method does not look at: equal where the same would be trained."""
    without = lacks(spec.method)
    if "rank" in without:
        spec = replace(spec, rank=1, alpha=1.0)
    if "placement" in without:
        spec = replace(spec, placement=PlacementSpec(name="all", head=True))
    return spec


def lacks(method: MethodSpec) -> list[str]:
    """Which of rank and placement change nothing of what a method trains."""
    found = find(method.name)
    return ["rank"] * (not found.ranked) + ["placement"] * found.whole(method)


def packs(spec: RunSpec) -> bool:
    """Whether a run shares the frozen base with others in a pack; one that does not is a pack of one."""
    method = find(spec.method.name)
    return method.adapter is not None and method.packs(spec)


def parameters(method: MethodSpec, target: Target, rank: int) -> int:
    """Trainable parameters of one placed module."""
    return find(method.name).parameters(method, target, rank)


def trainable(method: MethodSpec, ranks: Ranks, *, total: int = 0) -> int:
    """Trainable parameters of a run on a model of `total` parameters."""
    found = find(method.name)
    return total if found.whole(method) else found.trainable(method, ranks)


def routers(spec: RunSpec, ranks: Ranks) -> int:
    """Trainable parameters of the routers of a run's experts, beside those of its modules."""
    return experts.router_parameters(spec, ranks)


def held(spec: RunSpec, ranks: Ranks, *, total: int) -> int:
    """Values of a run's adapter that are kept with gradient and moments: what trains, and what is frozen among it."""
    made = adapter(spec, ranks)
    if isinstance(made, AdapterSpec):
        return made.capacity.values(list(ranks))
    return trainable(spec.method, ranks, total=total)


def check(spec: RunSpec) -> None:
    """Raises SpecError for a method that there is not, wrong options, or a run that the method cannot train."""
    method = find(spec.method.name)
    method.check_options(spec.method)
    if not method.ranked and spec.allocation.name != "uniform":
        raise SpecError(f"allocation={spec.allocation.name} spreads rank, and method={spec.method.name} has none")
    if spec.method.rank_stabilised and not method.scaled:
        raise SpecError(f"method.rank_stabilised=true: method={spec.method.name} has no alpha / rank to stabilise")
    if spec.placement.embeddings and not method.embeddings:
        able = ", ".join(name for name, one in METHODS.items() if one.embeddings)
        raise SpecError(f"placement.embeddings=true: method={spec.method.name} cannot adapt the embedding; {able} can")
    if spec.optim.lr_ratio is not None and spec.method.name in ("lora_plus", "lora_fa"):
        raise SpecError(f"optim.lr_ratio: method={spec.method.name} says itself how fast A and B learn")
    asked = [*zip(("update", "orthogonality", "norm"), spec.optim.penalties, strict=True), ("", spec.optim.lr_ratio)]
    if not packs(spec) and any(value for _, value in asked):
        name = next(f"{name}_penalty" if name else "lr_ratio" for name, value in asked if value)
        raise SpecError(f"optim.{name} is for the A and B of methods that pack; method={spec.method.name} trains alone")
    method.check(spec)
    sharing.check(spec)
    experts.check(spec)
    if spec.sharing.name != "single" and not (packs(spec) and method.blocks):
        able = ", ".join(name for name, one in METHODS.items() if one.blocks)
        if spec.sharing.name == "ewc":
            raise SpecError(f"sharing=ewc: method={spec.method.name} cannot be held back; {able} can")
        raise SpecError(f"sharing={spec.sharing.name}: method={spec.method.name} has no rank blocks; {able} have")
    several.check(spec, packs=packs(spec))


def check_places(spec: RunSpec, targets: Sequence[Target]) -> None:
    """Raises SpecError where an adapter would be passed by, so that PEFT does not load what a run would leave."""
    if find(spec.method.name).work == "weight":  # no adapter
        return
    kind = str(spec.method.options.get("tuner", "LORA")).upper()  # of PEFT's types some may go where LoRA may not
    by_leaf = {target.name.rpartition(".")[2]: target.name for target in targets}
    if not {"out_proj", "conv1d"} & by_leaf.keys():  # PEFT takes a second to import
        return
    from types import SimpleNamespace

    from peft.tuners import tuners_utils

    from sweeper import models

    refuse = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    for leaf, name in by_leaf.items():
        try:
            if refuse is not None:
                config = models.stock_config(spec.model).get_text_config()
                refuse(SimpleNamespace(peft_type=kind), SimpleNamespace(config=config), leaf)
        except ValueError:
            others = ", ".join(sorted(by_leaf.keys() - {"out_proj", "conv1d"})) or "nothing else, in_proj is one"
            raise SpecError(
                f"placement={spec.placement.name}: {name} can have no adapter: a Mamba layer's kernel reads the weight "
                f"and passes the adapter by, so PEFT refuses it. Leave it out; this placement also has {others}."
            ) from None


def train_flops(method: MethodSpec, targets: Sequence[Target], ranks: Ranks, *, length: int, tokens: int) -> float:
    """Operations of a run that sees `tokens` tokens (padding included) in sequences of `length`."""
    found = find(method.name)
    if found.work == "product":
        products = {target: found.inner_rank(method, rank) for target, rank in ranks.items()}
        return budget.train_flops(targets, products, length=length, tokens=tokens)
    # of a model with tied ends the head is no module of its own, and yet its weight's gradient is a product there
    trained = targets if found.whole(method) else ranks
    dense = tuple(trained) if found.work == "weight" else ()
    return budget.train_flops(targets, dict.fromkeys(ranks, 0), length=length, tokens=tokens, dense=dense)


def allocated(
    spec: RunSpec, targets: Sequence[Target], every: Sequence[Target], scores: Mapping[str, float] | None = None
) -> Ranks:
    """Rank of every placed module; see `allocation.ranks`."""
    return allocation.ranks(spec, targets, every, find(spec.method.name), scores)


def module_ranks(
    spec: RunSpec, every: Sequence[Target], *, tied: bool, scores: Mapping[str, float] | None = None
) -> Ranks:
    """The modules that a run trains or adapts, with their ranks: what plan, forecast, training and record go by.

    Args:
        every: all modules of the model. tied: whether its head is its embedding.
        scores: what a probe found, by module name; without it, modules count as equally important.

    Raises:
        SpecError: placement or rank do not fit the model, or it has no room for the allocation.
    """
    method = find(spec.method.name)
    targets = placement.resolve(every, spec.placement, layers=number_of_layers(every))
    if spec.allocation.name == "uniform":
        placement.check_rank(targets, spec.rank, highest=method.highest)
    ranks = allocated(spec, targets, every, scores)
    found = placed(spec.method, targets, every, tied=tied)
    return ranks if found == targets else budget.uniform(found, spec.rank)


def placed(method: MethodSpec, targets: Sequence[Target], every: Sequence[Target], *, tied: bool) -> tuple[Target, ...]:
    """The modules whose weights a run trains or adapts: those placed, or all that the model has.

    Args:
        every: all modules of the model. tied: whether its head is its embedding.
    """
    if not find(method.name).whole(method):
        return tuple(targets)
    return tuple(target for target in every if not (tied and target.role == HEAD))


def adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec | UnpackedSpec:
    """What a run trains: the adapter of one that packs, with a rank for every placed module, or what trains alone.

    Raises:
        SpecError: there is no such method, or it cannot train this run.
    """
    check(spec)
    method = find(spec.method.name)
    if method.adapter is not None and method.packs(spec):
        return _with_options(spec, _with_blocks(spec, ranks, method.adapter(spec, ranks)))
    assert method.unpacked is not None, f"method={spec.method.name} neither packs nor trains alone"
    return replace(
        method.unpacked(spec, ranks),
        key=unpacked_key(spec),
        average=spec.trainer.ema_decay,
        keep_best=spec.trainer.patience is not None,
        noise=spec.trainer.neftune_alpha,
    )


def saved_adapter(spec: RunSpec, ranks: Ranks, gate: Mapping[str, Any]) -> AdapterSpec | UnpackedSpec:
    """What is left of a run to be scored, from the ranks that it has in all.

    Args:
        gate: how its experts open, as their `router.json` has it; empty where there are none.
    """
    made = adapter(spec, ranks).settled()
    return experts.opened(made, gate) if gate and isinstance(made, AdapterSpec) else made


def blocks(spec: RunSpec, ranks: Ranks) -> tuple[Block, ...]:
    """The rank blocks of a run whose allocation gives its modules these ranks; none where all its tasks share all."""
    made = adapter(spec, ranks)
    return made.blocks if isinstance(made, AdapterSpec) else ()


def trained_ranks(spec: RunSpec, ranks: Ranks) -> Ranks:
    """The ranks that a run trains, of all its blocks, where its allocation gives its modules these."""
    if spec.sharing.name == "single":
        return ranks
    if spec.sharing.name == experts.ROUTED:
        made = adapter(spec, ranks)
        return {target: made.ranks[target.name] for target in ranks}
    return sharing.totals(ranks, blocks(spec, ranks))


def _with_blocks(spec: RunSpec, ranks: Ranks, made: AdapterSpec) -> AdapterSpec:
    """The adapter in the rank blocks that its tasks share it by."""
    if spec.sharing.name == experts.ROUTED:
        return experts.adapter(spec, ranks, made)
    found = sharing.blocks(spec, ranks)
    if not found:
        return made
    every = {target.name: rank for target, rank in sharing.totals(ranks, found).items()}
    scales = {name: made.scales[name] for name in every}
    return replace(
        made, ranks=every, scales=scales, blocks=found, tasks=len(spec.dataset.parts),
        orthogonality=spec.sharing.orthogonality,
    )  # fmt: skip


def _with_options(spec: RunSpec, made: AdapterSpec) -> AdapterSpec:
    """The adapter with what the run's training options ask of its slot."""
    return replace(
        made,
        rate_b=made.rate_b if spec.optim.lr_ratio is None else spec.optim.lr_ratio,
        average=spec.trainer.ema_decay,
        keep_best=spec.trainer.patience is not None,
        penalties=spec.optim.penalties,
        noise=spec.trainer.neftune_alpha,
        elasticity=spec.sharing.elasticity,
    )


def base_bytes(spec: RunSpec, every: Sequence[Target], ranks: Ranks, *, total: int, bytes_per_value: int) -> int:
    """Memory of the weights that a run does not train, and of those of which its float32 values are not the weights.

    Args:
        every: all modules of the model. total: its parameters.
    """
    method = find(spec.method.name)
    if method.quantised:
        return budget.quantised_bytes(every, base_parameters=total, bytes_per_value=bytes_per_value)
    own = trainable(spec.method, ranks, total=total) if method.work == "weight" and bytes_per_value == 4 else 0
    return (total - own) * bytes_per_value


def load_base(spec: RunSpec, *, dtype: "torch.dtype", device: "torch.device") -> "BaseModel":
    """The base model of a run, quantised where its method asks for it.

    Raises:
        ModelError: as `models.load`.
        SpecError: the model cannot be quantised here.
    """
    from sweeper import models
    from sweeper.methods import qlora

    base = models.load(spec.model, dtype=dtype, device=device)
    return qlora.quantised(base, device) if find(spec.method.name).quantised else base


def unpacked_key(spec: RunSpec) -> str:
    """Equal for runs that train alone and can use one another's model; empty for runs that pack."""
    if packs(spec):
        return ""
    ranked = (spec.allocation, spec.rank, spec.alpha, spec.trainer.max_steps) if find(spec.method.name).ranked else ()
    return repr((spec.method, spec.placement, spec.trainer.ema_decay, spec.trainer.patience is not None, *ranked))
