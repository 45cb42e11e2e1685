"""A running slot saved to its run folder, so that a crash costs the steps since, and no more."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"
_PARTS = ("a", "b", "exp_avg_a", "exp_avg_b", "exp_avg_sq_a", "exp_avg_sq_b")


def save(folder: Path, state: dict[str, tuple[Tensor, ...]], progress: dict[str, Any]) -> None:
    """Replaces the checkpoint of a run: adapter and moments by module, and its progress (steps, metrics so far)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}/{part}": tensor.contiguous()
        for name, parts in state.items()
        for part, tensor in zip(_PARTS, parts, strict=True)
    }
    temporary = folder / f".{CHECKPOINT}"
    save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
    temporary.replace(folder / CHECKPOINT)


def load(folder: Path) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Any]] | None:
    """State and progress of a run that was cut off, or None where there is no readable checkpoint."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads((file.metadata() or {})["progress"])
            names = dict.fromkeys(key.rpartition("/")[0] for key in file.keys())  # noqa: SIM118 (no mapping)
            return {name: tuple(file.get_tensor(f"{name}/{part}") for part in _PARTS) for name in names}, progress
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def remove(folder: Path) -> None:
    for name in (CHECKPOINT, f".{CHECKPOINT}"):
        (folder / name).unlink(missing_ok=True)
