"""Token NLL of every lane without the float32 logits of the whole pack.

Logits are made chunk by chunk and turned in place into their own gradient; only the gradient of the hidden states is
kept, and that of the output matrix where it is trained.

Shapes: L lanes, K target tokens a lane (padded), D hidden size, V vocabulary.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.models.head import StockHead, apply, for_head
from sweeper.models.verdict import PLAIN, HeadForm

CHUNK_LOGITS = 1 << 28  # logits held at once, in values


@dataclass(frozen=True)
class TokenScores:
    """Per target token, [L, K]: NLL in nats (float32) and whether the target is the most likely token."""

    nll: Tensor
    correct: Tensor


class _FrozenHead(torch.autograd.Function):
    """weight * NLL of each target token, through a frozen output matrix."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, softcap, divisor):
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        nll, correct = _through_head(hidden, weight, bias, targets, weights, softcap, divisor, dhidden)
        ctx.save_for_backward(dhidden)
        ctx.mark_non_differentiable(nll, correct)
        return torch.where(weights == 0, 0.0, weights * nll), nll, correct

    @staticmethod
    def backward(ctx, dweighted, _nll, _correct):
        (dhidden,) = ctx.saved_tensors
        # the rows already carry their weights
        return dhidden * dweighted[:, None].to(dhidden.dtype), None, None, None, None, None, None


class _TokenNLL(torch.autograd.Function):
    """NLL of each target token through a frozen output matrix; the backward pass makes the logits once more."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, divisor):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.softcap, ctx.divisor = softcap, divisor
        ones = torch.ones(targets.shape, device=hidden.device)
        nll, _ = _through_head(hidden, weight, bias, targets, ones, softcap, divisor, None)
        return nll

    @staticmethod
    def backward(ctx, dnll):
        hidden, weight, bias, targets = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        _through_head(hidden, weight, bias, targets, dnll.contiguous(), ctx.softcap, ctx.divisor, dhidden)
        return dhidden, None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Sum of weight * NLL over all target tokens, through an output matrix that is trained itself."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, softcap, divisor):
        needed = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if needed[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] else None
        nll, correct = _through_head(
            hidden, weight, bias, targets, weights, softcap, divisor, dhidden, dweight=dweight, dbias=dbias
        )
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, correct)
        return torch.where(weights == 0, 0.0, weights * nll).sum(), nll, correct

    @staticmethod
    def backward(ctx, dloss, _nll, _correct):
        dhidden, dweight, dbias = ctx.saved_tensors
        found = [
            None if gradient is None else (gradient * dloss).to(dtype)
            for gradient, dtype in zip(
                (dhidden, dweight, dbias), (getattr(dhidden, "dtype", None), *ctx.dtypes), strict=True
            )
        ]
        return (*found, None, None, None, None)


def _through_head(hidden, weight, bias, targets, weights, softcap, divisor, dhidden, *, dweight=None, dbias=None):
    """NLL and correctness [K]; fills in the gradients that are not None, each row times its weight."""
    grad = dhidden is not None or dweight is not None or dbias is not None
    nll = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(targets.shape, dtype=torch.bool, device=hidden.device)
    size = max(1, CHUNK_LOGITS // weight.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        logits = torch.mm(hidden[part], weight.t()) if bias is None else torch.addmm(bias, hidden[part], weight.t())
        if divisor != 1.0:
            logits /= divisor
        nll[part], correct[part] = token_loss(logits, targets[part], weights[part], softcap, grad=grad)
        if grad and divisor != 1.0:
            logits /= divisor
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[part])
        if dweight is not None:
            dweight += torch.mm(logits.t(), hidden[part])
        if dbias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    return nll, correct


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor, softcap: float | None, *, grad: bool):
    """NLL and argmax correctness [K] of logits [K, V]; with `grad`, the logits become weight * d NLL / d logits."""
    if logits.is_cuda:
        from sweeper.models import loss_kernel

        return loss_kernel.token_loss(logits, targets, weights, softcap, grad=grad)
    capped = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    log_p = functional.log_softmax(capped, dim=-1)
    nll = functional.nll_loss(log_p, targets, reduction="none")
    correct = capped.argmax(-1) == targets
    if grad:
        gradient = log_p.exp_()
        gradient[torch.arange(len(targets)), targets] -= 1
        gradient *= weights[:, None]
        if softcap is not None:
            gradient *= 1 - (capped / softcap).square()
        # a row of weight 0 is padding and must stay 0 even where its logits overflow
        logits.copy_(torch.where(weights[:, None] == 0, 0.0, gradient))
    return nll, correct


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: `module`, then a divisor (Granite) and a soft cap (Gemma 2)."""

    module: nn.Module
    form: HeadForm = PLAIN

    @classmethod
    def of(cls, model: Any, form: HeadForm) -> "Head":
        """The head of a model whose verdict has this form."""
        return cls(StockHead(model) if form.stock else model.get_output_embeddings(), form)

    def scores(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, TokenScores]:
        """Loss [L] = sum of weight * NLL, and the token scores.

        Args:
            hidden: [L*K, D] states that predict the targets. targets: [L, K] token ids.
            weights: [L, K] float32; 0 for padding.
        """
        flat = (targets.flatten(), weights.flatten(), self.form.softcap, self.form.divisor)
        hidden = for_head(self.module, hidden)
        if type(self.module) is nn.Linear:
            weight, bias = self.module.weight, self.module.bias
            trained = weight.requires_grad or (bias is not None and bias.requires_grad)
            if trained and torch.is_grad_enabled():
                assert len(targets) == 1, "a head that is trained has one lane"
                loss, nll, correct = _TrainedHead.apply(hidden, weight, bias, *flat)
                return loss[None], TokenScores(nll.view(targets.shape), correct.view(targets.shape))
            weighted, nll, correct = _FrozenHead.apply(hidden, weight, bias, *flat)
        else:
            logits = self.target_logits(hidden)
            nll = functional.cross_entropy(logits, targets.flatten(), reduction="none")
            correct = logits.argmax(-1) == targets.flatten()
            weighted = torch.where(weights.flatten() == 0, 0.0, weights.flatten() * nll)
        scores = TokenScores(nll.detach().view(targets.shape), correct.view(targets.shape))
        return weighted.view(targets.shape).sum(1), scores

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """NLL [L, K] of each target token, differentiable in the hidden states and in a head that is trained.

        Args:
            hidden: [L*K, D] states that predict the targets. targets: [L, K] token ids.
        """
        hidden, flat = for_head(self.module, hidden), targets.flatten()
        frozen = type(self.module) is nn.Linear and not any(p.requires_grad for p in self.module.parameters())
        if frozen:
            found = _TokenNLL.apply(
                hidden, self.module.weight, self.module.bias, flat, self.form.softcap, self.form.divisor
            )
        else:
            found = functional.cross_entropy(self.target_logits(hidden), flat, reduction="none")
        return found.view(targets.shape)

    def target_logits(self, hidden: Tensor) -> Tensor:
        """`logits` of states [N, D] of target tokens, whatever sequences they are of."""
        with getattr(self.module, "one_sequence", contextlib.nullcontext)():
            return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., D], as the stock model computes them."""
        return apply(self.module, self.form, hidden)
