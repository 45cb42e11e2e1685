"""Arrow (Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs").

Nothing is trained. The prototype of a member in a module is the first right singular vector of its B A: the direction
of the module's input that it changes most. A token's scores are the absolute inner products of its input with the
prototypes; the gates are the softmax over the top k of them, divided by a temperature. That is what PEFT's
`create_arrow_model` computes, which finds the vectors by 15 steps of power iteration; here they are exact.

Shapes: K members, R rank, I in, O out, N leading dimensions of the rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sweeper.adapters.library import experts as stacked
from sweeper.adapters.library import members
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, Task
from sweeper.adapters.library.experts import Experts, Gated
from sweeper.adapters.library.made import Made
from sweeper.errors import SpecError
from sweeper.placement.spectrum import decompose_product
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved


def arrow(bench: Bench, asked: Asked, task: Task) -> Made:
    """The gates of Arrow, of members less the general adapters where there are some."""
    experts, general = bench.experts, rescore.find([Path(path) for path in asked.general]) if asked.general else []
    if general:
        experts = subtracted(experts, stacked.read(bench.base, general))
    top_k = asked.most(len(bench.members))
    facts = {"top_k": top_k, "temperature": asked.temperature, "general": [members.name(run) for run in general]}
    return Made(gated(experts, top_k=top_k, temperature=asked.temperature), facts)


def gated(experts: Sequence[Experts], *, top_k: int, temperature: float) -> Gated:
    """Arrow with some experts. Members that do not adapt a module are no candidates there."""
    known = {one.target.name: (prototypes(one), min(top_k, int(one.present_K.sum()))) for one in experts}

    def gates(one: Experts, x: Tensor, z: Tensor) -> Tensor:
        prototypes_KI, count = known[one.target.name]
        scores = (x @ prototypes_KI.t()).float().abs().masked_fill(~one.present_K, -torch.inf)
        best = scores.topk(count, dim=-1)
        kept = torch.full_like(scores, -torch.inf).scatter(-1, best.indices, best.values)
        return torch.softmax(kept / temperature, dim=-1)

    return Gated(gates, {one.target.name: one for one in experts})


@torch.no_grad()
def prototypes(one: Experts) -> Tensor:
    """First right singular vectors of the members' B A, [K, I]; their sign is of no account. Zero without an update."""
    found = torch.zeros(len(one.present_K), one.a_SI.shape[1], dtype=one.a_SI.dtype, device=one.a_SI.device)
    for k in range(len(found)):
        a_RI, b_RO = one.of(k)
        if len(a_RI):
            right = decompose_product(b_RO.t(), a_RI).right
            if right.shape[1]:
                found[k] = right[:, 0].to(found.dtype)
    return found


def check_general(runs: Sequence[Saved], general: Sequence[Saved]) -> None:
    """Raises `SpecError` unless the general adapters and the members all have one rank in the same modules."""
    first = runs[0]
    for run in [*runs[1:], *general]:
        if dict(run.ranks) != dict(first.ranks) or len(set(run.ranks.values())) > 1:
            raise SpecError(
                f"general: A and B are taken off each by itself, which needs one rank and placement in all: "
                f"{members.name(first)} has {_said(first)}, {members.name(run)} {_said(run)}"
            )


def subtracted(experts: Sequence[Experts], general: Sequence[Experts]) -> list[Experts]:
    """The members less the mean A and the mean B of general adapters, all of one rank: GenKnowSub.

    As PEFT's `use_gks`: on A and B each by itself, before their scale, which is not the same as taking the mean update
    off.
    """
    found = []
    for one, other in zip(experts, general, strict=True):
        rank, each, count = one.ranks[0], len(one.ranks), len(other.ranks)
        a_RI = other.a_SI.view(count, rank, -1).mean(0)
        unscaled_SO = other.b_SO / other.scale_K[other.owner_S][:, None].to(other.b_SO)
        b_RO = unscaled_SO.view(count, rank, -1).mean(0)
        scale_S = one.scale_K[one.owner_S][:, None].to(one.b_SO)
        found.append(replace(one, a_SI=one.a_SI - a_RI.repeat(each, 1), b_SO=one.b_SO - scale_S * b_RO.repeat(each, 1)))
    return found


def _said(run: Saved) -> str:
    ranks = sorted(set(run.ranks.values()))
    return f"rank {'/'.join(map(str, ranks))} in {len(run.ranks)} modules ({run.spec.placement.name})"
