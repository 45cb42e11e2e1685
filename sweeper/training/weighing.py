"""Learnt weights of the tasks' losses (Kendall et al. 2018, eq. 10, with s = log sigma^2 and half of it added).

A run of tasks p with mean NLLs L_p, each over its own tokens of a step, minimises

    sum over the tasks p of the step of exp(-s_p) L_p + s_p / 2

in the adapter and in the log variances s_p, which begin at 0. Adam moves them at the run's learning rate, without
weight decay and outside the adapter's clipping norm; a task without rows in a step keeps its own to the bit.

All of it is on the device, in tensors that stay where they are: a captured step reads them, and the host waits for
nothing.

Shapes: J slots, L lanes, K target tokens of a lane (padded), P tasks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sweeper.lora.optimizer import learning_rate
from sweeper.lora.transfer import send
from sweeper.spec import OptimSpec
from sweeper.training.batches import Batch

STATE = "log variances of tasks"  # of a snapshot: s and its Adam moments; no module is called that
# columns of what the host says of a task's next update
LR, BETA1, BETA2, EPS, CORRECTION1, CORRECTION2 = range(6)
IDLE = [float("nan")] * 6


def hyperparameters(optim: OptimSpec, step: int, max_steps: int, own: int) -> list[float]:
    """A task's row for a step (from 0) of its run, its own `own`-th (from 0): Adam's corrections count those alone."""
    beta1, beta2 = optim.beta1, optim.beta2
    return [
        learning_rate(optim, step, max_steps), beta1, beta2, optim.eps, 1 - beta1 ** (own + 1),
        (1 - beta2 ** (own + 1)) ** 0.5,
    ]  # fmt: skip


class LearntWeights:
    """The log variances of the runs of every slot; a slot whose run learns none has zeros, and so weights of 1.

    Attributes:
        tasks: of each slot, how many its run learns the weights of; 0 where it learns none.
        width: most tasks that there ever were, P.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.tasks, self.width, self.device = [0] * slots, 0, device
        self._widen(0)

    def _widen(self, width: int) -> None:
        # a row more than slots, for lanes without a run
        former, self.width = getattr(self, "state", None), width
        self.state = torch.zeros(3, len(self.tasks) + 1, width, device=self.device)
        if former is not None:
            self.state[:, :, : former.shape[2]] = former
        self.means = torch.zeros_like(self.state[0])

    @property
    def active(self) -> bool:
        """Whether any slot's run learns weights."""
        return any(self.tasks)

    @property
    def key(self) -> int:
        """Equal for steps that do the same with the weights: 0 where there are none."""
        return self.width if self.active else 0

    @torch.no_grad()
    def assign(self, slot: int, tasks: int, state: Sequence[Tensor] | None = None) -> None:
        """Gives a slot to a run that learns the weights of so many tasks: at 0, or from a snapshot."""
        self.tasks[slot] = tasks
        if tasks > self.width:
            self._widen(tasks)
        self.state[:, slot] = 0.0
        if tasks and state is not None:
            self.state[:, slot, :tasks] = send(torch.stack(list(state)), self.device)

    def release(self, slot: int) -> None:
        """The run of a slot has left it."""
        self.assign(slot, 0)

    def snapshot(self, slot: int) -> dict[str, tuple[Tensor, ...]]:
        """What resuming needs, on the host; nothing where the slot's run learns no weights."""
        own = self.tasks[slot]
        return {STATE: tuple(self.state[:, slot, :own].to("cpu", copy=True))} if own else {}

    def weigh(self, batch: Batch, slots: Tensor) -> Tensor:
        """The weights of the target tokens [L, K], each times exp(-s) of its row's task."""
        own = self.state[0].index_select(0, self._rows(slots))
        return batch.weights * torch.exp(-own.gather(1, self._task_of(batch)))

    @torch.no_grad()
    def note(self, batch: Batch, slots: Tensor, nll: Tensor) -> None:
        """Adds a pass's share of every task's mean NLL; `nll` [L, K] in nats."""
        weighted = torch.where(batch.weights == 0, 0.0, batch.weights * nll)
        numbers = torch.arange(self.width, device=nll.device)
        of_task = self._task_of(batch)[:, None] == numbers[None, :, None]
        # no scatter: its sums are in an order of chance on a GPU
        self.means.index_add_(0, self._rows(slots), torch.where(of_task, weighted[:, None], 0.0).sum(2))

    @torch.no_grad()
    def step(self, rows: Mapping[int, Sequence[list[float]]], slots: Tensor) -> Tensor:
        """One update of the log variances of some slots, from the means noted since the last.

        Args:
            rows: slot -> `hyperparameters` of each of its tasks, `IDLE` of one without rows in this step.

        Returns:
            What the log variances add to the loss of each lane [L], before the update.
        """
        table = [[[*IDLE] for _ in range(self.width)] for _ in range(len(self.tasks) + 1)]
        for slot, own in rows.items():
            table[slot][: len(own)] = own
        column = send(torch.tensor(table), self.device).unbind(2)
        s, m, v = self.state
        there = ~column[LR].isnan()
        added = torch.where(there, s / 2, 0.0).sum(1).index_select(0, self._rows(slots))
        gradient = 0.5 - torch.exp(-s) * self.means
        live = there & gradient.isfinite()
        first = m + (gradient - m) * (1 - column[BETA1])
        second = column[BETA2] * v + (1 - column[BETA2]) * gradient.square()
        scale = second.sqrt() / column[CORRECTION2] + column[EPS]
        moved = torch.stack([s - column[LR] / column[CORRECTION1] * first / scale, first, second])
        self.state.copy_(torch.where(live, moved, self.state))
        self.means.zero_()
        return added

    def _rows(self, slots: Tensor) -> Tensor:
        """Rows of the state that the lanes' slots have."""
        return torch.where(slots < 0, len(self.tasks), slots).to(torch.int64)

    def _task_of(self, batch: Batch) -> Tensor:
        """Which task of its run every target token is of [L, K]; of runs that learn no weights it does not matter."""
        lanes = len(batch.index)
        return batch.tasks.view(lanes, -1).gather(1, batch.rows).clamp(max=self.width - 1)
