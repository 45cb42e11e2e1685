"""The wrappers that put the adapters of a layout on the frozen base, and what they read of each slot's adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sweeper.lora.blocks import Block, rows_of
from sweeper.lora.embedding import AdaptedEmbedding
from sweeper.lora.flat import Flat
from sweeper.lora.layout import Layout, Segment
from sweeper.lora.lowrank import A_OFFSET, B_OFFSET, H_COLUMN, RANK
from sweeper.lora.transfer import Mirrored
from sweeper.lora.wrappers import Adapted, Group, Lanes
from sweeper.models.architecture import Target


class Wrapping:
    """What stands for every adapted module of a model; not there before `install`.

    Attributes:
        groups: in the order of the layout's. tables, scales: rank, offsets and scale by slot and member (`lowrank`).
        gates: factors on the hidden values by slot, task and column, where slots may tell `tasks` apart.
    """

    def __init__(self, model: nn.Module, flat: Flat[Any], layout: Layout, lanes: Lanes, tasks: int = 0) -> None:
        self.model, self.flat, self.layout, self.lanes = model, flat, layout, lanes
        widths = [layout.slots * len(members) for members in layout.members]
        self.tables = Mirrored([4 * width for width in widths], torch.int32, flat.params.device)
        self.scales = Mirrored(widths, torch.float32, flat.params.device)
        self.tasks = tasks
        self.hidden = [
            len(members) * -(-max(segment.capacity for segment in own) // 16) * 16
            for members, own in zip(layout.members, layout.by_group, strict=True)
        ]
        gated = [layout.slots * tasks * hidden for hidden in self.hidden]
        self.gates = Mirrored(gated, torch.float32, flat.params.device)
        self.wrappers: dict[str, Adapted | AdaptedEmbedding] = {}
        self.groups = [self._wrap(index, members) for index, members in enumerate(layout.members)]
        self.upload()

    def _wrap(self, index: int, members: Sequence[Target]) -> Group | AdaptedEmbedding:
        """What stands for the modules of a group."""
        modules = [_base_of(self.model.get_submodule(target.name)) for target in members]
        group: Group | AdaptedEmbedding
        if members[0].kind == "embedding":
            group = self.wrappers[members[0].name] = AdaptedEmbedding(modules[0], members[0], self.lanes)
        else:
            group = linear = Group(members, modules, self.lanes)
            for member, (target, module) in enumerate(zip(members, modules, strict=True)):
                self.wrappers[target.name] = Adapted(module, linear, member)
        start, stop = self.layout.bounds[2 * index : 2 * index + 2]
        params = self.flat.params[start:stop].detach().requires_grad_()
        params.grad = self.flat.grads[start:stop]
        own, shape = self.layout.by_group[index], (self.layout.slots, len(members))
        hidden = self.hidden[index]
        for segment in own:
            row = self.tables.host[index].reshape(*shape, 4)[segment.slot, segment.member]
            row[A_OFFSET], row[B_OFFSET] = segment.a - start, segment.b - start
            row[H_COLUMN] = segment.member * hidden // len(members)
        table, scale = self.tables.device[index].view(*shape, 4), self.scales.device[index].view(shape)
        gates = self.gates.device[index].view(-1, hidden) if self.tasks else None
        if isinstance(group, Group):
            group.attach(params, self.flat.work[start:stop], table, scale, hidden, gates)
        else:
            group.attach(params, self.flat.work[start:stop], table, scale, hidden)
        return group

    def install(self) -> None:
        for name, wrapper in self.wrappers.items():
            _replace(self.model, name, wrapper)

    def uninstall(self) -> None:
        """Gives the base model its own modules back."""
        for name, wrapper in self.wrappers.items():
            _replace(self.model, name, wrapper.base)

    def enter(self, segment: Segment, rank: int, scale: float) -> None:
        """Says what rank and scale a segment has, from the next `upload` on."""
        row = segment.slot * len(self.layout.members[segment.group]) + segment.member
        self.tables.host[segment.group][4 * row + RANK] = rank
        self.scales.host[segment.group][row] = scale

    def gate(self, slot: int, blocks: Sequence[Block]) -> None:
        """Says which blocks act on which task's rows, from the next `upload` on; without blocks, all on all."""
        if not self.tasks:
            return
        for segment in self.layout.by_slot[slot]:
            members = len(self.layout.members[segment.group])
            table = self.gates.host[segment.group].reshape(self.layout.slots, self.tasks, members, -1)
            own = table[slot, :, segment.member]
            own[:] = 0.0 if blocks else 1.0
            for block, rows in zip(blocks, rows_of(blocks, segment.target.name), strict=True):
                own[sorted(block.acts), rows] = 1.0

    def upload(self) -> None:
        self.tables.upload()
        self.scales.upload()
        if self.tasks:
            self.gates.upload()


def _base_of(module: nn.Module) -> Any:
    return module.base if isinstance(module, Adapted | AdaptedEmbedding) else module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
