"""A base model with what runs left: adapters, by PEFT, or weights that were trained themselves."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper.errors import DataError, gist
from sweeper.models.files import quiet
from sweeper.record import WEIGHTS
from sweeper.rescoring import rescore

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel
    from sweeper.spec import Precision, RunSpec

MOST_RANK = 1 << 16
"""Of an adapter whose weights are no safetensors, and so are not looked at before PEFT makes room for them."""

LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of a merged model's logits, relative to the largest: the rounding of the merged weights."""


def load_base(spec: "RunSpec", device: str, precision: "Precision") -> "BaseModel":
    """The base model of a run; `precision` as `trainer.precision`.

    Raises:
        SweeperError: it cannot be loaded here.
    """
    from sweeper import models
    from sweeper.device import device_for, precision_for

    where = device_for(device)
    return models.load(spec.model, dtype=precision_for(where, precision), device=where)


def adapted(base: "BaseModel", folders: Mapping[str, Path]) -> Any:
    """A `PeftModel` with the adapters of some folders, by name; the first is the active one.

    Raises:
        DataError: PEFT cannot read one of them, or cannot put them on this model.
    """
    with hushed():
        from peft import PeftModel

    device = str(base.model.device)
    model: Any = None
    for name, folder in folders.items():
        try:
            _check(folder)
            with hushed():
                if model is None:
                    model = PeftModel.from_pretrained(base.model, str(folder), adapter_name=name, torch_device=device)
                else:
                    model.load_adapter(str(folder), adapter_name=name, torch_device=device)
        except DataError:
            raise
        except Exception as error:  # PEFT runs into whatever a configuration of somebody else's makes of its fields
            if model is not None:
                remove(model)
            _unwrap(base.model)  # PEFT may have failed halfway through the modules
            for file in sorted(folder.glob("*.safetensors")):
                rescore.read_tensors(file)  # names the file, where it is that which is damaged
            raise DataError(f"{folder}: PEFT cannot load it: {gist(error)}") from error
    return model.eval()


def _unwrap(module: Any) -> None:
    """Puts back the modules that PEFT has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, child in list(module.named_children()):
        inner = child
        while isinstance(inner, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner.original_module
        if inner is not child:
            setattr(module, name, inner)
        _unwrap(inner)


def _check(folder: Path) -> None:
    """Refuses a configuration that would have PEFT import modules by name or take memory that no weight needs.

    Raises:
        DataError: it does, or the weights cannot be read.
    """
    config, file = rescore.read_config(folder.parent, adapter=folder.name), folder / "adapter_model.safetensors"
    if config.get("megatron_config"):
        raise DataError(
            f"{folder}: megatron_config would have PEFT import {config.get('megatron_core')!r}: take it out"
        )
    if str(config.get("peft_type")).upper() != "LORA":
        return
    asked = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(asked.values() if isinstance(asked, Mapping) else ())]
    shapes = rescore.read_shapes(file).values() if file.is_file() else [(MOST_RANK,)]
    highest = max((size for shape in shapes for size in shape), default=0)
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= highest:
            raise DataError(f"{folder}: rank {rank!r} does not fit its weights, whose longest side is {highest}")


def own_weights(folder: Path) -> "dict[str, torch.Tensor] | None":
    """Parameter name -> trained value, of a run that trained the model itself; None where it has an adapter."""
    file = folder / WEIGHTS / "model.safetensors"
    return rescore.read_tensors(file) if file.is_file() else None


def with_weights(base: "BaseModel", tuned: "Mapping[str, torch.Tensor]") -> Any:
    """The base model with some of its parameters replaced, in place.

    Raises:
        DataError: it has no such parameter, as of biases that training added.
    """
    import torch

    own = dict(base.model.named_parameters())
    missing = sorted(set(tuned) - set(own))
    if missing:
        raise DataError(f"{base.spec.name} has no {missing[0]}: training added it, and a plain model cannot hold it")
    with torch.no_grad():
        for name, value in tuned.items():
            own[name].copy_(value)
    return base.model


def remove(model: Any) -> None:
    """Gives the base model back as it was, where the adapters had changed its modules."""
    if hasattr(model.base_model, "unload"):
        with hushed():
            model.unload()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without PEFT's warnings, which are about names in transformers, and about ties that `untie` has dealt with."""
    noisy = logging.getLogger("bitsandbytes")  # on a CPU it asks for kernels that nothing here needs
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)


def untie(base: "BaseModel", changed: "set[str]") -> None:
    """Gives the head a weight of its own where it shares the embedding's and an adapter changes one of them."""
    import torch

    head: Any = base.model.get_output_embeddings()
    embedding: Any = base.model.get_input_embeddings()
    names = {name for name, module in base.model.named_modules() if module is head or module is embedding}
    if head is None or head.weight is not embedding.weight or not names & changed:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.model.config.tie_word_embeddings = False


def logits(model: Any, rows: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
    """Float32 logits [T, V] of each row of token ids [T], which the model is given alone; on the CPU."""
    import torch

    with torch.no_grad():
        return [model(input_ids=row[None], use_cache=False).logits[0, -len(row) :].float().cpu() for row in rows]
