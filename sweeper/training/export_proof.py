"""What runs leave is proved before they train: loaded as its user will load it, it must give the engine's logits.

A throw-away adapter of the run's method on the run's modules, with values that are nowhere zero, goes through the
engine, is written as a run's is, and comes back through stock PEFT around a twin of the base. That is done once for a
model, a method and a placement.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sweeper import lost, methods
from sweeper.errors import gist
from sweeper.lora.forms import FORMS, AdapterSpec
from sweeper.lora.slot_store import Learnt
from sweeper.methods.method import Ranks
from sweeper.models import BaseModel, proof
from sweeper.record import read_sealed, write_sealed
from sweeper.spec import RunSpec
from sweeper.tasks.example import Encoded
from sweeper.training.batches import collate, mean_weights
from sweeper.training.export import as_stock, write_adapter
from sweeper.training.pack import Pack, open_pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import ExportProof

VERSION = 2
"""Raise whenever a proof could end otherwise, so that none of before is read."""
EFFECT = 0.5  # nats that the throw-away adapter must change some log-probability by
LIMITS = {torch.float32: 2e-3, torch.bfloat16: 0.2}
"""Share of that effect by which the two may differ."""
ABOVE_ROUNDING = 10.0
"""Times the bare base's own difference between engine and stock that the effect is to be, so that the share is no
question of rounding: in bfloat16 on a CPU it is 0.6 nats of a 135M model."""


def key_of(spec: RunSpec) -> str:
    """Runs of one base model with equal keys leave the same kind of thing on the same modules."""
    method = dataclasses.replace(spec.method, dropout=0.0)
    return repr((method, spec.placement, spec.allocation.name, spec.trainer.ema_decay is not None))


def find(base: BaseModel, spec: RunSpec, ranks: Ranks, cache: Path) -> ExportProof:
    """The proof of a run, from the cache folder or made; no pack may be on the base."""
    versions = [VERSION, proof.key_of(base.model, base.spec), key_of(spec), importlib.metadata.version("peft")]
    path = cache / f"{hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:20]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        plain = read_sealed(path)
        return ExportProof(**{**plain, "unreached": tuple(plain["unreached"])})
    found = prove(base, spec, ranks)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
        write_sealed(path, dataclasses.asdict(found))
    return found


def prove(
    base: BaseModel, spec: RunSpec, ranks: Ranks, *, tamper: Callable[[Path], None] = lambda folder: None
) -> ExportProof:
    """Makes the proof. `tamper` is given the run folder before it is loaded; tests plant faults there."""
    rows = proof.rows(base.model, () if base.tokenizer is None else base.tokenizer.all_special_ids)
    adapter = methods.adapter(spec, ranks).settled()
    stock = stock_log_probabilities(base.model, rows)
    with open_pack(base, [adapter], PackConfig(batch_size=len(rows))) as pack:
        pack.store.assign(0, adapter)
        before = log_probabilities(pack, -1, rows)
        ours = _move(pack, rows, before, wanted=max(EFFECT, ABOVE_ROUNDING * _largest(stock, before)))
        effect = _largest(ours, before)
        unreached = _unreached(pack, rows) if isinstance(adapter, AdapterSpec) else ()
        weights = pack.store.saved(0)()
    if isinstance(weights, Learnt) and not weights.files:
        return ExportProof(effect=effect)
    found = ExportProof(effect=effect, unreached=unreached)
    # a LoRA of other weights than PEFT takes the names of their modules for can name the weights
    by_weight = isinstance(adapter, AdapterSpec) and FORMS[adapter.form].weight_config is not None
    for as_parameters in (False, True) if by_weight else (False,):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            if isinstance(weights, Learnt):
                weights.write(run)
            else:
                write_adapter(run, spec, list(ranks), weights, as_parameters=as_parameters)
            tamper(run)
            refused, difference = _compared(base, run, rows, ours, effect)
        if refused is None or found.refused is None:
            shown = difference if math.isfinite(difference) else None
            found = replace(found, refused=refused, as_parameters=as_parameters, difference=shown)
        if refused is None:
            break
    return found


def log_probabilities(pack: Pack, slot: int, rows: Sequence[Tensor]) -> list[Tensor]:
    """The engine's log-probabilities [T, V] of each row, which lie padded in one batch; of a slot or, -1, the base."""
    lengths = torch.tensor([len(row) for row in rows], device=pack.device)
    with torch.no_grad(), pack.evaluating():
        pack.use_lanes([slot])
        states = pack.hidden(pad_sequence(list(rows), batch_first=True), lengths)
        return [pack.head.logits(state[: len(row)]).log_softmax(-1) for state, row in zip(states, rows, strict=True)]


def stock_log_probabilities(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """As `log_probabilities`, of a plain transformers or PEFT model, each row alone."""
    with torch.no_grad():
        return [
            model(input_ids=row[None], use_cache=False).logits[0, -len(row) :].float().log_softmax(-1) for row in rows
        ]


def _compared(
    base: BaseModel, run: Path, rows: Sequence[Tensor], ours: Sequence[Tensor], effect: float
) -> tuple[str | None, float]:
    """Why what lies in a run folder is not what the engine had, if it is not, and by how many nats."""
    try:
        theirs = stock_log_probabilities(as_stock(base, run), rows)
    except Exception as error:  # whatever PEFT and the model's code raise over an adapter that they cannot take
        if lost.is_of_device(error):
            raise
        return f"{type(error).__name__}: {gist(error)}", math.inf
    difference = _largest(theirs, ours)
    if difference <= LIMITS[base.model.dtype] * max(effect, EFFECT):
        return None, difference
    return (
        f"loaded with stock PEFT it gives log-probabilities that differ by up to {difference:.2g} nats (the adapter "
        f"changes them by {effect:.2g})"
    ), difference


def _move(pack: Pack, rows: Sequence[Tensor], before: Sequence[Tensor], *, wanted: float) -> list[Tensor]:
    """Moves every value of the adapter until that shows by `wanted` nats; returns the log-probabilities then."""
    size, ours = 0.02, list(before)
    for _ in range(6):
        _shake(pack, size)
        ours = log_probabilities(pack, 0, rows)
        if wanted <= _largest(ours, before) < math.inf:
            break
        size *= 3
    return ours


@torch.no_grad()
def _shake(pack: Pack, size: float) -> None:
    """Adds noise to all that trains: `size` times the spread of each tensor's values, or `size` where all are equal."""
    generator = torch.Generator().manual_seed(0)
    for part in (part for parts in pack.store.views(0).values() for part in parts):
        spread = float(part.float().std()) if part.numel() > 1 else 0.0
        noise = torch.randn(part.shape, generator=generator).to(part.device)
        part.add_(noise * size * (spread if spread > 1e-8 else 1.0))
    pack.store.publish(0)


def _unreached(pack: Pack, rows: Sequence[Tensor]) -> tuple[str, ...]:
    """Modules whose adapter has no gradient at all."""
    examples = [Encoded(str(place), tuple(row.tolist()), 1) for place, row in enumerate(rows)]
    pack.model.train()
    pack.use_lanes([0])
    batch = collate([examples], [mean_weights(examples)], fixed=False).to(pack.device)
    pack.forward_backward(batch)
    found = {
        name: max(float(part.abs().max()) for part in parts)
        for name, parts in pack.store.views(0, pack.store.grads).items()
    }
    pack.store.grads.zero_()
    return tuple(name for name, largest in found.items() if largest == 0)


def _largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(proof.largest(one, other) for one, other in zip(found, wanted, strict=True))
