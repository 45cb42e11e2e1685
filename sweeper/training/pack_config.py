"""How a pack computes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How a pack computes.

    Attributes:
        batch_size: sequences of one run in a forward pass. accumulation: forward passes of a step.
        compiled: compile the layers, and capture whole steps as CUDA graphs. captured: capture them uncompiled. Both do
            nothing without CUDA.
        lengths_vary: compile once for all lengths, rather than for the first and then once more.
        checkpointing: keep no activations inside layers, and compute them again in the backward pass.
        deterministic: no kernels that add up in an order of chance. It is attention's backward pass that has them.
    """

    batch_size: int
    accumulation: int = 1
    compiled: bool = False
    captured: bool = False
    lengths_vary: bool = False
    checkpointing: bool = False
    deterministic: bool = False
