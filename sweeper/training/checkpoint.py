"""A running slot saved to its run folder, so that a crash costs the steps since, and no more."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sweeper.errors import gist
from sweeper.record import CHECKPOINT, read_json, replacing_file

__all__ = ["CHECKPOINT", "load", "remove", "save"]


def save(folder: Path, state: dict[str, tuple[Tensor, ...]], progress: dict[str, Any]) -> None:
    """Replaces the checkpoint of a run: adapter and moments by module (`Pack.snapshot`), and its progress.

    Its metadata have a digest of both, for a flipped bit is still a safetensors file.
    """
    tensors = {
        f"{name}/{place:02}": tensor.contiguous() for name, parts in state.items() for place, tensor in enumerate(parts)
    }
    with replacing_file(folder / CHECKPOINT) as temporary:
        told = json.dumps(progress)
        save_file(tensors, temporary, metadata={"progress": told, "digest": _digest(tensors, told)})


class Damaged(ValueError):
    """A checkpoint is not what was written."""


def load(folder: Path) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Any]] | None:
    """State and progress of a run that was cut off, or None where there is no checkpoint.

    Raises:
        Damaged: it is not whole.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        told = metadata["progress"]
        if "digest" in metadata and metadata["digest"] != _digest(tensors, told):  # an earlier version wrote none
            raise Damaged("its digest is of something else")
        state: dict[str, list[Tensor]] = {}
        for key, tensor in tensors.items():
            state.setdefault(key.rpartition("/")[0], []).append(tensor)
        return {name: tuple(parts) for name, parts in state.items()}, read_json(told)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise Damaged(gist(error)) from None


def remove(folder: Path) -> None:
    """Removes a run's checkpoint."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], progress: str) -> str:
    """BLAKE2b of names, kinds, shapes and bytes of tensors on the host, and of the progress."""
    found = hashlib.blake2b(progress.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
