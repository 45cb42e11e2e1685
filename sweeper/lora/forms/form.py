"""What a form of adapter is, and what a run's adapter of some form is made of.

A form is a file of this folder and an entry of `FORMS`; whatever works with adapters asks it, and names none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from sweeper.lora import elastic
from sweeper.lora.blocks import Block
from sweeper.lora.embedding import AdaptedEmbedding
from sweeper.lora.flat import Flat
from sweeper.lora.forms.restarts import Restarts
from sweeper.lora.forms.sparse import Sparsity
from sweeper.lora.layout import Layout, Part, Segment, beside
from sweeper.lora.wrappers import Group
from sweeper.models.architecture import Target

Begin = Literal["uniform", "pissa", "olora"]
Wrapped = Group | AdaptedEmbedding
SharedTensors = Mapping[str, Tensor]  # tensors that all modules share, by their names in a PEFT state dict


class Attached:
    """What a form keeps on a pack besides the values of its adapters; a form overrides the hooks that it needs.

    `derive` and `project` are part of a captured step: no wait for the device, and the same work whatever slots hold.
    """

    def assign(self, slot: int, adapter: "AdapterSpec", segments: Sequence[Segment]) -> None:
        """An adapter of the form takes up these segments of a slot."""

    def release(self, slot: int, segments: Sequence[Segment]) -> None:
        """It leaves them."""

    def switch(self, on: bool) -> None:
        """Whether any slot holds an adapter of the form."""

    def derive(self, slots: Sequence[int]) -> None:
        """Before a forward pass: brings up to date what follows from the values of some slots."""

    def project(self) -> None:
        """After a backward pass: gradients of the values, from those of what follows from them."""

    @property
    def held(self) -> Sequence[Tensor]:
        """What takes memory besides the flat store."""
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How an adapter acts on a module.

    Attributes:
        parts: the named tensors of a module at a rank, in the order in which they are kept.
        begin: fills them, of zeros on the host, for a fresh adapter, which changes nothing.
        factors: A [rank, in] and B [rank, out] of the change dW = scale B^T A of a module's weight W [out, in], from
            its parts and what is shared. update: dW from W, scale and parts, where it is no such product.
        attach: what the form does on a pack; None where the low-rank product of A and B is all there is.
        shared: what all modules of an adapter share, frozen.
        config: PEFT's configuration of a run's adapter, given its ranks as saved and further fields.
        owns: whether a PEFT configuration, as saved, is of this form.
        scale: factor on the update that a PEFT configuration gives a module of a name and rank.
        weight_config: further fields that have PEFT adapt weights by name rather than modules, where it can.
        product: whether A and B are parts that train; else they are made of the parts, or zero.
    """

    name: str
    parts: Callable[[Target, int], tuple[Part, ...]]
    begin: Callable[[Segment, "AdapterSpec", Wrapped, Sequence[Tensor]], None]
    config: Callable[..., Any]
    owns: Callable[[Mapping[str, Any]], bool]
    scale: Callable[[Mapping[str, Any], str, int], float] = lambda config, name, rank: 1.0
    factors: Callable[[Target, Sequence[Tensor], SharedTensors], tuple[Tensor, Tensor]] | None = None
    update: Callable[[Tensor, float, Sequence[Tensor]], Tensor] | None = None
    attach: Callable[[Flat[Any], Layout, Sequence[Wrapped], Sequence[int]], Attached] | None = None
    shared: Callable[["AdapterSpec", Sequence[Target]], dict[str, Tensor]] = lambda adapter, targets: {}
    weight_config: Callable[[Sequence[Target]], dict[str, Any]] | None = None
    product: bool = True

    @property
    def plain(self) -> bool:
        """Whether any slot can hold it, given the rank."""
        return self.product and self.attach is None


