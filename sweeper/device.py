"""What a run computes on, and in which precision."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from sweeper import record
from sweeper.errors import SpecError
from sweeper.spec import Precision

if TYPE_CHECKING:
    import torch

# bfloat16 is taken on a CPU only where it is clearly faster, so that a rerun does not flip on noise
CPU_BFLOAT16_GAIN = 1.5
PRECISION = "precision.json"  # in a study: what auto became


def device_for(text: str, *, asked: str = "trainer.device=") -> "torch.device":
    """The device that `trainer.device` names: auto takes the first CUDA device, else the CPU.

    `asked` is how it was given, for the message.

    Raises:
        SpecError: there is no such device here.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = {"auto": "cuda:0" if count else "cpu", "cpu": "cpu"}
    if count:
        devices["cuda"] = "cuda:0"
    devices.update({f"cuda:{index}": f"cuda:{index}" for index in range(count)})
    if text not in devices:
        why = "" if count or not text.startswith("cuda") else " (torch finds no CUDA GPU)"
        raise SpecError(f"{asked}{text}: no such device here{why}. Choose from {', '.join(devices)}.")
    return torch.device(devices[text])


def precision_for(device: "torch.device", wanted: Precision, *, study: Path | None = None) -> "torch.dtype":
    """The dtype of the base model: auto is bfloat16 on CUDA and on CPUs that multiply it clearly faster than float32.

    Args:
        study: the folder of a study whose first run says what auto is.

    Raises:
        SpecError: bfloat16 on a CUDA GPU that has none.
    """
    import torch

    fixed = study_precision(study) if study is not None and wanted == "auto" else None
    wanted = fixed or wanted
    if wanted == "float32":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        if fixed:
            raise SpecError(
                f"trainer.precision=auto: {study} began in bfloat16, which this GPU lacks. Go on where it began, or "
                "choose another study=..."
            )
        if wanted == "bfloat16":
            raise SpecError("trainer.precision=bfloat16: this GPU has no bfloat16. Choose from auto, float32.")
        return torch.float32
    if device.type == "cuda" or wanted == "bfloat16" or cpu_gain() > CPU_BFLOAT16_GAIN:
        return torch.bfloat16
    return torch.float32


def precision_name(dtype: "torch.dtype") -> Precision:
    """A dtype as `trainer.precision` has it."""
    return _precision(str(dtype).removeprefix("torch."))


def study_precision(study: Path) -> Precision | None:
    """What `trainer.precision=auto` is in a study, as its first run had it; None where none has begun.

    A study of an earlier version has no file that says so: then its first record does, or a checkpoint.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _precision(json.loads((study / PRECISION).read_text())["auto"])
    found: list[tuple[str, Precision]] = []
    for path in study.glob(f"*/{record.RECORD}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            plain = json.loads(path.read_text())
            if plain["spec"]["trainer"]["precision"] == "auto" and (plain["environment"].get("precision")):
                found.append((str(plain["started"]), _precision(plain["environment"]["precision"])))
    for path in study.glob(f"*/{record.CHECKPOINT}"):
        progress: Any = record.checkpoint_progress(path.parent) or {}
        if progress.get("auto") and progress.get("precision"):
            found.append((str(progress.get("started")), _precision(progress["precision"])))
    return min(found)[1] if found else None


def fix_precision(study: Path, chosen: Precision) -> Precision:
    """Fixes what auto is in a study, unless it is fixed, and returns what it is; of several drivers, one is first."""
    record.write_first(study / PRECISION, {"auto": study_precision(study) or chosen})
    return study_precision(study) or chosen


def _precision(text: Any) -> Precision:
    if text not in get_args(Precision) or text == "auto":
        raise ValueError(text)
    found: Precision = text
    return found


@functools.cache
def cpu_gain() -> float:
    """Time of a float32 matrix product over that of a bfloat16 one on this CPU.

    Measured once for a processor and a torch version and kept in the cache folder: a busy machine must not turn a
    study that began in one precision to the other.
    """
    import torch

    from sweeper.cache import cache_folder
    from sweeper.record import write_atomically

    key = hashlib.sha256(f"{processor()} {torch.__version__}".encode()).hexdigest()[:12]
    path = cache_folder() / f"bfloat16-gain-{key}.txt"
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        gain = _measured_gain()
    with contextlib.suppress(OSError):  # without a cache it is measured at each start
        write_atomically(path, f"{gain:.2f}\n")
    return gain


def _measured_gain(budget_seconds: float = 0.2) -> float:
    """Best of several products, taken in turns."""
    import torch

    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(size, generator=generator) for size in ((128, 576), (576, 1536))]
    pairs = {dtype: [matrix.to(dtype) for matrix in pair] for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    deadline = time.perf_counter() + budget_seconds
    for turn in range(20):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            left @ right
            if turn:  # the first turn warms up
                best[dtype] = min(best[dtype], time.perf_counter() - start)
        if turn and time.perf_counter() > deadline:
            break
    return best[torch.float32] / best[torch.bfloat16]


@functools.cache
def processor() -> str:
    """Name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_bytes(device: "torch.device") -> int:
    """Memory that is free now: of the GPU, or of the machine."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Returns to the system what was freed in this process and the C library (glibc) keeps; elsewhere does nothing.

    Tensors of many sizes that come and go leave holes between those that stay, so that a long sweep on a CPU would
    come to hold some hundred megabytes more than it uses.
    """
    if (call := _malloc_trim()) is not None:
        call(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError):
        return cast(Callable[[int], int], ctypes.CDLL(None).malloc_trim)
    return None
