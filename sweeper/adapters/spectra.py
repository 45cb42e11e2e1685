"""Spectra of what training changed: the update dW of every module, by itself and against the base's weight W.

Every run's update is first reduced to its singular values and a few vectors; then each weight of the base is decomposed
once and compared with all runs. An adapter's form says what its update is, and low-rank ones are never made whole (QR
of B and A); adapters of no form go through PEFT's own merge, and a trained weight is compared with the base's. What is
found goes to `RUN_FOLDER/spectra.json`; records stay as they are.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import record
from sweeper.adapters import peft_models
from sweeper.errors import DataError, SpecError, gist
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel
    from sweeper.placement.placement import Target
    from sweeper.placement.spectrum import Singular

FILE, SCHEMA = record.SPECTRA, 1
TOGETHER = 16  # runs whose reduced updates are held at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What counts as an intruder: among the `top` singular vectors of a tuned weight, one whose cosine to every vector
    of the base stays below `epsilon`. `base` false leaves out what needs the base's own spectrum.
    """

    top: int = 10
    epsilon: float = 0.5
    base: bool = True

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SpecError(f"--top must be at least 1, got {self.top}")
        if not 0 < self.epsilon <= 1:
            raise SpecError(f"--epsilon is a cosine: above 0 and at most 1, got {self.epsilon:g}")


@dataclass(kw_only=True)
class ModuleSpectrum:
    """The update of one module.

    Attributes:
        update_norm: its Frobenius norm; relative_norm: over that of W. energy_share: of the run's squared norm.
        rank: of singular values above rounding. effective_rank, stable_rank: `sweeper.placement.spectrum` defines them.
        singular_values: the largest, at most `Look.top`.
        amplification: how much larger it is than W in its own directions (null: W has nothing there).
        overlap_left, overlap_right: share of its top directions that lie in as many top ones of W.
        intruder_dimensions: among the top `examined` singular vectors of W + dW.
    """

    name: str
    role: str
    layer: int | None
    rank: int
    update_norm: float
    relative_norm: float
    effective_rank: float
    stable_rank: float
    singular_values: list[float]
    energy_share: float = 0.0
    amplification: float | None = None
    overlap_left: float | None = None
    overlap_right: float | None = None
    intruder_dimensions: int | None = None
    examined: int | None = None


@dataclass(kw_only=True)
class _Reduced:
    """A module's numbers so far, and the vectors that wait for the base's."""

    module: ModuleSpectrum
    left: "torch.Tensor"
    right: "torch.Tensor"
    tuned: "torch.Tensor"


def spectra(runs: Sequence[Saved], look: Look, *, device: str = "auto") -> Iterator[tuple[Saved, list[ModuleSpectrum]]]:
    """Takes every run's update apart, writes `spectra.json` to its folder and yields what it wrote.

    A run that changed no matrix of the model, but biases or a prompt, has no spectrum and leaves no file.

    Raises:
        SweeperError: a base model or an adapter cannot be loaded.
    """

    def key(run: Saved) -> str:
        return repr(run.spec.model)

    for _, group in itertools.groupby(sorted(runs, key=key), key=key):
        same = list(group)
        base = peft_models.load_base(same[0].spec, device, "float32")
        for start in range(0, len(same), TOGETHER):
            part = same[start : start + TOGETHER]
            found = [look_at(base, run, look) for run in part]
            if look.base:
                _against_base(base, found, look)
            for run, reduced in zip(part, found, strict=True):
                modules = [one.module for one in reduced.values()]
                _share_energy(modules)
                if modules:
                    write(run, modules, look)
                yield run, modules


def write(run: Saved, modules: Sequence[ModuleSpectrum], look: Look) -> Path:
    """Writes a run's `spectra.json`."""
    plain = {"schema": SCHEMA, "run_id": run.folder.name, **asdict(look), "modules": [asdict(one) for one in modules]}
    return record.write_atomically(run.folder / FILE, json.dumps(plain, indent=1, allow_nan=False) + "\n")


def look_at(base: "BaseModel", run: Saved, look: Look) -> dict[str, _Reduced]:
    """Module name and numbers of every matrix that a run changed."""
    from sweeper.lora.forms.peft import form_of

    tuned = peft_models.own_weights(run.folder)
    if tuned is not None:
        return _of_weights(base, tuned, look)
    known = form_of(rescore.read_config(run.folder)) is not None
    return _of_form(base, run, look) if known else _of_peft(base, run, look)


