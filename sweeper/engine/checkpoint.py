"""A running slot saved to its run folder, so that a crash costs the steps since, and no more."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"


def save(folder: Path, state: dict[str, tuple[Tensor, ...]], progress: dict[str, Any]) -> None:
    """Replaces the checkpoint of a run: its slot's snapshot, and its progress (steps, metrics so far)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}/{place}": tensor.contiguous() for name, parts in state.items() for place, tensor in enumerate(parts)
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
            keys = set(file.keys())
            names = {key.rpartition("/")[0] for key in keys}
            return {
                name: tuple(file.get_tensor(f"{name}/{place}") for place in _places(name, keys)) for name in names
            }, progress
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _places(name: str, keys: set[str]) -> Iterator[int]:
    return itertools.takewhile(lambda place: f"{name}/{place}" in keys, itertools.count())


def remove(folder: Path) -> None:
    for name in (CHECKPOINT, f".{CHECKPOINT}"):
        (folder / name).unlink(missing_ok=True)
