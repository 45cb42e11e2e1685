"""Triton kernel of the token loss on CUDA; `loss.py` defines what it computes.

Shapes: K target tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _token_loss(
    logits, targets, weights, nll, correct, width, stride, softcap,
    CAP: tl.constexpr, GRAD: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Per row: NLL of the target and whether it is the argmax; overwrites the logits by weight * d NLL / d logits."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    target = tl.load(targets + row)
    high = -float("inf")
    total = 0.0
    best = -1
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        value = tl.load(base + c, mask=c < width, other=-float("inf")).to(tl.float32)
        if CAP:
            value = softcap * (2 / (1 + tl.exp(-2 * value / softcap)) - 1)
            value = tl.where(c < width, value, -float("inf"))
        peak = tl.max(value, 0)
        if peak > high:
            best = start + tl.argmax(value, 0)
        top = tl.maximum(high, peak)
        total = total * tl.exp(high - top) + tl.sum(tl.exp(value - top), 0)
        high = top
    log_total = high + tl.log(total)
    chosen = tl.load(base + target).to(tl.float32)
    if CAP:
        chosen = softcap * (2 / (1 + tl.exp(-2 * chosen / softcap)) - 1)
    tl.store(nll + row, log_total - chosen)
    tl.store(correct + row, (best == target).to(tl.int8))
    if GRAD:
        weight = tl.load(weights + row)
        for start in range(0, width, COLS):
            c = start + tl.arange(0, COLS)
            raw = tl.load(base + c, mask=c < width, other=0.0).to(tl.float32)
            slope = 1.0
            if CAP:
                squashed = 2 / (1 + tl.exp(-2 * raw / softcap)) - 1
                slope = 1 - squashed * squashed
                raw = softcap * squashed
            gradient = (tl.exp(raw - log_total) - (c == target).to(tl.float32)) * weight * slope
            gradient = tl.where(weight == 0, 0.0, gradient)
            tl.store(base + c, gradient.to(logits.dtype.element_ty), mask=c < width)


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor, softcap: float | None, *, grad: bool):
    """NLL [K] and argmax correctness [K] of `logits` [K, V]; with `grad`, the logits become weight * gradient."""
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    correct = torch.empty(logits.shape[0], dtype=torch.int8, device=logits.device)
    _token_loss[(logits.shape[0],)](
        logits, targets, weights, nll, correct, logits.shape[1], logits.stride(0), softcap or 1.0,
        CAP=softcap is not None, GRAD=grad, COLS=min(4096, triton.next_power_of_2(logits.shape[1])), num_warps=8,
    )  # fmt: skip
    return nll, correct
