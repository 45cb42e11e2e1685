"""Spectra of the rank blocks of runs whose tasks have blocks of their own: which block spends how much rank where.

A block's update of a module is s B_k A_k, its own ranks of what each of its tasks' adapters has. What is found goes to
`RUN_FOLDER/spectra.json`, beside those of the tasks' adapters in their folders.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import record
from sweeper.adapters.spectra import FILE, SCHEMA, Look
from sweeper.errors import DataError
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved

if TYPE_CHECKING:
    import torch

    from sweeper.models.architecture import Target


@dataclass(kw_only=True)
class BlockSpectrum:
    """The update of one module by one block.

    Attributes:
        block, level: its name and its depth in the tree of tasks. tasks: those whose rows run through it.
        rank: that it was given. update_norm: Frobenius norm of s B_k A_k. energy_share: of the squared norms of all
            blocks and modules of the run. effective_rank, stable_rank: `sweeper.placement.spectrum` defines them.
        singular_values: the largest, at most `Look.top`.
    """

    block: str
    level: int
    tasks: list[str]
    name: str
    role: str
    layer: int | None
    rank: int
    update_norm: float
    effective_rank: float
    stable_rank: float
    singular_values: list[float]
    energy_share: float = 0.0


def spectra(runs: Sequence[Saved], look: Look) -> Iterator[tuple[Path, list[BlockSpectrum]]]:
    """Takes the blocks of every run apart of which some tasks' adapters are given, writes and yields what it found.

    Raises:
        SweeperError: a record or an adapter cannot be read.
    """
    from sweeper import models

    of_tasks = {run.folder.parent.parent: run for run in runs if run.folder.parent.name == record.TASKS}
    for folder, run in of_tasks.items():
        found = look_at(folder, models.skeleton(run.spec.model), look)
        plain = {"schema": SCHEMA, "run_id": folder.name, **asdict(look), "modules": []}
        plain["blocks"] = [asdict(one) for one in found]
        record.write_atomically(folder / FILE, json.dumps(plain, indent=1, allow_nan=False) + "\n")
        yield folder, found


def look_at(folder: Path, targets: "Sequence[Target]", look: Look) -> list[BlockSpectrum]:
    """The spectra of a run's blocks, block by block and module by module.

    Args:
        folder: of the run. targets: the modules of its model.
    """
    try:
        blocks: list[Mapping[str, Any]] = list(record.read_record(folder).sharing["blocks"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no record that says which blocks its tasks' adapters are made of") from error
    adapters = {
        task: rescore.read_adapter(folder / record.TASKS / task)
        for task in dict.fromkeys(block["acts"][0] for block in blocks)
    }
    by_name, found = {target.name: target for target in targets}, []
    for number, block in enumerate(blocks):
        task = block["acts"][0]
        for name, rank in block["ranks"].items():
            factors = adapters[task].factors(by_name[name])
            assert factors is not None  # of blocks the form is LoRA
            first = sum(one["ranks"].get(name, 0) for one in blocks[:number] if task in one["acts"])
            b, a = factors[0][:, first : first + rank], factors[1][first : first + rank]
            found.append(_of_block(block, by_name[name], (b, a), look))
    total = sum(one.update_norm**2 for one in found)
    for one in found:
        one.energy_share = one.update_norm**2 / total if total > 0 else 0.0
    return found


def _of_block(
    block: Mapping[str, Any], target: "Target", factors: "tuple[torch.Tensor, torch.Tensor]", look: Look
) -> BlockSpectrum:
    from sweeper.placement import spectrum

    values = spectrum.decompose_product(*factors).values
    return BlockSpectrum(
        block=block["name"], level=block["level"], tasks=list(block["acts"]), name=target.name, role=target.role,
        layer=target.layer, rank=len(factors[1]), update_norm=spectrum.frobenius(values),
        effective_rank=spectrum.effective_rank(values), stable_rank=spectrum.stable_rank(values),
        singular_values=values[: look.top].tolist(),
    )  # fmt: skip
