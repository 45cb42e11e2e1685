"""A running slot saved to its run folder, so that a crash costs the steps since, and no more."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sweeper.record import CHECKPOINT, read_json, replacing_file

__all__ = ["CHECKPOINT", "load", "remove", "save"]


def save(folder: Path, state: dict[str, tuple[Tensor, ...]], progress: dict[str, Any]) -> None:
    """Replaces the checkpoint of a run: adapter and moments by module (`Pack.snapshot`), and its progress."""
    tensors = {
        f"{name}/{place:02}": tensor.contiguous() for name, parts in state.items() for place, tensor in enumerate(parts)
    }
    with replacing_file(folder / CHECKPOINT) as temporary:
        save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})


def load(folder: Path) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Any]] | None:
    """State and progress of a run that was cut off, or None where there is no readable checkpoint."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            progress = read_json((file.metadata() or {})["progress"])
            state: dict[str, list[Tensor]] = {}
            for key in sorted(file.keys()):
                state.setdefault(key.rpartition("/")[0], []).append(file.get_tensor(key))
            return {name: tuple(parts) for name, parts in state.items()}, progress
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def remove(folder: Path) -> None:
    """Removes a run's checkpoint."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
