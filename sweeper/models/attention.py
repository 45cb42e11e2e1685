"""The attention kernel to train with."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention


def training_kernel(
    device: torch.device, dtype: torch.dtype, *, deterministic: bool
) -> contextlib.AbstractContextManager[None]:
    """Within it, attention takes torch's choice of kernel, except where its backward pass on a CPU is the slow one.

    In bfloat16 the CPU's flash kernel takes 34 ms backward for 72 rows of 24 tokens, the plain one 10 ms both ways.

    Args:
        deterministic: no kernel that adds up by atomic operations, whose order, and so rounding, is by chance.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return _repeatable() if deterministic else contextlib.nullcontext()


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    settings: Any = torch.utils.deterministic
    fills, on, warns = (
        settings.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # torch's own size on these cards, which it wants to see set
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warns)
        settings.fill_uninitialized_memory = fills
