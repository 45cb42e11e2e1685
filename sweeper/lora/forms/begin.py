"""How A and B begin.

uniform  A uniform as PEFT draws it, B zero (Hu et al. 2021)
pissa    the first singular vectors of W, times the root of their singular values (Meng et al. 2024)
olora    the first columns of Q and rows of R of W = Q R (Büyükakyüz 2024)

PiSSA and OLoRA begin away from zero and in their papers take the beginning off the base weights. The base of a pack is
shared and stays as it is, so it is subtracted by a frozen second half of the adapter: B A - B0 A0.
"""

import math
import weakref

import torch
from torch import Tensor, nn

from sweeper.lora.forms.form import AdapterSpec
from sweeper.lora.seeds import seed_of
from sweeper.models.architecture import Target

_KEPT = 64  # singular triples or columns of one module that are kept for other ranks

_FACTORS: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, int, int], tuple[Tensor, ...]]]"
_FACTORS = weakref.WeakKeyDictionary()


def uniform(target: Target, a: Tensor, b: Tensor, seed: int, *, again: int = 0) -> None:
    """Fills, of zeros on the host, A [rank, in] uniformly within 1 / sqrt(in); of an embedding B [rank, out] normally.

    The draw depends on seed and module name only, so arms that share a module share its beginning. `again` counts the
    restarts of ReLoRA.
    """
    generator = torch.Generator().manual_seed(seed_of(f"{seed}/{target.name}" + (f"/{again}" if again else "")))
    if target.kind == "embedding":
        b.normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(target.in_features)
        a.uniform_(-bound, bound, generator=generator)


def principal(module: nn.Module, weight: Tensor, target: Target, adapter: AdapterSpec) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B transposed [rank, out] that PiSSA or OLoRA begin with, as PEFT makes them.

    Args:
        weight: [in, out] of the module.
    """
    rank, scale = adapter.trained[target.name], adapter.scales[target.name]
    left, values, right = _factors(module, weight, target, adapter, rank)
    if adapter.begin == "olora":
        return right[:rank], left[:, :rank].t()
    root = (values[:rank] / scale).sqrt()[:, None]
    return root * right[:rank], root * left[:, :rank].t()


def _factors(
    module: nn.Module, weight: Tensor, target: Target, adapter: AdapterSpec, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Left [out, k], values [k] and right [k, in] factors of a module's matrix; once for all runs on a model."""
    exact = adapter.niter == 0
    kept = max(rank, _KEPT) if exact else rank
    held = _FACTORS.setdefault(module, {})
    key = (adapter.begin, adapter.niter, 0 if exact and rank <= _KEPT else rank)
    if key not in held:
        matrix = weight.t().float().contiguous()
        if adapter.begin == "olora":
            left, right = torch.linalg.qr(matrix)
            values = right.new_ones(right.shape[0])
        elif exact:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
                torch.manual_seed(seed_of(target.name))
                left, values, right = torch.svd_lowrank(matrix, rank, niter=adapter.niter)
            right = right.t()
        held[key] = (left[:, :kept].cpu().clone(), values[:kept].cpu().clone(), right[:kept].cpu().clone())
    left, values, right = held[key]
    return left, values, right
