"""QLoRA (Dettmers et al. 2023): LoRA on a base whose blocks are quantised to 4-bit NormalFloat.

The linear modules of the blocks are quantised from the weights as they were loaded, in blocks of 64 whose constants are
quantised once more (double quantisation); embedding, head and norms stay as they are. The quantised model is a base
model of its own: what it scores before training is its own loss.
"""

import importlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sweeper import installation
from sweeper.errors import SpecError, first_line
from sweeper.tasks.package import is_installed

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel
    from sweeper.spec import RunSpec

BLOCK = 64  # values that share a constant
# relative error of a weight read back: 0.09 where it is normally distributed, 0.10 in SmolLM2, 0.24 and more if misread
WORST = 0.18
# a note that optional kernels are missing, printed whenever anything imports the library on some CPUs
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check(spec: "RunSpec") -> None:
    """Raises SpecError where the package that quantises is not installed."""
    if not is_installed("bitsandbytes"):
        raise SpecError(f"method=qlora needs the Python package bitsandbytes: {installation.install('qlora')}")


def quantised(base: "BaseModel", device: "torch.device") -> "BaseModel":
    """A base model whose blocks' linear modules are replaced, in place, by 4-bit ones.

    Raises:
        SpecError: bitsandbytes cannot quantise on this device.
    """
    bnb: Any = importlib.import_module("bitsandbytes")
    model: Any = base.model
    for target in base.targets:
        if target.layer is None or target.kind not in ("linear", "conv1d"):
            continue
        parent, _, leaf = target.name.rpartition(".")
        module = model.get_submodule(target.name)
        weight = module.weight.data.t().contiguous() if target.kind == "conv1d" else module.weight.data
        try:
            made = _four_bit(bnb, weight, module.bias, device)
            wrong = _error(bnb, made, weight) > WORST
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise SpecError(
                f"method=qlora: bitsandbytes {bnb.__version__} cannot quantise {target.name} on {device}: "
                f"{first_line(error)}"
            ) from error
        if wrong:
            raise SpecError(
                f"method=qlora: bitsandbytes {bnb.__version__} reads {target.name} ({target.in_features} -> "
                f"{target.out_features}) back wrongly on {device}; widths that are multiples of {BLOCK} work"
            )
        setattr(model.get_submodule(parent), leaf, made)
    model.is_loaded_in_4bit = True  # where PEFT looks
    return replace(base, model=model)


def _error(bnb: Any, made: Any, weight: "torch.Tensor") -> float:
    """Root mean square error of a quantised weight over that of its values."""
    back = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    return float((back.float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-12))


def _four_bit(bnb: Any, weight: "torch.Tensor", bias: Any, device: "torch.device") -> Any:
    fan_out, fan_in = weight.shape
    made = bnb.nn.Linear4bit(
        fan_in, fan_out, bias=False, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    made.bias = bias
    made.support_avx512bf16_for_cpu = False  # it would pack the weights anew in the middle of an evaluation
    return made.to(device).requires_grad_(False)
