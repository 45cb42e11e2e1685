"""A step recorded once as a CUDA graph and replayed for every batch of the same shape."""

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.training.batches import Batch


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    losses: Tensor


# one H200, seconds: what a layer costs the first pass of a shape and its recording, and what it costs a lane's token
# for each of its channels; of a training step and of a pass without gradients
STEP_COSTS, SCORE_COSTS = (2.2e-2, 3e-10), (7e-3, 1e-10)
SPARE_BYTES = 2**30  # that must be free beside what a recording is expected to take


class LaneCounts:
    """How many lanes batches have, so that recordings serve again.

    A recording is of one number of lanes, so there are few numbers. Fewer runs go through a larger recording, some of
    its lanes empty, until those have cost as much as recording a smaller one: so never more than about twice what the
    best choice in hindsight costs (the ski rental problem).

    Args:
        most: lanes that there may be. recording: seconds that one shape costs. token: seconds that one of a lane costs.
    """

    def __init__(self, most: int, *, recording: float, token: float) -> None:
        self.recording, self.token = recording, token
        self.sizes = sorted({most} | {-(-most * share // 2**halvings) for halvings in range(2, 12) for share in (2, 3)})
        self.used: set[int] = set()
        self.wasted: dict[int, float] = defaultdict(float)

    def choose(self, runs: int, tokens: int, shapes: int) -> int:
        """Lanes for a batch of so many runs, with so many tokens each, where batches are of so many shapes.

        >>> counts = LaneCounts(18, recording=1.0, token=0.001)
        >>> [counts.choose(runs, 100, 1) for runs in (18, 17, 10, 4, 4, 18)]
        [18, 18, 18, 4, 4, 18]
        """
        fitting = next(size for size in self.sizes if size >= runs)
        smallest = min((size for size in self.used if size >= fitting), default=None)
        if smallest is not None:
            self.wasted[fitting] += (smallest - fitting) * self.token * tokens
        if smallest is None or self.wasted[fitting] > self.recording * shapes:
            self.used.add(fitting)
            return fitting
        return smallest


class CapturedStep:
    """Calls `step(batch)`; from the second batch of a shape on, by replaying its recording.

    The first batch of a shape runs eagerly on the capture stream, which compiles what is to be compiled and lets the
    libraries allocate their work space there. What the step reads besides the batch must stay where it is in memory.
    """

    def __init__(self, step: Callable[[Batch], Tensor]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream(priority=-1)  # before what a step runs beside it
        self.pool = torch.cuda.graph_pool_handle()
        self.warm: set[tuple[tuple[bool, int, int, int, int], Hashable]] = set()
        self.recordings: dict[Hashable, _Recording] = {}
        self.replayed = False

    @property
    def shapes(self) -> int:
        """Kinds of batches there were, whatever their number of lanes."""
        return len({(shape[0], *shape[2:], key) for shape, key in self.warm})

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
        _make_room()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), _uncollected():
            # not by `torch.cuda.graph`, which waits for the device and gives all cached memory back: the steps that
            # were queued go on meanwhile. thread_local: another thread may be waiting for copies
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                losses = self.step(static)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a capture that broke says so again when it is ended
                    graph.capture_end()
                raise
            graph.capture_end()
        return _Recording(graph, static, losses)


def _make_room() -> None:
    """Gives cached memory back where a recording, which takes about what eager passes left there, might lack it."""
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if torch.cuda.mem_get_info()[0] < cached + SPARE_BYTES:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Within it nothing is freed by the garbage collector: it may find what must not be freed during a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
