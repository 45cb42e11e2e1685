"""A second stream for what nobody waits for soon; a captured step gets a branch of it."""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Beside:
    """Work beside the main stream. On a CPU all is done in turn.

    What is begun here sees all that was given to the main stream before. Its tensors may be used there after `wait`.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: deque[tuple[Any, tuple[Tensor | None, ...]]] = deque()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> Any:
        """How far this stream has come, to wait for."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """The main stream goes on when this one has come so far."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def hold(self, *tensors: Tensor | None) -> None:
        """Keeps the memory of tensors that work here still reads, until after the next call."""
        self.held.append((self.mark(), tensors))
        while len(self.held) > 1:
            self.wait(self.held.popleft()[0])

    def finish(self) -> None:
        """The main stream goes on when all of it is done."""
        while self.held:
            self.wait(self.held.popleft()[0])