def _of_form(base: "BaseModel", run: Saved, look: Look) -> dict[str, _Reduced]:
    from sweeper.placement import spectrum

    adapter, found = rescore.read_adapter(run.folder).to(base.model.device), {}
    for target in base.targets:
        if not adapter.has(target):
            continue
        module, factors = base.model.get_submodule(target.name), adapter.factors(target)
        if factors is not None:
            update = spectrum.decompose_product(*factors)
        else:
            update = spectrum.decompose(adapter.update(target, spectrum.weight_of(module)))
        found[target.name] = _reduced(module, target, update, look)
    return found


def _of_peft(base: "BaseModel", run: Saved, look: Look) -> dict[str, _Reduced]:
    model = peft_models.adapted(base, {"default": run.adapter})
    try:
        targets = {target.name: target for target in base.targets}
        found = {}
        for name, layer in model.get_base_model().named_modules():
            if name in targets and _is_tuned(layer):  # norms that were trained are no matrices
                found[name] = _reduced(layer.get_base_layer(), targets[name], _of_layer(layer), look)
        return found
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"spectra: {run.folder}: PEFT cannot merge it: {gist(error)}") from error
    finally:
        peft_models.remove(model)


def _of_weights(base: "BaseModel", tuned: "Mapping[str, torch.Tensor]", look: Look) -> dict[str, _Reduced]:
    from sweeper.placement import spectrum

    found = {}
    for target in base.targets:
        new = tuned.get(f"{target.name}.weight")
        if new is not None and target.kind != "experts":
            module = base.model.get_submodule(target.name)
            weight = spectrum.weight_of(module)
            update = spectrum.decompose(spectrum.as_matrix(module, new.to(weight.device).float()) - weight)
            found[target.name] = _reduced(module, target, update, look)
    return found


def _is_tuned(layer: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge") and hasattr(layer.get_base_layer(), "weight")


def _of_layer(layer: Any) -> "Singular":
    import torch

    from sweeper.placement import spectrum

    with torch.no_grad():
        module = layer.get_base_layer()
        before, kept = spectrum.weight_of(module).clone(), module.weight.detach().clone()
        with peft_models.hushed():
            layer.merge(adapter_names=["default"])
            after = spectrum.weight_of(module).clone()
            layer.unmerge()
        module.weight.data.copy_(kept)  # unmerging leaves rounding behind
        return spectrum.decompose(after - before)


def _reduced(module: Any, target: "Target", update: "Singular", look: Look) -> _Reduced:
    """A module's numbers, and the vectors that are compared with the base's."""
    from sweeper.placement import spectrum

    weight = spectrum.weight_of(module)
    size, top = spectrum.frobenius(update.values), update.top(look.top)
    numbers = ModuleSpectrum(
        name=target.name, role=target.role, layer=target.layer, rank=len(update.values), update_norm=size,
        relative_norm=size / max(float(weight.double().norm()), 1e-30),
        effective_rank=spectrum.effective_rank(update.values), stable_rank=spectrum.stable_rank(update.values),
        singular_values=top.values.tolist(),
    )  # fmt: skip
    factor = spectrum.amplification(update, weight)
    numbers.amplification = factor if math.isfinite(factor) else None
    tuned = weight[:, :0]
    if look.base:
        tuned = spectrum.decompose(weight + (update.left * update.values) @ update.right.t()).left[:, : look.top]
    return _Reduced(module=numbers, left=top.left, right=top.right, tuned=tuned)


def _against_base(base: "BaseModel", runs: Sequence[Mapping[str, _Reduced]], look: Look) -> None:
    """Fills in what needs the base's own singular vectors; each weight is decomposed once for all runs."""
    from sweeper.placement import spectrum

    for name in dict.fromkeys(name for run in runs for name in run):
        own = spectrum.decompose(spectrum.weight_of(base.model.get_submodule(name)))
        for one in (run[name] for run in runs if name in run):
            count = one.left.shape[1]
            one.module.overlap_left = spectrum.overlap(one.left, own.left[:, :count])
            one.module.overlap_right = spectrum.overlap(one.right, own.right[:, :count])
            one.module.intruder_dimensions = spectrum.intruders(one.tuned, own.left, epsilon=look.epsilon)
            one.module.examined = one.tuned.shape[1]


def _share_energy(modules: Sequence[ModuleSpectrum]) -> None:
    total = sum(one.update_norm**2 for one in modules)
    for one in modules:
        one.energy_share = one.update_norm**2 / total if total > 0 else 0.0
