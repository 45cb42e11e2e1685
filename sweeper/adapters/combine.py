"""Several adapters of one base model made into one: sums, interpolation, and PEFT's ways of merging.

`add` and `interpolate` are exact: the factors are put side by side, so the update is the weighted sum of the updates
and its rank at most the sum of the ranks. The others are PEFT's `add_weighted_adapter`; its `linear` and all that have
no `svd` in their name work on A and B separately, which is no sum of updates.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import record
from sweeper.adapters import peft_models
from sweeper.errors import DataError, SpecError, gist, unknown
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import MethodSpec, bare, to_mapping

if TYPE_CHECKING:
    import torch

    Factors = tuple[torch.Tensor, torch.Tensor]

EXACT = ("add", "interpolate")
BY_PEFT = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
METHODS = (*EXACT, *BY_PEFT)
_NAME = "combined"


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """How adapters are combined.

    Attributes:
        weights: a number each; none is 1 for all. t: of interpolate, the second's share.
        rank: of the methods with svd; null is the highest of the adapters'. density: share of values that ties, dare
            and magnitude_prune keep. majority_sign: of ties, total or frequency. seed: of dare, which drops at random.
    """

    method: str = "add"
    weights: tuple[float, ...] = ()
    t: float | None = None
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SpecError(unknown("--method", self.method, METHODS))
        if (self.t is None) == (self.method == "interpolate"):
            raise SpecError("--t is the share of the second adapter in --method interpolate, and needed there alone")
        if self.method == "interpolate" and self.weights:
            raise SpecError("--weights: interpolate takes --t instead")
        for name, shares in (("--weights", self.weights), ("--t", () if self.t is None else (self.t,))):
            if not all(map(math.isfinite, shares)):
                raise SpecError(f"{name} must be finite, got {', '.join(map(str, shares))}")
        if self.rank is not None and (self.rank < 1 or not self.method.endswith("svd")):
            raise SpecError(f"--rank {self.rank} needs a method with svd in its name, and at least 1")
        if self.density is not None and not (self.prunes and 0 < self.density <= 1):
            raise SpecError(f"--density {self.density}: ties, dare and magnitude_prune take one, above 0 and at most 1")

    @property
    def prunes(self) -> bool:
        return self.method.startswith(("ties", "dare", "magnitude"))

    def shares(self, count: int) -> list[float]:
        """The weight of each of `count` adapters.

        Raises:
            SpecError: there are not as many.
        """
        if self.method == "interpolate":
            assert self.t is not None
            if count != 2:
                raise SpecError(f"--method interpolate goes from one adapter to another: give two, not {count}")
            return [1 - self.t, self.t]
        if self.weights and len(self.weights) != count:
            raise SpecError(f"--weights: give {count}, one for each adapter, not {len(self.weights)}")
        return list(self.weights or [1.0] * count)


def combine(runs: Sequence[Saved], asked: Combination, out: Path, *, device: str = "auto") -> dict[str, Any]:
    """Writes `out/adapter/`, which PEFT loads, and `out/combined.json`, which it returns.

    Raises:
        SweeperError: the adapters are of different base models, are no plain LoRA, or do not fit the method.
    """
    shares = asked.shares(len(runs))
    check(runs, out)
    base = peft_models.load_base(runs[0].spec, device, "float32")  # PEFT makes the new adapter in the base's precision
    model = peft_models.adapted(base, {f"a{place}": run.adapter for place, run in enumerate(runs)})
    factors = _combined(model, shares, asked)
    peft_models.remove(model)
    from sweeper.training import card
    from sweeper.training.export import write_adapter

    rank = max(len(a) for a, _ in factors.values())
    # of scale 1 in every module, whatever its rank
    spec = dataclasses.replace(
        runs[0].spec, method=MethodSpec(name="lora"), rank=rank, alpha=float(rank), seed=asked.seed
    )
    write_adapter(out, spec, [target for target in base.targets if target.name in factors], factors)
    sum_ = " + ".join(f"{share:g} × `{run.folder.name}`" for share, run in zip(shares, runs, strict=True))
    card.write(out, spec, note=f"`{asked.method}` of the runs {sum_}, made with {card.PROJECT}.")
    note = to_mapping(asked) | {
        "weights": shares,
        "from": [{"run_id": run.folder.name, "folder": str(run.folder)} for run in runs],
        "peft": importlib.metadata.version("peft"),
        "ranks": {name: len(a) for name, (a, _) in factors.items()},
        "spec": to_mapping(spec),
    }
    record.write_json(out / record.COMBINED, note)
    return note


def check(runs: Sequence[Saved], out: Path) -> None:
    """Raises for adapters that cannot be combined, before a model is loaded."""
    if (out / record.RECORD).exists():
        raise DataError(f"--out {out}: that is a run's folder; give a new one")
    check_alike(runs, word="combine", does="be combined")


def check_alike(runs: Sequence[Saved], *, word: str, does: str) -> None:
    """Raises `SpecError` for adapters that are not all plain LoRA on one base model.

    Args:
        word: the command. does: what only such adapters can, both for the message.
    """
    from sweeper.lora.forms import peft

    first = runs[0]
    for run in runs[1:]:
        one, other = run.spec.model.content, first.spec.model.content
        if bare(run.spec).model != bare(first.spec).model or (one and other and one != other):
            raise SpecError(
                f"{word}: {first.folder.name} is an adapter of {first.spec.model.name} and {run.folder.name} of "
                f"{run.spec.model.name}: adapters of one base model can {does}"
            )
    for run in runs:
        config = rescore.read_config(run.folder)
        form = peft.form_of(config)
        if form is None or not form.plain:
            kind = config.get("peft_type", "no adapter") if form is None else form.name.upper()
            raise SpecError(f"{word}: {run.folder.name} is {kind}, and only plain LoRA updates can {does}")


def _combined(model: Any, shares: Sequence[float], asked: Combination) -> "dict[str, Factors]":
    """Module name -> A [rank, in] and B transposed [rank, out] of scale 1."""
    import torch

    names = [f"a{place}" for place in range(len(shares))]
    for config in model.peft_config.values():
        # loaded scales stand; the new adapter inherits this and would be scaled by the root of its rank
        config.use_rslora = False
    how = "cat" if asked.method in EXACT else asked.method
    density = (0.5 if asked.density is None else asked.density) if asked.prunes else None
    try:
        with torch.random.fork_rng(), peft_models.hushed():
            torch.manual_seed(asked.seed)
            model.add_weighted_adapter(
                names, list(shares), _NAME, combination_type=how, svd_rank=asked.rank, density=density,
                majority_sign_method=asked.majority_sign,
            )  # fmt: skip
    except (ValueError, RuntimeError, KeyError) as error:
        reason = gist(error)
        peft_models.remove(model)
        raise DataError(f"combine --method {asked.method}: PEFT cannot: {reason}") from error
    found = {}
    for name, layer in model.base_model.model.named_modules():
        pair = _factors(layer)
        if pair is not None:
            found[name] = _without_padding(*pair)
    return found


def _factors(layer: Any) -> "Factors | None":
    if _NAME in getattr(layer, "lora_A", {}):
        return layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach().t()
    if _NAME in getattr(layer, "lora_embedding_A", {}):
        return layer.lora_embedding_A[_NAME].detach(), layer.lora_embedding_B[_NAME].detach().t()
    return None


def _without_padding(a_RI: "torch.Tensor", b_RO: "torch.Tensor") -> "Factors":
    """Without the ranks that are 0 in both factors, as a narrower module has them; at least one is kept."""
    width = min(len(a_RI), len(b_RO))  # svd gives the wider side more rows than the matrix can have ranks
    a_RI, b_RO = a_RI[:width], b_RO[:width]
    used = (a_RI.abs().amax(1) > 0) | (b_RO.abs().amax(1) > 0)
    used[0] = True
    return a_RI[used].float(), b_RO[used].float()
