"""What a run costs alone: a few steps of it by itself on this device, before packs are formed.

Packing makes every run cheaper, so a share of a pack's time says nothing about a run alone. The two are kept apart in
the record. The measurement is kept on disk, since an arm of the same shape on the same device and versions costs the
same again.

A process allocates some things once: work spaces of cuBLAS for each thread and stream, plans, the allocator's own
segments. They are no run's, and the run that is measured first must not be charged with them: memory is measured in a
second pass over a batch, as the bytes that were asked for, and not as the sizes of the blocks that the allocator found.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweeper.models import BaseModel, held_bytes
from sweeper.record import read_sealed, write_sealed
from sweeper.spec import ObjectiveSpec
from sweeper.training.batches import DataOrder, collate, mean_weights
from sweeper.training.pack import Pack, open_pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState

MOST_WARM = 2
REPEATS = {"cuda": (5, 2), "cpu": (3, 1)}  # how often so many steps are timed; those of a CPU may take seconds
# how memory is measured, in records and in the key of what is kept on disk: once there was no first pass
WARM_PASS, SAVED_TENSORS = "warm pass", "saved tensors"


@dataclass(frozen=True, slots=True)
class Solo:
    """Seconds of one optimiser step, its tokens, and peak memory in bytes, of a run alone.

    `repeats` are the seconds of a step as each of several timings has them, `step_seconds` their median.
    Memory is that of the base, of the adapter with gradient and moments, and of activations. On CUDA the last are what
    a pass asked of the allocator at its peak, on a CPU everything that is saved for the backward pass, and
    `memory_measured` says which. What libraries keep for the process is not in it.
    """

    step_seconds: float
    step_tokens: int
    peak_memory_bytes: int
    state_bytes: int
    activation_bytes: int
    memory_measured: str
    repeats: tuple[float, ...] = ()


def key_of(base: BaseModel, job: RunState, config: PackConfig) -> str:
    """Identity of a calibration: everything that time and memory of a step depend on."""
    model = next(base.model.parameters())
    device = torch.cuda.get_device_name(model.device) if model.is_cuda else f"cpu x {torch.get_num_threads()}"
    lengths = sorted(job.order.lengths.tolist())
    objective = [] if job.spec.objective == ObjectiveSpec() else [repr(job.spec.objective)]
    computed = {name: value for name, value in dataclasses.asdict(config).items() if name != "by_task" or value}
    described = [
        dataclasses.asdict(base.spec), str(model.dtype), device, torch.__version__, job.adapter.shape(),
        computed, lengths[len(lengths) // 2], lengths[-1],
        WARM_PASS if model.is_cuda else SAVED_TENSORS, REPEATS["cuda" if model.is_cuda else "cpu"], *objective,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def measure(base: BaseModel, job: RunState, config: PackConfig, cache: Path) -> Solo:
    """Solo cost of a run, from the cache folder or by training a throw-away copy of it for a few steps."""
    path = cache / f"{key_of(base, job, config)}.json"
    try:
        found = Solo(**read_sealed(path))
        return dataclasses.replace(found, repeats=tuple(found.repeats))
    except (OSError, ValueError, TypeError):
        pass
    times, each = REPEATS.get(base.model.device.type, REPEATS["cpu"])
    steps = max(job.steps, MOST_WARM + times * each)  # a run may be shorter than what is measured
    longer = job.with_spec(trainer=dataclasses.replace(job.spec.trainer, max_steps=steps))
    afresh = dataclasses.replace(longer, done=0, tokens=0, weights=None, kept={})
    found = _measure(base, afresh, config)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
        write_sealed(path, dataclasses.asdict(found))
    return found


def _measure(base: BaseModel, job: RunState, config: PackConfig) -> Solo:
    with open_pack(base, [job.adapter], config) as pack:
        pack.add(job)
        weights = held_bytes(pack.model)
        state = pack.state_bytes
        activations = _activations(pack, job)
        fixed = dataclasses.replace(job, order=_Typical(job))
        pack.states[0] = fixed
        pack.warm_up(MOST_WARM if pack.captured else 1)
        _wait(pack)
        times, each = REPEATS.get(pack.device.type, REPEATS["cpu"])
        repeats = tuple(_timed(pack, each) for _ in range(times))
        results = list(pack.drain())
    measured = WARM_PASS if pack.device.type == "cuda" else SAVED_TENSORS
    memory = (weights + state + activations, state, activations)
    return Solo(statistics.median(repeats), results[-1].tokens, *memory, measured, repeats)


def _timed(pack: Pack, steps: int) -> float:
    """Seconds of one of so many steps."""
    began = time.perf_counter()
    for _ in range(steps):
        pack.step()
    _wait(pack)
    return (time.perf_counter() - began) / steps


class _Typical(DataOrder):
    """Data order that repeats the run's step of median length."""

    def __init__(self, job: RunState) -> None:
        order = job.order
        super().__init__(order.lengths, order.batch_size, order.seed, accumulation=order.accumulation)
        passes = range(order.accumulation)
        steps = [[order.batch(step * order.accumulation + micro) for micro in passes] for step in range(16)]
        padded = [sum(max(order.lengths[i] for i in batch) for batch in step) for step in steps]
        self.chosen = steps[sorted(range(len(steps)), key=lambda i: padded[i])[len(steps) // 2]]

    def batch(self, index: int) -> list[int]:
        return self.chosen[index % self.accumulation]


def _activations(pack: Pack, job: RunState) -> int:
    """Bytes that one forward and backward pass of the run's longest batch needs beyond weights and adapter state."""
    size = pack.config.examples
    longest = np.argsort(job.order.lengths, kind="stable")[-size:].tolist()
    rows = [row for i in (longest * size)[:size] for row in job.rows[i]]
    pack.use_lanes([0])
    batch = collate([rows], [mean_weights(rows)], fixed=pack.captured is not None, compact=pack.compacts(rows)).to(
        pack.device
    )  # fmt: skip
    if pack.device.type == "cuda":
        peak = warm_peak(lambda: pack.forward_backward(batch), Requested(pack.device))
    else:
        peak = _saved_bytes(pack, batch)
    pack.store.grads.zero_()
    return peak


class Requested:
    """Bytes that were asked of the CUDA allocator of a device and are not yet given back.

    Not the sizes of the blocks that it gave: those depend on what was freed before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def current(self) -> int:
        return self._read("current")

    @property
    def peak(self) -> int:
        return self._read("peak")

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def _read(self, which: str) -> int:
        torch.cuda.synchronize(self.device)
        stats = torch.cuda.memory_stats(self.device)
        # an allocator that does not count requests (cudaMallocAsync) counts what it gave
        return int(stats.get(f"requested_bytes.all.{which}") or stats[f"allocated_bytes.all.{which}"])


def warm_peak(step: Callable[[], object], memory: Requested) -> int:
    """Most bytes that a step holds beyond those held before it, when all that it makes once is there."""
    step()
    gc.collect()  # what a former run left in reference cycles must not be freed meanwhile
    before = memory.current
    memory.reset_peak()
    step()
    return memory.peak - before


def _saved_bytes(pack: Pack, batch: Any) -> int:
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in pack.model.parameters()}
    own |= {part.untyped_storage().data_ptr() for parts in pack.store.views(0).values() for part in parts}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pack.forward_backward(batch)
    return sum(held.values())


def _wait(pack: Pack) -> None:
    if pack.device.type == "cuda":
        torch.cuda.synchronize()
