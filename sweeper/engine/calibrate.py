"""What a run costs alone: a few steps of it by itself on this device, before packs are formed.

Packing makes every run cheaper, so a share of a pack's time says nothing about a run alone. The two are kept apart in
the record. The measurement is kept on disk, since an arm of the same shape on the same device and versions costs the
same again.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweeper.engine.batches import DataOrder, collate, supervised
from sweeper.engine.pack import Job, Pack, open_pack
from sweeper.models import BaseModel, held_bytes
from sweeper.record import write_atomically

TIMED_STEPS, MOST_WARM = 2, 2


@dataclass(frozen=True, slots=True)
class Solo:
    """Seconds of one optimiser step, its tokens, and peak memory in bytes, of a run alone.

    On CUDA the peak is what the allocator measured. On a CPU it is the sum of what torch must hold at once: the base,
    the adapter with gradient and moments, and everything saved for the backward pass.
    """

    step_seconds: float
    step_tokens: int
    peak_memory_bytes: int
    state_bytes: int
    activation_bytes: int


def key_of(base: BaseModel, job: Job, pack_options: dict[str, Any]) -> str:
    """Identity of a calibration: everything that time and memory of a step depend on."""
    model = next(base.model.parameters())
    device = torch.cuda.get_device_name(model.device) if model.is_cuda else f"cpu x {torch.get_num_threads()}"
    lengths = sorted(len(example.input_ids) for example in job.examples)
    described = [
        dataclasses.asdict(base.spec), str(model.dtype), device, torch.__version__, job.adapter.shape(),
        pack_options, lengths[len(lengths) // 2], lengths[-1],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def measure(base: BaseModel, job: Job, pack_options: dict[str, Any], cache: Path) -> Solo:
    """Solo cost of a run, from the cache folder or by training a throw-away copy of it for a few steps."""
    path = cache / f"{key_of(base, job, pack_options)}.json"
    try:
        return Solo(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    steps = max(job.steps, MOST_WARM + TIMED_STEPS)  # a run may be shorter than what is measured
    found = _measure(base, dataclasses.replace(job, done=0, tokens=0, state=None, steps=steps), pack_options)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
        write_atomically(path, json.dumps(dataclasses.asdict(found)))
    return found


def _measure(base: BaseModel, job: Job, pack_options: dict[str, Any]) -> Solo:
    with open_pack(base, [job.adapter], **pack_options) as pack:
        pack.add(job)
        weights = held_bytes(pack.model)
        state = pack.bank.state_bytes
        activations = _activations(pack, job)
        fixed = dataclasses.replace(job, order=_Typical(job))
        pack.jobs[0] = fixed
        pack.warm_up(MOST_WARM if pack.captured else 1)
        _wait(pack)
        began = time.perf_counter()
        for _ in range(TIMED_STEPS):
            pack.step()
        _wait(pack)
        seconds = (time.perf_counter() - began) / TIMED_STEPS
        results = list(pack.drain())
    return Solo(seconds, results[-1].tokens, weights + state + activations, state, activations)


class _Typical(DataOrder):
    """Data order that repeats the run's step of median length."""

    def __init__(self, job: Job) -> None:
        order = job.order
        super().__init__(order.lengths, order.batch_size, order.seed, accumulation=order.accumulation)
        passes = range(order.accumulation)
        steps = [[order.batch(step * order.accumulation + micro) for micro in passes] for step in range(16)]
        padded = [sum(max(len(job.examples[i].input_ids) for i in batch) for batch in step) for step in steps]
        self.chosen = steps[sorted(range(len(steps)), key=lambda i: padded[i])[len(steps) // 2]]

    def batch(self, index: int) -> list[int]:
        return self.chosen[index % self.accumulation]


def _activations(pack: Pack, job: Job) -> int:
    """Bytes that one forward and backward pass of the run's longest batch needs beyond weights and adapter state."""
    longest = sorted(job.examples, key=lambda e: len(e.input_ids))[-pack.batch_size :]
    longest = (longest * pack.batch_size)[: pack.batch_size]
    pack.use_lanes([0])
    batch = collate([longest], [supervised(longest)], fixed=pack.captured is not None).to(pack.device)
    if pack.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pack.forward_backward(batch)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = _saved_bytes(pack, batch)
    pack.bank.grads.zero_()
    return peak


def _saved_bytes(pack: Pack, batch: Any) -> int:
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in pack.model.parameters()}
    own |= {store.untyped_storage().data_ptr() for store in (pack.bank.params, pack.bank.grads)}

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
