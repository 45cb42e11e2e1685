"""What a run was made with: versions, device, precision, commit."""

import functools
import importlib.metadata
import platform
from typing import Any

import torch

from sweeper.commit import commit
from sweeper.device import processor

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "hydra-core", "omegaconf", "datasets", "triton", "bitsandbytes",
    "rouge-score", "sacrebleu",
)  # fmt: skip


def describe(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Plain data for a record's `environment`."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device_type": device.type,
        "precision": None if dtype is None else str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": commit(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
