"""Copies between host and device that neither side waits for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fetched:
    """A copy on the host that may still be on its way."""

    values: Tensor
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


def fetch(tensor: Tensor) -> Fetched:
    """Brings a tensor that nobody changes any more to the host."""
    if not tensor.is_cuda:
        return Fetched(tensor)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Fetched(host, arrived)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; page-locked on its way, or the copy would wait for all that is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def zeros(size: int, device: torch.device) -> Tensor:
    """Zeros on the host that are about to be filled and sent."""
    return torch.zeros(size, pin_memory=device.type == "cuda")


class Mirrored:
    """Small tensors that the host writes, as arrays, and the device reads; moved there all at once."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(sum(sizes), dtype=dtype)
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        self.host: list[Any] = [part.numpy() for part in self._host.split(list(sizes))]
        self.device = self._device.split(list(sizes))

    def upload(self) -> None:
        """Brings the device's copy up to date."""
        if self._device is not self._host:
            self._device.copy_(send(self._host, self._device.device))


@torch.no_grad()
def fetch_all(tensors: Mapping[str, tuple[Tensor, ...]]) -> Callable[[], dict[str, tuple[Tensor, ...]]]:
    """Copies float32 tensors to the host in one piece; called, it waits until they are there."""
    flat = [tensor.reshape(-1) for parts in tensors.values() for tensor in parts]
    sizes = [tensor.numel() for tensor in flat]
    shapes = {name: [tensor.shape for tensor in parts] for name, parts in tensors.items()}
    fetched = fetch(torch.cat(flat)) if flat else Fetched(torch.empty(0))

    def arrived() -> dict[str, tuple[Tensor, ...]]:
        values = iter(fetched.wait().split(sizes))
        return {name: tuple(next(values).view(shape) for shape in parts) for name, parts in shapes.items()}

    return arrived
