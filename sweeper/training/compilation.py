"""Compiling a model's layers in place, and when that pays."""

import contextlib
import os
from typing import Any

import torch

from sweeper.cache import cache_folder

# one H200 (docs/performance.md): what compiling costs, and what it spares each forward and backward pass
SECONDS, SECONDS_WHERE_LENGTHS_VARY = 13.0, 28.0
SPARED_BY_LAYER, SPARED_BY_VALUE = 1.3e-4, 1.5e-10  # seconds: of a layer's launches, of a layer's token and channel


def pays(passes: float, *, layers: int, width: int, tokens: float, lengths_vary: bool) -> bool:
    """Whether compiled layers of some width spare more than compiling takes, in passes over so many tokens each."""
    spared = passes * layers * (SPARED_BY_LAYER + SPARED_BY_VALUE * tokens * width)
    return spared > (SECONDS_WHERE_LENGTHS_VARY if lengths_vary else SECONDS)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Runs compiled layers uncompiled inside the `with` block."""
    return torch.compiler.set_stance("force_eager") if torch.cuda.is_available() else contextlib.nullcontext()


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of the model: the longest ModuleList."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def compile_layers(model: torch.nn.Module, *, dynamic: bool | None) -> None:
    """All layers share their compilations; `dynamic` True makes one for all lengths."""
    # what torch keeps is pickled, and by default lies in a folder of /tmp that anybody may make first
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in decoder_layers(model):
        layer.compile(dynamic=dynamic)


def uncompile_layers(model: torch.nn.Module) -> None:
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
