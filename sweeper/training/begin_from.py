"""A run that begins with the adapter that another one left (`trainer.init_from`)."""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sweeper import predecessor
from sweeper.errors import SpecError, gist
from sweeper.lora.forms import AdapterSpec, peft
from sweeper.record import ADAPTER, read_json, read_text
from sweeper.training.run_state import RunState


def name_origin(state: RunState) -> None:
    """Notes what a run begins with: the predecessor's id, and the digest of its adapter as it is now.

    Raises:
        SpecError: it did not complete, or its adapter is not there.
    """
    study, given = state.run.folder.parent, state.spec.trainer.init_from
    assert given is not None
    found = predecessor.completed(given, study)
    digest = predecessor.digest(predecessor.folder(given, study))
    state.origin = {"run_id": found.run_id, "digest": digest}
    state.content = {**state.content, predecessor.CONTENT: digest}


def take_over(state: RunState) -> None:
    """Gives a run the values that it begins with; moments and schedule are fresh.

    Raises:
        SpecError: the adapter cannot be read, or is not of the run's modules, ranks and scales.
    """
    study, given = state.run.folder.parent, state.spec.trainer.init_from
    assert given is not None
    assert isinstance(state.adapter, AdapterSpec)
    start, place = f"trainer.init_from={given}", predecessor.folder(given, study) / ADAPTER
    try:
        config = read_json(read_text(place / "adapter_config.json"))
        tensors = load_file(place / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise SpecError(f"{start}: its adapter cannot be read ({gist(error)})") from None
    state.weights = _values(state, config, tensors, start)


def _values(
    state: RunState, config: Mapping[str, Any], tensors: Mapping[str, Tensor], start: str
) -> dict[str, tuple[Tensor, ...]]:
    adapter = state.adapter
    assert isinstance(adapter, AdapterSpec)
    saved = peft.loaded(config, tensors)
    if saved is None or saved.form.name != adapter.form:
        raise SpecError(f"{start}: it left a {peft.kind_of(config)}, and this run trains a {adapter.form}")
    found = {}
    for target in state.ranks:
        if not saved.has(target):
            raise SpecError(f"{start}: its adapter has nothing at {target.name}")
        parts = tuple(part.float().contiguous() for part in saved.parts(target))
        rank, scale = len(parts[0]), saved.form.scale(config, target.name, len(parts[0]))
        if rank != adapter.ranks[target.name] or abs(scale / adapter.scales[target.name] - 1) > 1e-6:
            raise SpecError(
                f"{start}: its adapter of {target.name} has rank {rank} and scale {scale:g}, this run's has "
                f"{adapter.ranks[target.name]} and {adapter.scales[target.name]:g}"
            )
        found[target.name] = parts
    return found
