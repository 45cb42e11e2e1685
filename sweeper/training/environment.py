"""What a run was made with: versions, device, precision, commit."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

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
        "git_commit": _commit(),
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


@functools.cache
def _commit() -> str | None:
    """Commit of the source tree, with "+" where it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here, capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() or None
