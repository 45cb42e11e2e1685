"""QLoRA (Dettmers et al. 2023): LoRA on a base whose blocks are quantised to 4-bit NormalFloat.

The linear modules of the blocks are quantised from the weights as they were loaded, in blocks of 64 whose constants are
quantised once more (double quantisation); embedding, head and norms stay as they are. The quantised model is a base
model of its own: what it scores before training is its own loss.
"""

import importlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sweeper.errors import SpecError
from sweeper.tasks.package import is_installed

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel
    from sweeper.spec import RunSpec


# a note that optional kernels are missing, printed whenever anything imports the library on some CPUs
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check(spec: "RunSpec") -> None:
    """Raises SpecError where the package that quantises is not installed."""
    if not is_installed("bitsandbytes"):
        raise SpecError("method=qlora needs the Python package bitsandbytes: make qlora, or pip install bitsandbytes")


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
        try:
            setattr(model.get_submodule(parent), leaf, _four_bit(bnb, module, target.kind == "conv1d", device))
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise SpecError(
                f"method=qlora: bitsandbytes {bnb.__version__} cannot quantise {target.name} on {device}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    model.is_loaded_in_4bit = True  # where PEFT looks
    return replace(base, model=model)


def _four_bit(bnb: Any, module: Any, transposed: bool, device: "torch.device") -> Any:
    weight = module.weight.data.t().contiguous() if transposed else module.weight.data
    fan_out, fan_in = weight.shape
    made = bnb.nn.Linear4bit(
        fan_in, fan_out, bias=False, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    made.bias = module.bias
    made.support_avx512bf16_for_cpu = False  # it would pack the weights anew in the middle of an evaluation
    return made.to(device).requires_grad_(False)
