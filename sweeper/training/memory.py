"""How many runs fit together: the base once, and every run's adapter state and activations."""

from collections.abc import Sequence

import torch

from sweeper import methods
from sweeper.device import free_bytes
from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel, budget, total_parameters
from sweeper.spec import Settings
from sweeper.training.calibrate import Solo
from sweeper.training.run_state import RunState

STATE_BYTES = 16  # of one value of an adapter: itself, gradient and two moments in float32
GATE_BYTES = 12  # of a token's gate of one hidden column: as it is drawn, spread and chosen, in float32
MARGIN = 0.85  # of what is free; the rest is for fragments, work space and evaluation
MOST = 64  # runs in a pack; more gain nothing measurable (docs/performance.md)


def runs_that_fit(
    base: BaseModel, runs: Sequence[tuple[RunState, Solo | None]], settings: Settings, device: torch.device,
    *, at_once: int,
) -> int:  # fmt: skip
    """Number of slots for runs like these, of which there are never more than `at_once`; at least 1.

    A run's share is what its calibration measured; without one, the closed form of `sweeper.models.budget`. Slots that
    change hands must hold the largest run, so the largest share counts for all of them.
    """
    most = min(settings.max_pack or MOST, at_once)
    largest = max(run_bytes(base, run, solo) for run, solo in runs)
    return max(1, min(most, int(free_bytes(device) * MARGIN / largest)))


def run_bytes(base: BaseModel, run: RunState, solo: Solo | None) -> int:
    """Memory that one more run adds to a pack: adapter state and activations of its longest batch."""
    if solo is not None:
        return solo.state_bytes + solo.activation_bytes
    trainer = run.spec.trainer
    parameter = next(base.model.parameters())
    held = methods.held(run.spec, run.ranks, total=total_parameters(base.model))
    by_task = None if run.mixture is None else run.mixture.by_task(trainer.accumulation)
    tasks, examples = by_task or (0, trainer.batch_size)
    copies = len(run.adapter.copies) if isinstance(run.adapter, AdapterSpec) else 0
    columns = sum(-(-rank // 16) * 16 for rank in run.ranks.values()) if run.experts else 0
    gates = GATE_BYTES * examples * run.rows_of_example * int(run.order.lengths.max()) * columns
    return (
        gates
        + (STATE_BYTES + 4 * copies + budget.GRADIENT_BYTES * tasks) * held
        + budget.activation_bytes(
            base.targets,
            run.ranks,
            batch_size=examples * run.rows_of_example,
            length=int(run.order.lengths.max()),
            bytes_per_value=parameter.element_size(),
            checkpointing=trainer.activation_checkpointing,
        )
    )