FORMS: dict[str, Form] = {}
"""Name -> form; `sweeper.lora.forms` fills it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """What one run puts on the base.

    Attributes:
        ranks: module name -> rank that the adapter takes up. scales: -> factor on B A (alpha / rank, or another).
        trained: module name -> how many of those ranks train at a time; empty where all of them do.
        rate_a, rate_b: learning rate of A and of B over the run's; 0 leaves it frozen.
        begin: how a fresh A and B begin; `niter` of pissa is the number of power iterations, 0 for an exact SVD.
        options: what the form alone looks at.
        sparsity: which values of A and B are zero, if any are.
        average: decay of the moving average of the weights that is evaluated and saved; None: the weights themselves.
        keep_best: whether the best weights seen are kept, for early stopping.
        penalties: weights of the L2 norm of the update, of orthogonality and of the norms of A and B.
        noise: alpha of NEFTune.
        blocks: rank blocks that act on the rows of some of its `tasks`, in the order of their ranks. None: all ranks
            act on every row.
        orthogonality: weight of |A A'^T|^2 over all modules, for A of a block and A' of every one before it.
        elasticity: weight of what holds values back that earlier tasks depend on (`sweeper.lora.elastic`).
    """

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dropout: float
    seed: int
    form: str = "lora"
    trained: Mapping[str, int] = field(default_factory=dict)
    rate_a: float = 1.0
    rate_b: float = 1.0
    begin: Begin = "uniform"
    niter: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    restarts: Restarts | None = None
    sparsity: Sparsity | None = None
    average: float | None = None
    keep_best: bool = False
    penalties: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise: float = 0.0
    blocks: tuple[Block, ...] = ()
    tasks: int = 1
    orthogonality: float = 0.0
    elasticity: float = 0.0

    @property
    def experts(self) -> int:
        """Blocks of its ranks that a learnt gate opens; 0 where there is none."""
        return int(self.options.get("experts", 0))

    @property
    def rated(self) -> bool:
        """Whether not every value learns at the run's own rate."""
        plain = self.rate_a == self.rate_b == 1.0 and not self.trained and self.sparsity is None
        return not (FORMS[self.form].product and plain)

    @property
    def copies(self) -> tuple[str, ...]:
        """The stores that the state of a run has besides values and moments."""
        learnt = self.sparsity is not None and self.sparsity.learnt
        wanted = {
            "average": self.average is not None, "best": self.keep_best, "sensitivity": learnt,
            **dict.fromkeys(elastic.STORES, self.elasticity > 0),
        }  # fmt: skip
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def capacity(self) -> "Capacity":
        """The least that a slot must have to hold this adapter."""
        wanted = {"rates": self.rated, **dict.fromkeys(self.copies, True)}
        return Capacity(
            ranks=dict(self.ranks),
            forms=frozenset() if FORMS[self.form].plain else frozenset({self.form}),
            stores=frozenset(name for name, needed in wanted.items() if needed),
            blocks=len(self.blocks), tasks=self.tasks if self.blocks else 0,
        )  # fmt: skip

    def live_rows(self, name: str, step: int) -> slice:
        """The ranks of a module that train at a step (from 0)."""
        count = self.trained.get(name, self.ranks[name])
        first = count * self.restarts.block(step) if self.restarts else 0
        return slice(first, first + count)

    def saveable(self, step: int) -> bool:
        """Whether the weights after some steps are such as the method is to leave: a sparse adapter must be sparse."""
        return self.sparsity is None or self.sparsity.settled(step)

    def settled(self) -> "AdapterSpec":
        """The adapter without what only its training needs."""
        return replace(
            self, average=None, keep_best=False, penalties=(0.0, 0.0, 0.0), noise=0.0, orthogonality=0.0,
            elasticity=0.0,
        )  # fmt: skip

    def shape(self) -> dict[str, Any]:
        """All that time and memory of a step depend on."""
        return {
            "ranks": sorted(self.ranks.items()), "form": self.form, "dropout": self.dropout > 0, "rated": self.rated,
            "copies": self.copies, "noise": self.noise > 0, "penalties": [weight > 0 for weight in self.penalties],
            **({"blocks": len(self.blocks), "tasks": self.tasks} if self.blocks else {}),
            **({"orthogonality": True} if self.orthogonality else {}),
            **({"experts": (self.options["kept"], self.options["balance"] > 0)} if self.experts else {}),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a slot can hold: module name -> highest rank, forms but plain ones, stores besides values and moments.

    `blocks` and `tasks` are the most that there may be of rank blocks and of tasks that they tell apart.
    """

    ranks: Mapping[str, int]
    forms: frozenset[str] = frozenset()
    stores: frozenset[str] = frozenset()
    blocks: int = 0
    tasks: int = 0

    @classmethod
    def of(cls, given: "Capacity | Mapping[str, int]") -> "Capacity":
        """Plain ranks are the capacity for an ordinary LoRA."""
        return given if isinstance(given, Capacity) else cls(ranks=dict(given))

    @classmethod
    def union(cls, capacities: Iterable["Capacity"]) -> "Capacity":
        """What can hold whatever any of these can."""
        ranks: dict[str, int] = {}
        forms, stores = frozenset[str](), frozenset[str]()
        blocks = tasks = 0
        for one in capacities:
            blocks, tasks = max(blocks, one.blocks), max(tasks, one.tasks)
            for name, rank in one.ranks.items():
                ranks[name] = max(rank, ranks.get(name, 0))
            forms, stores = forms | one.forms, stores | one.stores
        return cls(ranks=ranks, forms=forms, stores=stores, blocks=blocks, tasks=tasks)

    def holds(self, other: "Capacity") -> bool:
        """Whether what fits into `other` fits here."""
        fits = all(rank <= self.ranks.get(name, 0) for name, rank in other.ranks.items())
        told = other.blocks <= self.blocks and other.tasks <= self.tasks
        return fits and told and other.forms <= self.forms and other.stores <= self.stores

    def extra(self, target: Target) -> int:
        """Values of a module that some form has besides A and B."""
        if not self.ranks.get(target.name, 0):
            return 0
        # room for the highest rank everywhere: layers that are laid out alike share their compilation
        highest = max(self.ranks.values())
        return max((beside(FORMS[form].parts(target, highest)) for form in self.forms), default=0)

    def values(self, targets: Sequence[Target]) -> int:
        """Values of the flat store that this takes up, without padding."""
        placed = [(target, self.ranks.get(target.name, 0)) for target in targets]
        return sum(r * (t.in_features + t.out_features) + self.extra(t) for t, r in placed)
