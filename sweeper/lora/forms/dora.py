"""DoRA (Liu et al. 2024): LoRA on the direction of the weights, and a trained magnitude for every output.

    y = m / ||W + s B A|| * (x W^T + s x A^T B) + bias        (eq. 5, norm of every row of W)

The norm counts as a constant in the backward pass (section 4.3). It comes from the Gram matrix of A, never from the
sum of the two matrices: ||W + s B A||^2 = ||W||^2 + 2 s B (A W^T) + s^2 B (A A^T) B^T, row by row.

Shapes: L lanes, J slots, X columns of a group's extra values, I in, O out, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sweeper.lora.flat import Flat
from sweeper.lora.forms import lora, peft
from sweeper.lora.forms.form import AdapterSpec, Attached, Wrapped
from sweeper.lora.layout import Layout, Part, Segment
from sweeper.lora.wrappers import Group
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec


class Gain:
    """The gains of one group of modules, for every slot; exactly 1 for a slot whose adapter is no DoRA.

    Attributes:
        active: whether any slot of the pack holds a DoRA.

    Args:
        weights: [I, O] of each member. magnitude: [J, X] leaf, member after member.
        columns: of each member, where its values begin among the X.
    """

    def __init__(self, weights: Sequence[Tensor], magnitude: Tensor, columns: Sequence[int]) -> None:
        self.weights, self.magnitude, self.columns = list(weights), magnitude, tuple(columns)
        self.squares = [torch.linalg.vector_norm(w, dim=0, dtype=torch.float32).square() for w in weights]
        self.norm = torch.ones_like(magnitude, requires_grad=False)
        self.on = torch.zeros_like(magnitude, dtype=torch.bool)
        self.active = False

    def switch(self, slot: int, member: int, on: bool) -> None:
        """Says whether a slot's adapter of a member is a DoRA."""
        part = self._part(slot, member)
        self.on[part], self.norm[part] = on, 1.0

    def measure(self, slot: int, member: int, a: Tensor, b: Tensor, scale: Tensor) -> None:
        """Takes the norms of W + s B A; a [R, I], b [R, O]."""
        part = self._part(slot, member)
        norm = self.adapted_norm(member, a, b, scale)
        self.norm[part] = torch.where(self.on[part], norm, 1.0)

    def adapted_norm(self, member: int, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Norms [O] of the rows of W + s B A."""
        weight = self.weights[member]
        cross = torch.mm(a.to(weight.dtype), weight).float()
        squares = self.squares[member] + scale * (b * (2 * cross + scale * torch.mm(torch.mm(a, a.t()), b))).sum(0)
        norm: Tensor = squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return norm

    def apply(self, ys: Sequence[Tensor], biases: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
        """Outputs [N, O] of each member times the gain of the slot of their lane; the bias is left as it is."""
        excess = torch.where(self.on, self.magnitude / self.norm - 1, 0.0)
        excess = functional.pad(excess, (0, 0, 0, 1))  # the last row is for slot -1, the base
        excess = excess.index_select(0, slots % excess.shape[0])
        gained = []
        for member, y in enumerate(ys):
            first = self.columns[member]
            rows = y.view(excess.shape[0], -1, y.shape[-1])
            linear = rows - biases[member] if biases else rows
            part = excess[:, None, first : first + y.shape[-1]]
            gained.append((rows + part * linear).to(y.dtype).view(y.shape))
        return gained

    def _part(self, slot: int, member: int) -> tuple[int, slice]:
        first = self.columns[member]
        return slot, slice(first, first + self.weights[member].shape[1])


class Gains(Attached):
    """The gains of all groups in which some slot may hold a DoRA."""

    def __init__(self, flat: Flat[Any], layout: Layout, groups: Sequence[Wrapped], slots: Sequence[int]) -> None:
        self.flat, self.layout, self.slots = flat, layout, set(slots)
        self.groups: dict[int, tuple[Group, Gain]] = {}
        for index, group in enumerate(groups):
            own = layout.by_group[index]
            if isinstance(group, Group) and any(segment.slot in self.slots for segment in own):
                magnitude = layout.table(index, flat.params, flat.grads)
                gain = Gain(group.weights, magnitude, layout.tables[index][2])
                group.changes = (*group.changes, gain)
                self.groups[index] = group, gain

    def assign(self, slot: int, adapter: AdapterSpec, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self.groups[segment.group][1].switch(slot, segment.member, True)

    def release(self, slot: int, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self.groups[segment.group][1].switch(slot, segment.member, False)

    def switch(self, on: bool) -> None:
        for _, gain in self.groups.values():
            gain.active = on

    def derive(self, slots: Sequence[int]) -> None:
        """The norms of the adapted weights."""
        for index, (group, gain) in self.groups.items():
            if self.flat.params.is_cuda:
                from sweeper.lora import form_kernels

                form_kernels.norms(
                    gain.weights, gain.squares, gain.columns, gain.on, gain.norm, group.params, group.table, group.scale
                )
                continue
            for segment in self.layout.by_group[index]:
                if segment.slot in slots and segment.slot in self.slots:
                    scale = group.scale[segment.slot, segment.member]
                    gain.measure(segment.slot, segment.member, *segment.pair(self.flat.params), scale)


def _parts(target: Target, rank: int) -> tuple[Part, ...]:
    magnitude = Part("magnitude", (target.out_features,), "beside", "b", "lora_magnitude_vector")
    return (*lora.parts(target, rank), magnitude)


def _begin(segment: Segment, adapter: AdapterSpec, group: Wrapped, values: Sequence[Tensor]) -> None:
    """The magnitudes are the norms of the rows of W."""
    lora.begin(segment, adapter, group, values)
    assert isinstance(group, Group)
    gain = next(change for change in group.changes if isinstance(change, Gain))
    values[2].copy_(gain.squares[segment.member].sqrt())


def _update(weight: Tensor, scale: float, values: Sequence[Tensor]) -> Tensor:
    """m (W + s B A) / ||W + s B A|| - W."""
    a, b, magnitude = values
    changed = weight + scale * b.t() @ a
    gain: Tensor = magnitude / torch.linalg.vector_norm(changed, dim=1)
    return gain[:, None] * changed - weight


def _config(spec: RunSpec, adapter: AdapterSpec, ranks: Mapping[Target, int], **more: Any) -> Any:
    return peft.lora_config(spec, ranks, use_dora=True, **more)


def _owns(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_dora")) and lora.owns({**config, "use_dora": False})


DORA = replace(
    lora.LORA, name="dora", parts=_parts, begin=_begin, update=_update, factors=None, attach=Gains, config=_config,
    owns=_owns, weight_config=None,
)  # fmt: skip
