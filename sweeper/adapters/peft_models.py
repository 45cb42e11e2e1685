"""A base model with saved adapters on it, by PEFT."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import weights
from sweeper.errors import DataError

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel
    from sweeper.spec import Precision, RunSpec

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
    from peft import PeftModel

    device = str(base.model.device)
    model: Any = None
    for name, folder in folders.items():
        try:
            with hushed():
                if model is None:
                    model = PeftModel.from_pretrained(base.model, str(folder), adapter_name=name, torch_device=device)
                else:
                    model.load_adapter(str(folder), adapter_name=name, torch_device=device)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if model is not None:
                remove(model)
            raise DataError(f"{folder}: PEFT cannot load it: {weights.first_line(error)}") from error
    return model.eval()


def remove(model: Any) -> None:
    """Gives the base model back as it was, where the adapters had changed its modules."""
    if hasattr(model.base_model, "unload"):
        with hushed():
            model.unload()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without PEFT's warnings, which are about names in transformers, and about ties that `untie` has dealt with."""
    with weights.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def logits(model: Any, ids: "torch.Tensor") -> "torch.Tensor":
    """Float32 logits on the CPU."""
    import torch

    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    return found
