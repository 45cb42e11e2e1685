"""A step recorded once as a CUDA graph and replayed for every batch of the same shape."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.engine.batches import Batch


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    losses: Tensor


def lanes_for(count: int, most: int) -> int:
    """Lanes of a batch that holds `count` runs, in a pack of `most`.

    A recording is of one number of lanes, so there are few of them, at the price of empty lanes: a third at most, none
    up to four runs.

    >>> [lanes_for(count, 18) for count in (1, 4, 5, 8, 10, 15, 18)]
    [1, 4, 5, 9, 14, 18, 18]
    """
    sizes = {most} | {-(-most * share // 2**halvings) for halvings in range(2, 12) for share in (2, 3)}
    return count if count <= 4 else min(size for size in sizes if size >= count)


class CapturedStep:
    """Calls `step(batch)`; from the second batch of a shape on, by replaying its recording.

    The first batch of a shape runs eagerly on the capture stream, which compiles what is to be compiled and lets the
    libraries allocate their work space there. What the step reads besides the batch must stay where it is in memory.
    """

    def __init__(self, step: Callable[[Batch], Tensor]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.warm: set[Hashable] = set()
        self.recordings: dict[Hashable, _Recording] = {}
        self.replayed = False

    def __call__(self, batch: Batch, *, key: Hashable = None) -> Tensor:
        shape = (batch.shape, key)
        self.replayed = shape in self.recordings
        if shape not in self.warm:
            self.warm.add(shape)
            return self._eagerly(batch)
        if shape not in self.recordings:
            self.recordings[shape] = self._record(batch)
        recording = self.recordings[shape]
        recording.batch.copy_(batch)
        recording.graph.replay()
        return recording.losses.clone()

    def _eagerly(self, batch: Batch) -> Tensor:
        batch = batch.to(torch.device("cuda"))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = self.step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def _record(self, batch: Batch) -> _Recording:
        static = batch.to(torch.device("cuda"))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            losses = self.step(static)
        return _Recording(graph, static, losses)
