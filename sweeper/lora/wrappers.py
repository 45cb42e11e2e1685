"""What stands in the base model for the linear modules that are adapted, and the lanes that all of it reads."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sweeper.lora.lowrank import RANK, ROW_STRIDE, adapted_linear
from sweeper.lora.seeds import seed_of
from sweeper.models.architecture import Target


@dataclass
class Lanes:
    """How the rows of the present batch are shared out; one object that every adapted module reads.

    `slots` [L] int32 is the slot of each lane (-1: the bare base), `tokens` the padded length of a sequence.
    `forms` are those of the slots that do more than the low-rank product; `penalised` are slots with their penalties.
    `gated`: whether some adapter has rank blocks; then `gate_rows` [G] int64 are the rows of `Group.gates` that equal
    shares of the batch's rows go by.
    `routed`: whether some adapter has experts behind a learnt gate; `prompted`: whether one of their routers reads
    prompts, which `features` [sequences, D] then are; `balanced`: whether one is pulled to use its experts alike, over
    the tokens within `lengths` [sequences], with the `share` of a step that the pass is. `watched` is given what every
    router does, in evaluation.
    `apart`: whether a pass is of one slot, which is to meet the modules that it would meet if no other were there.
    """

    slots: Tensor
    dropout: Tensor
    seeds: Tensor
    noise: Tensor
    tokens: int = 1
    drop: bool = False
    noisy: bool = False
    forms: tuple[str, ...] = ()
    penalised: tuple[tuple[int, tuple[Any, ...]], ...] = ()
    gated: bool = False
    gate_rows: Tensor | None = None
    routed: bool = False
    prompted: bool = False
    balanced: bool = False
    features: Tensor | None = None
    lengths: Tensor | None = None
    share: float = 1.0
    watched: list[Any] | None = None
    apart: bool = False
    host_slots: tuple[int, ...] = field(default=())

    @property
    def flags(self) -> tuple[Any, ...]:
        """What a step looks at on the host: one that was captured under other flags does other things."""
        routing = self.routed, self.prompted, self.balanced
        return self.drop, self.noisy, self.forms, self.penalised, self.gated, routing

    @property
    def draws(self) -> bool:
        """Whether the coming step draws random numbers, and so needs `seeds`."""
        return self.drop or self.noisy

    @classmethod
    def of(cls, slots: int, device: torch.device) -> "Lanes":
        """As many lanes as slots, all on the bare base."""
        seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        dropout, noise = torch.zeros(slots, device=device), torch.zeros(slots, device=device)
        return cls(torch.full((slots,), -1, dtype=torch.int32, device=device), dropout, seeds, noise)

    def seed(self, seeds: Sequence[int]) -> None:
        """Each slot's seed for the coming forward pass (`seeds.for_rows`)."""
        self.seeds.copy_(torch.tensor(seeds), non_blocking=True)


class Change(Protocol):
    """What a form does to the outputs of a group, where that is more than the low-rank product.

    It is applied where it is `active`, to the outputs [N, O] of each member, and is exactly the identity for a slot of
    another form. `biases` are [O] of each member, or none at all; `slots` [L] the slot of each lane.
    """

    active: bool

    def apply(self, ys: Sequence[Tensor], biases: Sequence[Tensor], slots: Tensor) -> list[Tensor]: ...


class Gating(Protocol):
    """What makes gates for every row of a group's input [N, I], where it is `active`.

    `former` and `rows` are the gates of rank blocks, if there are any: a slot without experts keeps them.
    """

    active: bool

    def apply(self, x: Tensor, former: Tensor | None, rows: Tensor | None, lanes: Lanes) -> Tensor: ...


