"""VeRA (Kopiczko et al. 2024): A and B of every module are those of its run, times factors for ranks and outputs.

    A = d * A0[:, :in],  B = b * B0[:out]        (eq. 2; A0 and B0 random, shared and frozen; d and b train)

The products are made before the forward pass, in the places where a LoRA has its A and B, so that the same kernels
serve both; after the backward pass the gradients of A and B become those of d and b.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.lora.flat import Flat
from sweeper.lora.forms import peft
from sweeper.lora.forms.form import AdapterSpec, Attached, Form, SharedTensors, Wrapped
from sweeper.lora.layout import Layout, Part, Segment
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec

INITIAL, KEY = 0.1, 0  # of d, and of the random matrices, where the adapter's options say nothing
A0, B0 = "vera_A", "vera_B"


def draw(rank: int, targets: Sequence[Target], seed: int) -> tuple[Tensor, Tensor]:
    """A0 [rank, widest in] and B0 [widest out, rank] for some modules, as PEFT draws them from its projection key."""
    wide_in, wide_out = max(t.in_features for t in targets), max(t.out_features for t in targets)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.empty(rank, wide_in), torch.empty(wide_out, rank)
    for matrix in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))  # kaiming_uniform_ with a = 0
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b


@dataclass
class Shared:
    """The shared matrices of one slot, with room for its capacity: a [R, in], b transposed [R, out]; zero beyond."""

    a: Tensor
    b: Tensor
    on: Tensor

    @classmethod
    def empty(cls, rank: int, targets: Sequence[Target], device: torch.device) -> "Shared":
        return cls(
            torch.zeros(rank, max(t.in_features for t in targets), device=device),
            torch.zeros(rank, max(t.out_features for t in targets), device=device),
            torch.zeros((), dtype=torch.bool, device=device),
        )

    def fill(self, a: Tensor, b: Tensor) -> None:
        """Takes a run's A0 [rank, in] and B0 [out, rank], and is on."""
        self.clear()
        self.a[: a.shape[0], : a.shape[1]] = a
        self.b[: b.shape[1], : b.shape[0]] = b.t()
        self.on.fill_(True)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a, self.b, self.on

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()

    def derive(self, a: Tensor, b: Tensor, d: Tensor, g: Tensor) -> None:
        """Writes d * A0 to a [R, in] and g * B0 to b [R, out], where the slot holds a VeRA."""
        a.copy_(torch.where(self.on, d[:, None] * self._a(a), a))
        b.copy_(torch.where(self.on, self._b(b) * g, b))

    def project(self, da: Tensor, db: Tensor, dd: Tensor, dg: Tensor) -> None:
        """Adds the gradients of a and b, as those of d and g, to `dd` and `dg`; clears them."""
        dd += torch.where(self.on, (da * self._a(da)).sum(1), 0.0)
        dg += torch.where(self.on, (db * self._b(db)).sum(0), 0.0)
        for gradient in (da, db):
            gradient.copy_(torch.where(self.on, 0.0, gradient))

    def _a(self, like: Tensor) -> Tensor:
        return self.a[: like.shape[0], : like.shape[1]]

    def _b(self, like: Tensor) -> Tensor:
        return self.b[: like.shape[0], : like.shape[1]]


class SharedMatrices(Attached):
    """The shared matrices of the slots that may hold a VeRA."""

    def __init__(self, flat: Flat[Any], layout: Layout, groups: Sequence[Wrapped], slots: Sequence[int]) -> None:
        device = flat.params.device
        self.flat = flat
        self.segments = {slot: layout.linear(slot) for slot in slots}
        self.matrices = {
            slot: Shared.empty(max(s.capacity for s in own), [s.target for s in own], device)
            for slot, own in self.segments.items()
        }
        self.places = {
            slot: torch.tensor(
                [[s.a, s.b, s.x, s.target.in_features, s.target.out_features, s.capacity] for s in own], device=device
            )
            for slot, own in self.segments.items()
        }

    @property
    def held(self) -> Sequence[Tensor]:
        return [matrix for shared in self.matrices.values() for matrix in (shared.a, shared.b)]

    def assign(self, slot: int, adapter: AdapterSpec, segments: Sequence[Segment]) -> None:
        drawn = _shared(adapter, [segment.target for segment in segments])
        self.matrices[slot].fill(drawn[A0], drawn[B0])

    def release(self, slot: int, segments: Sequence[Segment]) -> None:
        self.matrices[slot].clear()

    def derive(self, slots: Sequence[int]) -> None:
        """A and B, from the shared matrices and the factors."""
        for slot, shared in self.matrices.items():
            if slot not in slots:
                continue
            if self.flat.params.is_cuda:
                from sweeper.lora import form_kernels

                form_kernels.derive(self.flat.params, self.flat.work, *shared.tensors, self.places[slot])
                continue
            for segment in self.segments[slot]:
                params = self.flat.params
                shared.derive(*segment.pair(params), *segment.beside(params, _parts))
            self.flat.publish(slot)

    def project(self) -> None:
        """Gradients of the factors, from those of A and B."""
        for slot, shared in self.matrices.items():
            if self.flat.grads.is_cuda:
                from sweeper.lora import form_kernels

                form_kernels.project(self.flat.grads, *shared.tensors, self.places[slot])
                continue
            for segment in self.segments[slot]:
                grads = self.flat.grads
                shared.project(*segment.pair(grads), *segment.beside(grads, _parts))


def _parts(target: Target, rank: int) -> tuple[Part, ...]:
    return (
        Part("d", (rank,), "beside", "a", "vera_lambda_d", by_rank=True),
        Part("b", (target.out_features,), "beside", "b", "vera_lambda_b"),
    )


def _begin(segment: Segment, adapter: AdapterSpec, group: Wrapped, values: Sequence[Tensor]) -> None:
    values[0].fill_(float(adapter.options.get("initial", INITIAL)))


def _shared(adapter: AdapterSpec, targets: Sequence[Target]) -> dict[str, Tensor]:
    """The random matrices themselves: their seed would do on the same torch alone."""
    a, b = draw(max(adapter.ranks.values()), targets, int(adapter.options.get("key", KEY)))
    return {A0: a, B0: b}


def _factors(target: Target, values: Sequence[Tensor], shared: SharedTensors) -> tuple[Tensor, Tensor]:
    d, b = values
    return d[:, None] * shared[A0][: len(d), : target.in_features], shared[B0][: len(b), : len(d)].t() * b


def _config(spec: RunSpec, adapter: AdapterSpec, ranks: Mapping[Target, int], **more: Any) -> Any:
    """All modules have the run's rank."""
    from peft import VeraConfig

    configure: Any = VeraConfig
    return configure(
        r=spec.rank, projection_prng_key=int(adapter.options.get("key", KEY)),
        d_initial=float(adapter.options.get("initial", INITIAL)), vera_dropout=spec.method.dropout,
        **peft.places(ranks), **more,
    )  # fmt: skip


def _owns(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == "VERA"


VERA = Form(
    name="vera", parts=_parts, begin=_begin, factors=_factors, attach=SharedMatrices, shared=_shared,
    config=_config, owns=_owns, product=False,
)  # fmt: skip
