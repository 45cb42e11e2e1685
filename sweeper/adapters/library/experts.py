"""The members' adapters on one frozen base: the factors of all of them side by side in every adapted module.

A module computes W x + sum over its ranks of B^T (g A x): the gate g has a value for each member, which all ranks of
the member share. What g is, a rule says; one that is the same for every token is folded into the factors.

Shapes: K members, S ranks of a module over all its members, I in, O out, N leading dimensions of the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.models import BaseModel
from sweeper.placement.placement import Target
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved

Factors = tuple[Tensor, Tensor]
"""A [rank, I] and B [rank, O] of an update B^T A of scale 1."""


@dataclass(frozen=True, slots=True)
class Experts:
    """One module's adapters.

    Attributes:
        a_SI, b_SO: factors of all members, the scale in B. owner_S: whose rank it is. scale_K: alpha / rank of each.
        present_K: whether a member adapts the module.
    """

    target: Target
    a_SI: Tensor
    b_SO: Tensor
    owner_S: Tensor
    scale_K: Tensor
    present_K: Tensor

    @property
    def ranks(self) -> list[int]:
        """Of every member, 0 where it does not adapt the module."""
        return torch.bincount(self.owner_S, minlength=len(self.present_K)).tolist()

    def of(self, member: int) -> Factors:
        """The factors of one member, its scale in B; of no rank where it does not adapt the module."""
        own = self.owner_S == member
        return self.a_SI[own], self.b_SO[own]

    def hidden(self, x: Tensor) -> Tensor:
        """A x of all members, [N, S]."""
        return functional.linear(x, self.a_SI)

    def gated(self, z: Tensor, gates: Tensor) -> Tensor:
        """The members' updates [N, O] of hidden values [N, S], each times its gate [N, K]."""
        return (z * gates.to(z.dtype)[..., self.owner_S]) @ self.b_SO

    def outputs(self, z: Tensor) -> Tensor:
        """The update of each member by itself, [N, K, O], of hidden values [N, S]."""
        parts = [z[..., self.owner_S == k] @ self.b_SO[self.owner_S == k] for k in range(len(self.present_K))]
        return torch.stack(parts, dim=-2)


class Router(Protocol):
    """What a rule has made of the members, for a task or for all."""

    def update(self, experts: Experts, x: Tensor) -> Tensor | None:
        """What is added to the output of a module, [N, O], for its input x [N, I]; None: nothing."""
        ...


@dataclass(frozen=True)
class Folded:
    """The same update for every token: an ordinary adapter, by module name. What is not in it stays as it is."""

    factors: Mapping[str, Factors]

    def update(self, experts: Experts, x: Tensor) -> Tensor | None:
        """See `Router`."""
        pair = self.factors.get(experts.target.name)
        return None if pair is None else functional.linear(x, pair[0]) @ pair[1]


@dataclass
class Gated:
    """A gate by token and module.

    Attributes:
        gates: experts, x [N, I], A x [N, S] -> the gate of each member, [N, K]. instead: the experts of modules where
            they are not the members as they are. seen: is told the gates of every pass.
    """

    gates: Callable[[Experts, Tensor, Tensor], Tensor]
    instead: Mapping[str, Experts] = field(default_factory=dict)
    seen: Callable[[Experts, Tensor], None] | None = None

    def update(self, experts: Experts, x: Tensor) -> Tensor:
        """See `Router`."""
        experts = self.instead.get(experts.target.name, experts)
        z = experts.hidden(x)
        gates = self.gates(experts, x, z)
        if self.seen is not None:
            self.seen(experts, gates.detach())
        return experts.gated(z, gates)


class Routed(nn.Module):
    """An adapted module: its frozen base, and what the present router adds; the base alone without one."""

    base: Any

    def __init__(self, base: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.base, self.experts = base, experts
        self.router: Router | None = None

    @property
    def weight(self) -> Tensor:
        """The base's; some models look at it."""
        weight: Tensor = self.base.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The output [N, O] of the input x [N, I]."""
        out: Tensor = self.base(x)
        update = None if self.router is None else self.router.update(self.experts, x)
        return out if update is None else out + update


class Installed:
    """The members' adapters on the modules of a base model, until `close`."""

    def __init__(self, base: BaseModel, experts: Sequence[Experts]) -> None:
        self.base = base
        self.modules = {one.target.name: Routed(base.model.get_submodule(one.target.name), one) for one in experts}
        for name, module in self.modules.items():
            _put(base.model, name, module)

    def use(self, router: Router | None) -> None:
        """Says what the members add from now on; None: nothing."""
        for module in self.modules.values():
            module.router = router

    def close(self) -> None:
        """Gives the base model its own modules back."""
        for name, module in self.modules.items():
            _put(self.base.model, name, module.base)


def read(base: BaseModel, members: Sequence[Saved]) -> list[Experts]:
    """The adapters of some runs by module, in the base's order, precision and place.

    Raises:
        DataError: a file is damaged.
    """
    device, dtype = next(base.model.parameters()).device, next(base.model.parameters()).dtype
    saved = [rescore.read_adapter(run.folder).to(device) for run in members]
    found = []
    for target in base.targets:
        present = [one.has(target) for one in saved]
        if not any(present):
            continue
        pairs, scales = [], []
        for one, here in zip(saved, present, strict=True):
            a, b = (
                one.parts(target)[:2]
                if here
                else (
                    torch.zeros(0, target.in_features, device=device),
                    torch.zeros(0, target.out_features, device=device),
                )
            )
            scales.append(one.form.scale(one.config, target.name, len(a)) if here else 0.0)
            pairs.append((a, scales[-1] * b))
        found.append(
            Experts(
                target=target,
                a_SI=torch.cat([a for a, _ in pairs]).to(dtype),
                b_SO=torch.cat([b for _, b in pairs]).to(dtype),
                owner_S=torch.cat([torch.full((len(a),), k, device=device) for k, (a, _) in enumerate(pairs)]),
                scale_K=torch.tensor(scales, device=device),
                present_K=torch.tensor(present, device=device),
            )
        )
    return found


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
