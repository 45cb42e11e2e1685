"""What a run computes on and in which precision: as asked for, or what suits the machine, the same at every start."""

import time

import pytest
import torch

from sweeper import device
from sweeper.device import CPU_BFLOAT16_GAIN, cpu_gain
from sweeper.errors import SpecError

CPU = torch.device("cpu")


def test_devices() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert device.device_for("cpu") == CPU
    assert device.device_for("auto").type == ("cuda" if count else "cpu")
    for text in ("gpu", f"cuda:{count}", "cuda:-1", "mps"):
        with pytest.raises(SpecError, match=rf"trainer\.device={text}: no such device.*Choose from auto, cpu"):
            device.device_for(text)
    if not count:
        with pytest.raises(SpecError, match="finds no CUDA GPU"):
            device.device_for("cuda")


def test_precision() -> None:
    assert device.precision_for(CPU, "float32") == torch.float32
    assert device.precision_for(CPU, "bfloat16") == torch.bfloat16
    cpu_gain.cache_clear()
    start = time.perf_counter()
    auto = device.precision_for(CPU, "auto")
    assert time.perf_counter() - start < 1
    assert auto == (torch.bfloat16 if cpu_gain() > CPU_BFLOAT16_GAIN else torch.float32)
    assert device.precision_for(CPU, "auto") == auto
