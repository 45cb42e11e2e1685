"""How a pack computes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How a pack computes.

    Attributes:
        batch_size: sequences of one run in a forward pass. accumulation: forward passes of a step.
        compiled: compile the layers, and capture whole steps as CUDA graphs. captured: capture them uncompiled. Both do
            nothing without CUDA.
        fused: on CUDA, run layers that are recognised by kernels of our own, where those do all that the runs ask for.
        fp8: with them, train with frozen products in 8-bit floats (`sweeper.fused.fp8`).
        lengths_vary: compile once for all lengths, rather than for the first and then once more.
        checkpointing: keep no activations inside layers, and compute them again in the backward pass.
        by_task: tasks of every run, and sequences of one of them in a forward pass, where each has passes of its own:
            `accumulation` a task; `batch_size` says then only how many a step has in all.
        deterministic: no kernels that add up in an order of chance (it is attention's backward pass that has them), and
            on a CPU no product over the rows of several runs: its shape, and so its rounding, depends on how many
            there are.
    """

    batch_size: int
    accumulation: int = 1
    compiled: bool = False
    captured: bool = False
    fused: bool = True
    fp8: bool = False
    lengths_vary: bool = False
    checkpointing: bool = False
    deterministic: bool = False
    by_task: tuple[int, int] | None = None

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return self.accumulation * (self.by_task[0] if self.by_task else 1)

    @property
    def examples(self) -> int:
        """Examples of one run in a forward pass."""
        return self.by_task[1] if self.by_task else self.batch_size