class Group(nn.Module):
    """Up to three frozen matrices on the same input, computed in one go with every lane's adapters.

    Attributes:
        bases: the modules whose matrices they are. weights: [I, O] of each.
        params, work: values of the group's adapters and what the products read of them. table, scale: `lowrank` has
            their columns. changes: what forms do to the outputs.
        gates: [slots * tasks, H] factors on the hidden values; None where no slot may tell tasks apart.
    """

    params: Tensor
    work: Tensor
    table: Tensor
    scale: Tensor
    salts: Tensor

    def __init__(self, targets: Sequence[Target], modules: Sequence[Any], lanes: Lanes) -> None:
        super().__init__()
        self.targets, self.bases, self.lanes = tuple(targets), tuple(modules), lanes
        self.weights = [
            module.weight.data if target.kind == "conv1d" else module.weight.data.t()
            for target, module in zip(targets, modules, strict=True)
        ]
        self.biases = _biases(modules)
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()
        self.waiting = 0
        self.changes: tuple[Change, ...] = ()
        self.routers: tuple[Gating, ...] = ()
        self.gates: Tensor | None = None

    def attach(
        self, params: Tensor, work: Tensor, table: Tensor, scale: Tensor, hidden: int, gates: Tensor | None = None
    ) -> None:
        self.params, self.work, self.table, self.scale, self.hidden = params, work, table, scale, hidden
        self.gates = gates
        salts = [seed_of(target.name) for target in self.targets]
        self.salts = torch.tensor(salts, dtype=torch.int64, device=params.device)

    def forward(self, x: Tensor, member: int) -> Tensor:
        """Output of one member. The first that is asked computes all; the siblings fetch theirs."""
        if self.waiting == 0 or self.input is not x:
            self.parts = self.products(x)
            self.input, self.waiting = x, len(self.parts)
        part = self.parts[member]
        self.waiting -= 1
        if self.waiting == 0:
            self.input, self.parts = None, ()
        return part

    @property
    def acts(self) -> bool:
        """Whether a slot of the present batch has an adapter here."""
        return any(slot >= 0 and bool(self.table[slot, :, RANK].any()) for slot in self.lanes.host_slots)

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        lanes = self.lanes
        # from the shape where it can be: a plain number would be a constant of the compiled layer, one for each length
        tokens = x.shape[1] if x.dim() == 3 else lanes.tokens
        rows, gates, gate_rows = x.reshape(-1, x.shape[-1]), None, None
        if lanes.gated:
            gates, gate_rows = self.gates, lanes.gate_rows
        if lanes.routed:
            for router in self.routers:
                if router.active:
                    gates, gate_rows = router.apply(rows, gates, gate_rows, lanes), None
        *ys, _ = adapted_linear(
            rows, self.weights, self.biases, self.params, self.work, self.table, self.scale, lanes.slots, lanes.dropout,
            lanes.seeds, self.salts, gates, gate_rows, self.hidden, tokens, lanes.drop and self.training,
        )  # fmt: skip
        for change in self.changes:
            if change.active:
                ys = change.apply(ys, self.biases, lanes.slots)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class Adapted(nn.Module):
    """Stands in for one linear module of the base; `base` is the module it replaces."""

    base: Any

    def __init__(self, base: nn.Module, group: Group, member: int) -> None:
        super().__init__()
        self.base, self.group, self.member = base, group, member

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    @contextlib.contextmanager
    def one_sequence(self) -> Iterator[None]:
        """Within it a lane's rows are target tokens: dropout counts them as one sequence, whatever the padding."""
        lanes = self.group.lanes
        tokens, lanes.tokens = lanes.tokens, ROW_STRIDE
        try:
            yield
        finally:
            lanes.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        alone = self.group.lanes.apart and not self.group.acts
        found: Tensor = self.base(x) if alone else self.group(x, self.member)
        return found


def _biases(modules: Sequence[Any]) -> list[Tensor]:
    """Bias of every module, zero where one has none; empty where none has one."""
    if all(getattr(module, "bias", None) is None for module in modules):
        return []
    return [m.weight.new_zeros(m.weight.shape[0]) if m.bias is None else m.bias.data for m in modules]
