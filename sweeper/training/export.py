"""A slot's adapter as a PEFT folder, so that it loads with `PeftModel.from_pretrained`."""

import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sweeper import methods
from sweeper.lora.blocks import Block, rows_of
from sweeper.lora.forms import FORMS, AdapterSpec
from sweeper.lora.forms.peft import state_dict
from sweeper.lora.trainee import twin
from sweeper.methods.sharing import active
from sweeper.methods.weights import load_weights
from sweeper.models import BaseModel
from sweeper.models.files import base_reference, quiet
from sweeper.placement.placement import Target
from sweeper.record import (
    ADAPTER,
    COMBINED,
    EXPERTS,
    ROUTER,
    ROUTERS,
    TASKS,
    WEIGHTS,
    replacing_folder,
    write_atomically,
    write_json,
)
from sweeper.run import Run
from sweeper.spec import RunSpec, alone, to_mapping
from sweeper.training.run_state import ExportProof

README = """# Experts of run {run}, and what opens them

Each folder has an ordinary PEFT adapter; `{routers}` has the routers of its modules, `{router}` how they open.

```python
from sweeper.adapters.routed import routed_model

model = routed_model(base_model, "{run}")  # this run's folder
logits = model(input_ids, prompt_lengths)  # what was scored
```
"""


def get_ready() -> None:
    """Imports what writing an adapter needs. That takes seconds, which pass while a GPU is being made ready."""
    importlib.import_module("peft")


def write_adapter(
    folder: Path, spec: RunSpec, targets: Sequence[Target], weights: Mapping[str, tuple[Tensor, ...]], *,
    as_parameters: bool = False,
) -> int:  # fmt: skip
    """Writes `folder/adapter/` and returns the bytes of its weights.

    Args:
        targets: the adapted modules. weights: module name -> the parts that the form of the adapter has.
        as_parameters: name the weights rather than their modules, for models whose modules PEFT takes for others.
    """
    spec = alone(spec)  # blocks lie side by side in it
    made = methods.adapter(spec, dict.fromkeys(targets, spec.rank))
    assert isinstance(made, AdapterSpec)
    form, ranks = FORMS[made.form], {target: len(weights[target.name][0]) for target in targets}
    loaded: dict[str, Any] = {**base_reference(spec.model), "inference_mode": True}
    if as_parameters:
        assert form.weight_config is not None
        loaded |= form.weight_config(targets)
    tensors, config = state_dict(made, targets, weights), form.config(spec, made, ranks, **loaded)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    with replacing_folder(folder / ADAPTER) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(plain, indent=1) + "\n")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tasks(
    run: Run, spec: RunSpec, targets: Sequence[Target], weights: Mapping[str, tuple[Tensor, ...]],
    blocks: Sequence[Block], proved: ExportProof,
) -> int:  # fmt: skip
    """Writes `tasks/TASK/adapter/` for each task: an ordinary adapter of the blocks that act on it, side by side.

    Returns the bytes of the weights. `adapters.py` and `evaluate.py` take `tasks/TASK` as they take a run's folder.
    """
    size = 0
    with replacing_folder(run.folder / TASKS) as folder:
        for task, part in enumerate(spec.dataset.parts):
            ranks = active({target: len(weights[target.name][0]) for target in targets}, blocks, task)
            own = {target.name: _of_task(weights[target.name], blocks, target.name, task) for target in ranks}
            plain, place = alone(spec, task), folder / part.name
            size += write_adapter(place, plain, list(ranks), own, as_parameters=proved.as_parameters)
            note = {
                "spec": to_mapping(plain), "ranks": {target.name: rank for target, rank in ranks.items()},
                "method": spec.sharing.name, "from": [run.run_id],
            }  # fmt: skip
            write_json(place / COMBINED, note)
    return size


def _of_task(
    weights: tuple[Tensor, ...], blocks: Sequence[Block], module: str, task: int
) -> tuple[Tensor, ...]:  # fmt: skip
    """A and B of the blocks that act on a task."""
    rows = [own for block, own in zip(blocks, rows_of(blocks, module), strict=True) if task in block.acts]
    return tuple(torch.cat([value[own] for own in rows]) for value in weights)


def write_experts(
    run: Run, spec: RunSpec, adapter: AdapterSpec, targets: Sequence[Target], weights: Mapping[str, tuple[Tensor, ...]],
    proved: ExportProof,
) -> int:  # fmt: skip
    """Writes `experts/NUMBER/adapter/` for each expert, an ordinary adapter, and beside them what opens them.

    Returns the bytes of the weights. `sweeper.adapters.routed` puts them together again.
    """
    size, plain = 0, alone(spec)
    with replacing_folder(run.folder / EXPERTS) as folder:
        for expert in range(adapter.experts):
            own = {target.name: _expert(weights[target.name], expert, adapter.experts) for target in targets}
            size += write_adapter(folder / str(expert), plain, targets, own, as_parameters=proved.as_parameters)
        routers = {target.name: weights[target.name][2].contiguous() for target in targets}
        save_file(routers, folder / ROUTERS)
        size += sum(tensor.numel() * tensor.element_size() for tensor in routers.values())
        write_json(folder / ROUTER, {**adapter.options, "scales": dict(adapter.scales)})
        write_atomically(folder / "README.md", README.format(run=run.run_id, routers=ROUTERS, router=ROUTER))
    return size


def _expert(weights: tuple[Tensor, ...], expert: int, experts: int) -> tuple[Tensor, ...]:
    """A and B of one expert."""
    size = len(weights[0]) // experts
    return tuple(value[expert * size : (expert + 1) * size] for value in weights[:2])


def as_stock(base: BaseModel, run: Path) -> Any:
    """What a run left, as others load it: stock PEFT around a twin of the base, or a twin with the run's own weights.

    The base may have no pack on it.
    """
    from peft import PeftModel

    model = twin(base.model)
    if (run / WEIGHTS).is_dir():
        load_weights(model, run / WEIGHTS)
        return model.eval()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, about names of transformers
        return PeftModel.from_pretrained(model, str(run / ADAPTER), torch_device=str(base.model.device)).eval()
