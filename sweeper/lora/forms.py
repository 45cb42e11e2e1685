"""What a run's adapter is made of, and what a slot must have room for to hold it.

Forms. All of them are a low-rank product of the same kernels:

lora    A [rank, in] and B [rank, out] train; or some rows of them, or at other rates than the run's
dora    the same, and a magnitude for every output (Liu et al. 2024)
vera    A and B are shared and frozen; a factor for every rank and one for every output train (Kopiczko et al. 2024)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sweeper.lora.sparse import Sparsity
from sweeper.models.architecture import Target

Form = Literal["lora", "dora", "vera"]
Start = Literal["uniform", "pissa", "olora"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarts:
    """Merge-and-restart (ReLoRA, Lialin et al. 2023): after every `every` steps, `count` times, a fresh adapter.

    The learning rate climbs again from 0 within `warmup` steps, and `prune` is the share of the optimiser's moments,
    the smallest ones, that is forgotten.
    """

    every: int
    count: int
    warmup: int
    prune: float

    def block(self, step: int) -> int:
        """Which of the `count` + 1 adapters trains at a step (from 0)."""
        return min(step // self.every, self.count)

    def due(self, step: int) -> bool:
        """Whether a fresh adapter begins with a step."""
        return step > 0 and self.block(step) > self.block(step - 1)

    def pace(self, step: int) -> tuple[int, float]:
        """The step whose learning rate counts, and the factor on it: the jagged schedule of the paper's figure 2."""
        since = step - self.block(step) * self.every
        if step < self.every or since >= self.warmup:
            return step, 1.0
        return step - since + self.warmup, since / self.warmup


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """What one run puts on the base.

    Attributes:
        ranks: module name -> rank that the adapter takes up. scales: -> factor on B A (alpha / rank, or another).
        trained: module name -> how many of those ranks train at a time; empty where all of them do.
        rate_a, rate_b: learning rate of A and of B over the run's; 0 leaves it frozen.
        start: how a fresh adapter begins; `niter` of pissa is the number of power iterations, 0 for an exact SVD.
        shared: of vera: initial factor of every rank, and the seed of the shared matrices.
        sparsity: which values of A and B are zero, if any are.
        average: decay of the moving average of the weights that is evaluated and saved; None: the weights themselves.
        keep_best: whether the best weights seen are kept, for early stopping.
        penalties: weights of the L2 norm of the update, of orthogonality and of the norms of A and B.
        noise: alpha of NEFTune.
    """

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dropout: float
    seed: int
    form: Form = "lora"
    trained: Mapping[str, int] = field(default_factory=dict)
    rate_a: float = 1.0
    rate_b: float = 1.0
    start: Start = "uniform"
    niter: int = 0
    shared: tuple[float, int] = (0.1, 0)
    restarts: Restarts | None = None
    sparsity: Sparsity | None = None
    average: float | None = None
    keep_best: bool = False
    penalties: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise: float = 0.0

    @property
    def rated(self) -> bool:
        """Whether not every value learns at the run's own rate."""
        plain = self.rate_a == self.rate_b == 1.0 and not self.trained and self.sparsity is None
        return self.form == "vera" or not plain

    @property
    def copies(self) -> tuple[str, ...]:
        """The stores that the state of a run has besides values and moments."""
        learnt = self.sparsity is not None and self.sparsity.learnt
        wanted = {"average": self.average is not None, "best": self.keep_best, "sensitivity": learnt}
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def capacity(self) -> "Capacity":
        """The least that a slot must have to hold this adapter."""
        wanted = {"rates": self.rated, **dict.fromkeys(self.copies, True)}
        return Capacity(
            ranks=dict(self.ranks),
            forms=frozenset({self.form}) - {"lora"},
            stores=frozenset(name for name, needed in wanted.items() if needed),
        )

    def saveable(self, step: int) -> bool:
        """Whether the weights after some steps are such as the method is to leave: a sparse adapter must be sparse."""
        return self.sparsity is None or self.sparsity.settled(step)

    def settled(self) -> "AdapterSpec":
        """The adapter without what only its training needs."""
        return replace(self, average=None, keep_best=False, penalties=(0.0, 0.0, 0.0), noise=0.0)

    def shape(self) -> dict[str, Any]:
        """All that time and memory of a step depend on."""
        return {
            "ranks": sorted(self.ranks.items()), "form": self.form, "dropout": self.dropout > 0, "rated": self.rated,
            "copies": self.copies, "noise": self.noise > 0, "penalties": [weight > 0 for weight in self.penalties],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a slot can hold: module name -> highest rank, forms besides lora, and stores besides values and moments."""

    ranks: Mapping[str, int]
    forms: frozenset[str] = frozenset()
    stores: frozenset[str] = frozenset()

    @classmethod
    def of(cls, given: "Capacity | Mapping[str, int]") -> "Capacity":
        """Plain ranks are the capacity for an ordinary LoRA."""
        return given if isinstance(given, Capacity) else cls(ranks=dict(given))

    @classmethod
    def union(cls, capacities: Iterable["Capacity"]) -> "Capacity":
        """What can hold whatever any of these can."""
        ranks: dict[str, int] = {}
        forms, stores = frozenset[str](), frozenset[str]()
        for one in capacities:
            for name, rank in one.ranks.items():
                ranks[name] = max(rank, ranks.get(name, 0))
            forms, stores = forms | one.forms, stores | one.stores
        return cls(ranks=ranks, forms=forms, stores=stores)

    def holds(self, other: "Capacity") -> bool:
        """Whether what fits into `other` fits here."""
        fits = all(rank <= self.ranks.get(name, 0) for name, rank in other.ranks.items())
        return fits and other.forms <= self.forms and other.stores <= self.stores

    def extra(self, target: Target) -> int:
        """Values besides A and B of a module: DoRA's magnitudes, or VeRA's factors (those of the ranks first)."""
        if not self.ranks.get(target.name, 0):
            return 0
        dora = target.out_features if "dora" in self.forms else 0
        # room for the highest rank everywhere: layers that are laid out alike share their compilation
        vera = max(self.ranks.values()) + target.out_features if "vera" in self.forms else 0
        return max(dora, vera)

    def values(self, targets: Sequence[Target]) -> int:
        """Values of the flat store that this takes up, without padding."""
        placed = [(target, self.ranks.get(target.name, 0)) for target in targets]
        return sum(r * (t.in_features + t.out_features) + self.extra(t) for t, r in placed)
