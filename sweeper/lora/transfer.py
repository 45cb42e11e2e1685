"""Copies between host and device that neither side waits for."""

from dataclasses import dataclass

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
