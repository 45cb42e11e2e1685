"""Experts behind a learnt gate: y += s B (g * A x), the ranks in K blocks of equal size, g a softmax of a router.

token   the router of a module reads each token's own input to it (LoRAMoE, Dou et al. 2024; MixLoRA, Li et al. 2024)
prompt  it reads what the bare base model makes of the prompt, so that a row has one gate (`gating.read`)

Of the softmax the highest few may be kept, and the shares of the experts pulled together (`gating.Balance`). The gates
go to the products as those of rank blocks do; a slot of another form keeps its own, to the bit.

Shapes: L lanes, n rows of a lane, K experts, M members of a group, H hidden columns, J slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sweeper.lora import gating
from sweeper.lora.flat import Flat
from sweeper.lora.forms import lora, peft
from sweeper.lora.forms.begin import uniform
from sweeper.lora.forms.form import FORMS, AdapterSpec, Attached, Form, Wrapped
from sweeper.lora.layout import Layout, Part, Segment
from sweeper.lora.seeds import seed_of
from sweeper.lora.wrappers import Group, Lanes
from sweeper.models.architecture import Target

ROUTERS = ("token", "prompt")
SPREAD = 0.02  # standard deviation of a fresh router's weights


@dataclass(frozen=True, slots=True)
class Seen:
    """What the router of a module did in a pass: probabilities and gates [L, n, K], which rows count [L, n].

    `on` [L] are the lanes that it is a router of; `kept` [L] the experts of a row.
    """

    on: Tensor
    probabilities: Tensor
    gates: Tensor
    valid: Tensor
    kept: Tensor


class Router:
    """The gates of one group of modules, for every slot.

    Attributes:
        active: whether any slot of the pack has experts. on: [J, M] which have.
        expert: [J, H] whose rank a hidden column is; K for none. kept: [J] experts of a row. weight: [J] of `Balance`.

    Args:
        table: [J, values] leaf in which each member has its router [K, width] first. columns: where its values begin.
    """

    def __init__(
        self, group: Group, table: Tensor, columns: Sequence[int], experts: int, widths: Sequence[int], *, prompt: bool
    ) -> None:
        self.group, self.table, self.columns, self.widths = group, table, tuple(columns), tuple(widths)
        self.experts, self.prompt, self.active = experts, prompt, False
        slots, device = len(table), table.device
        self.on = torch.zeros(slots, len(columns), dtype=torch.bool, device=device)
        self.expert = torch.full((slots, group.hidden), experts, dtype=torch.int64, device=device)
        self.kept = torch.ones(slots, dtype=torch.int64, device=device)
        self.weight = torch.zeros(slots, device=device)

    def enter(self, segment: Segment, rank: int, kept: int, weight: float) -> None:
        """A slot's adapter of a member has experts from now on."""
        first = segment.member * self.group.hidden // len(self.columns)
        owner = torch.arange(rank, device=self.expert.device) // (rank // self.experts)
        self.expert[segment.slot, first : first + rank] = owner
        self.on[segment.slot, segment.member] = True
        self.kept[segment.slot], self.weight[segment.slot] = kept, weight

    def leave(self, segment: Segment) -> None:
        """It has none any more."""
        first, width = self._columns(segment.member)
        self.expert[segment.slot, first : first + width] = self.experts
        self.on[segment.slot, segment.member] = False

    def apply(self, x: Tensor, former: Tensor | None, rows: Tensor | None, lanes: Lanes) -> Tensor:
        """Gates of every row [N, H]: of slots with experts those of the router, of others the former ones, or 1.

        Args:
            x: [N, I]. former, rows: gates and the rows of them that equal shares of x have, where there are any.
        """
        slots = lanes.slots.clamp(min=0).to(torch.int64)
        count = x.shape[0]
        if former is None:
            plain = x.new_ones((), dtype=torch.float32).expand(count, self.group.hidden)
        elif rows is None:
            plain = former
        else:
            plain = former.index_select(0, rows).repeat_interleave(count // len(rows), 0)
        found = [self._member(member, x, slots, lanes) for member in range(len(self.columns))]
        open_to = torch.cat(found, -1).view(count, -1)
        mine = self.on.index_select(0, slots) & (lanes.slots >= 0)[:, None]
        width = self.group.hidden // len(self.columns)
        mine = mine.repeat_interleave(width, 1)[:, None].expand(-1, count // len(slots), -1).reshape(count, -1)
        return torch.where(mine, open_to, plain)

    def _columns(self, member: int) -> tuple[int, int]:
        width = self.group.hidden // len(self.columns)
        return member * width, width

    def _member(self, member: int, x: Tensor, slots: Tensor, lanes: Lanes) -> Tensor:
        """Gates [L, n, columns of the member]."""
        share = x.shape[0] // len(slots)
        given = lanes.features if self.prompt else x
        assert given is not None
        given = given.view(len(slots), -1, given.shape[-1])
        start, size = self.columns[member], self.experts * self.widths[member]
        weights = self.table[:, start : start + size].index_select(0, slots).view(len(slots), self.experts, -1)
        logits = torch.bmm(given, weights.to(given.dtype).transpose(1, 2)).float()
        probabilities, kept = logits.softmax(-1), self.kept.index_select(0, slots)
        valid = _valid(probabilities, lanes, prompt=self.prompt)
        if lanes.balanced and torch.is_grad_enabled():
            sent = gating.shares(probabilities.detach(), gating.gates(probabilities.detach(), kept), kept, valid)
            weight = self.weight.index_select(0, slots) * lanes.share
            probabilities = gating.balanced(probabilities, sent, weight, valid)
        found = gating.gates(probabilities, kept)
        if lanes.watched is not None:
            lanes.watched.append(Seen(self.on.index_select(0, slots)[:, member], probabilities, found, valid, kept))
        first, width = self._columns(member)
        owner = self.expert.index_select(0, slots)[:, first : first + width]
        padded = functional.pad(found, (0, 1))  # the last is for columns that are nobody's
        spread = padded.gather(2, owner[:, None].expand(-1, padded.shape[1], -1))
        return spread.repeat_interleave(share // spread.shape[1], 1) if self.prompt else spread


def _valid(probabilities: Tensor, lanes: Lanes, *, prompt: bool) -> Tensor:
    """[L, n] 1 for rows that count, 0 for padding; all of them where lengths are not known."""
    count, rows = probabilities.shape[:2]
    if prompt or lanes.lengths is None:
        return probabilities.new_ones(count, rows)
    tokens = count * rows // len(lanes.lengths)
    inside = torch.arange(tokens, device=lanes.lengths.device) < lanes.lengths[:, None]
    return inside.view(count, rows).to(probabilities.dtype)


class Tied:
    """Where the routers of a slot's modules lie, and which of them are one.

    The tensors stay the same whoever holds the slot: a recorded step goes on reading them.
    """

    def __init__(self, segments: Sequence[Segment], experts: int, device: torch.device) -> None:
        own = torch.arange(experts * gating.WIDTH, device=device)
        self.starts = [segment.x for segment in segments]
        self.places = torch.tensor(self.starts, device=device)[:, None] + own
        self.first = self.places[0].clone()
        self.on = torch.zeros(len(segments), 1, dtype=torch.bool, device=device)

    def tie(self, starts: Sequence[int]) -> None:
        """The routers that begin there are one, the first of them."""
        self.on.copy_(torch.tensor([[start in starts] for start in self.starts]))
        self.first.copy_(self.places[self.starts.index(starts[0])])

    def untie(self) -> None:
        """Each is one of its own."""
        self.on.zero_()

    def spread(self, values: Tensor) -> None:
        """Gives the values of the first to all."""
        values[self.places] = torch.where(self.on, values[self.first], values[self.places])

    def gather(self, values: Tensor) -> None:
        """Adds all up in the first; the others are 0."""
        own = values[self.places]
        whole = torch.where(self.on, own, 0.0).sum(0)
        values[self.places] = torch.where(self.on, 0.0, own)
        values[self.first] += whole


class Routers(Attached):
    """The routers of all groups in which some slot may have experts."""

    def __init__(
        self, flat: Flat[Any], layout: Layout, groups: Sequence[Wrapped], slots: Sequence[int], *, experts: int,
        prompt: bool,
    ) -> None:  # fmt: skip
        self.flat = flat
        self.groups: dict[int, Router] = {}
        for index, group in enumerate(groups):
            own = layout.by_group[index]
            if isinstance(group, Group) and any(segment.slot in slots for segment in own):
                widths = [gating.WIDTH if prompt else target.in_features for target in group.targets]
                table = layout.table(index, flat.params, flat.grads)
                router = Router(group, table, layout.tables[index][2], experts, widths, prompt=prompt)
                group.routers = (*group.routers, router)
                self.groups[index] = router
        self.tied = {slot: Tied(layout.linear(slot), experts, flat.params.device) for slot in slots if prompt}

    def assign(self, slot: int, adapter: AdapterSpec, segments: Sequence[Segment]) -> None:
        given = adapter.options
        for segment in segments:
            self.groups[segment.group].enter(
                segment, adapter.ranks[segment.target.name], given["kept"], given["balance"] / len(segments)
            )
        if given["tied"]:
            self.tied[slot].tie([segment.x for segment in segments])

    def release(self, slot: int, segments: Sequence[Segment]) -> None:
        if slot in self.tied:
            self.tied[slot].untie()
        for segment in segments:
            self.groups[segment.group].leave(segment)

    def switch(self, on: bool) -> None:
        for router in self.groups.values():
            router.active = on

    def derive(self, slots: Sequence[int]) -> None:
        """One router for all modules is that of the first, which alone learns."""
        for slot, tied in self.tied.items():
            if slot in slots:
                tied.spread(self.flat.params)

    def project(self) -> None:
        """Its gradient is the sum of all."""
        for tied in self.tied.values():
            tied.gather(self.flat.grads)


def form(experts: int, router: str) -> str:
    """The name of the form with so many experts and such a router, which is an entry of `FORMS` from now on."""
    name = f"routed/{experts}/{router}"
    if name not in FORMS:
        FORMS[name] = _form(name, experts, prompt=router == "prompt")
    return name


def router_size(target: Target, experts: int, router: str) -> int:
    """Values of a module's router."""
    return experts * (gating.WIDTH if router == "prompt" else target.in_features)


def _form(name: str, experts: int, *, prompt: bool) -> Form:
    def parts(target: Target, rank: int) -> tuple[Part, ...]:
        width = gating.WIDTH if prompt else target.in_features
        return (*lora.parts(target, rank), Part("router", (experts, width), "beside", "b", "router"))

    def begin(segment: Segment, adapter: AdapterSpec, group: Wrapped, values: Sequence[Tensor]) -> None:
        a, b, router = values
        size = len(a) // experts
        for expert in range(experts):  # experts that began alike would stay alike
            rows = slice(expert * size, (expert + 1) * size)
            uniform(segment.target, a[rows], b[rows], adapter.seed, again=expert)
        generator = torch.Generator().manual_seed(seed_of(f"{adapter.seed}/{segment.target.name}/router"))
        router.normal_(std=SPREAD, generator=generator)

    def attach(flat: Flat[Any], layout: Layout, groups: Sequence[Wrapped], slots: Sequence[int]) -> Attached:
        return Routers(flat, layout, groups, slots, experts=experts, prompt=prompt)

    return Form(
        name=name, parts=parts, begin=begin, attach=attach, owns=lambda config: False,
        config=lambda spec, adapter, ranks, **more: peft.lora_config(spec, ranks, **more),
    )  # fmt: skip
