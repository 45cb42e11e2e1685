"""What stands in the base model for the token embedding that is adapted."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sweeper.lora.wrappers import Lanes
from sweeper.models.architecture import Target


class _EmbeddingLookup(torch.autograd.Function):
    """Frozen embedding rows plus s * A[:, id]^T B of each lane's slot."""

    @staticmethod
    def forward(ctx, ids, weight, params, group, slots):
        y = weight[ids]
        hidden = []
        for rows, a, b, scale in group.walk(params, slots, len(ids)):
            part = (a[:, ids[rows]].t() * scale).to(y.dtype)
            y[rows] += part @ b.to(y.dtype)
            hidden.append(part)
        ctx.save_for_backward(ids, params, *hidden)
        ctx.group, ctx.slots = group, slots
        return y

    @staticmethod
    def backward(ctx, dy):
        ids, params, *hidden = ctx.saved_tensors
        dparams = torch.zeros_like(params)
        walk = zip(
            ctx.group.walk(params, ctx.slots, len(ids)),
            ctx.group.walk(dparams, ctx.slots, len(ids)),
            hidden,
            strict=True,
        )
        for (rows, _, b, scale), (_, grad_a, grad_b, _), part in walk:
            grad_b.copy_(part.t() @ dy[rows])
            grad_a.index_add_(1, ids[rows], (dy[rows] @ b.to(dy.dtype).t() * scale).t().to(grad_a.dtype))
        return None, None, dparams, None, None


class AdaptedEmbedding(nn.Module):
    """Stands in for the token embedding. Its lanes are walked on the host, so such a pack runs without CUDA graphs."""

    def __init__(self, base: nn.Embedding, target: Target, lanes: Lanes) -> None:
        super().__init__()
        self.base, self.target, self.lanes = base, target, lanes

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def attach(self, params: Tensor, _work: Tensor, table: Tensor, scale: Tensor, _hidden: int) -> None:
        self.params, self.table, self.scale = params, table, scale

    def walk(self, params: Tensor, slots: Sequence[int], rows: int) -> Iterator[tuple[slice, Tensor, Tensor, float]]:
        share = rows // len(slots)
        for lane, slot in enumerate(slots):
            rank, a, b, _ = self.table[slot, 0].tolist() if slot >= 0 else (0, 0, 0, 0)
            if rank:
                yield (
                    slice(lane * share, (lane + 1) * share),
                    params[a : a + rank * self.target.in_features].view(rank, -1),
                    params[b : b + rank * self.target.out_features].view(rank, -1),
                    float(self.scale[slot, 0]),
                )

    def forward(self, ids: Tensor) -> Tensor:
        flat = _EmbeddingLookup.apply(ids.reshape(-1), self.base.weight, self.params, self, self.lanes.host_slots)
        return flat.view(*ids.shape, -1) * getattr(self.base, "embed_scale", 1.0)
