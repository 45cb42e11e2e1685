"""AdamW for every slot of a pack at once: each run has its own learning rate, decay, clipping norm and step count.

Shapes: F values of the flat store, J slots, C clocks (as many as slots, but where adapters have rank blocks), 64 values
a block.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sweeper.lora.flat import Flat
from sweeper.lora.layout import BLOCK
from sweeper.spec import OptimSpec

if TYPE_CHECKING:
    from sweeper.lora import kernels

# columns of the hyperparameter table [C, 8]; a row of NaN marks an idle clock
LR, WEIGHT_DECAY, BETA1, BETA2, EPS, CORRECTION1, CORRECTION2, MAX_NORM = range(8)


def learning_rate(optim: OptimSpec, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up from 0, then the schedule, as transformers' schedulers."""
    warmup = math.ceil(max_steps * optim.warmup_fraction)
    if step < warmup:
        return optim.lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, max_steps - warmup)
    if optim.schedule == "linear":
        return optim.lr * max(0.0, 1 - progress)
    if optim.schedule == "cosine":
        return optim.lr * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return optim.lr


IDLE = [math.nan] * 8


def hyperparameters(optim: OptimSpec, step: int, max_steps: int) -> list[float]:
    """A clock's row of the table for its own step `step`, from 0."""
    t = step + 1
    return [
        learning_rate(optim, step, max_steps),
        optim.weight_decay,
        optim.beta1,
        optim.beta2,
        optim.eps,
        1 - optim.beta1**t,
        math.sqrt(1 - optim.beta2**t),
        optim.max_grad_norm or math.inf,
    ]


@dataclass
class PackedAdamW:
    """AdamW (Loshchilov & Hutter 2019) over a `Flat`, clipped by the gradient norm of each run, or block of a run.

    What has a clock whose gradient norm is not finite, or whose row is NaN (idle), keeps its parameters and moments. A
    value's rate (`flat.rates`) multiplies the learning rate of its run; one of rate 0 is frozen: it is part
    of no norm and has no moments.
    """

    flat: Flat[Any]

    def __post_init__(self) -> None:
        clocks = self.flat.clocks
        device = self.flat.params.device
        self.table = torch.full((clocks, 8), math.nan, device=device)
        self.norms = torch.zeros(clocks, device=device)
        self.squares: kernels.Squares | None = None

    def set(self, rows: Mapping[int, Sequence[list[float]]]) -> None:
        """Loads the hyperparameters of the coming step, a row for each clock of a slot; the others stay idle."""
        each = self.flat.clocks_each
        table = [IDLE] * len(self.table)
        for slot, own in rows.items():
            table[slot * each : slot * each + len(own)] = own
        values = torch.tensor(table)
        self.table.copy_(values, non_blocking=True)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One update of all that is set. Returns gradient norms [J] before clipping; zeroes the gradients."""
        flat = self.flat
        if flat.params.is_cuda:
            from sweeper.lora import kernels

            self.squares = self.squares or kernels.Squares(flat.block_clock, len(self.norms))
            kernels.adamw(
                flat.params, flat.work, flat.grads, flat.exp_avg, flat.exp_avg_sq, flat.rates, flat.block_clock,
                self.table, self.norms, self.squares,
            )  # fmt: skip
            return self._by_slot()
        for slot, rated in enumerate(flat.rated):
            if rated and flat.rates is not None:
                for start, stop in flat.spans[slot]:
                    flat.grads[start:stop].masked_fill_(flat.rates[start:stop] == 0, 0.0)
        blocks = flat.grads.view(-1, BLOCK)
        # in float64, or where a value lies in its block would show in the last bit
        squares = torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64).square()
        self.norms.copy_(
            torch.zeros_like(self.norms, dtype=torch.float64).index_add_(0, flat.block_clock, squares).sqrt()
        )
        row = self.table.clone()
        live = torch.isfinite(self.norms) & torch.isfinite(row[:, LR])
        clip = (row[:, MAX_NORM] / (self.norms + 1e-6)).clamp(max=1)
        for clock in live.nonzero().flatten().tolist():
            self._update(clock, row[clock].tolist(), float(clip[clock]))
        flat.grads.zero_()
        return self._by_slot()

    def _by_slot(self) -> Tensor:
        """Gradient norms of what was stepped [J]."""
        each = self.flat.clocks_each
        if each == 1:
            return self.norms
        stepped: Tensor = torch.where(self.table[:, LR].isnan(), 0.0, self.norms).view(-1, each)
        return stepped.square().sum(1).sqrt()

    def _update(self, clock: int, row: list[float], clip: float) -> None:
        flat = self.flat
        rates = flat.rates if flat.rated[clock // flat.clocks_each] else None
        for start, stop in flat.clock_spans[clock]:
            p, g, m, v = (s[start:stop] for s in (flat.params, flat.grads, flat.exp_avg, flat.exp_avg_sq))
            g = g * clip
            m.lerp_(g, 1 - row[BETA1])
            v.mul_(row[BETA2]).addcmul_(g, g, value=1 - row[BETA2])
            scale = v.sqrt().div_(row[CORRECTION2]).add_(row[EPS])
            if rates is None:
                p.mul_(1 - row[LR] * row[WEIGHT_DECAY])
                p.addcdiv_(m, scale, value=-row[LR] / row[CORRECTION1])
            else:
                rate = rates[start:stop]
                p.mul_(1 - row[LR] * row[WEIGHT_DECAY] * rate)
                p.addcdiv_(m * rate, scale, value=-row[LR] / row[CORRECTION1])
            if flat.work is not flat.params:
                flat.work[start:stop] = p
