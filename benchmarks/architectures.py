#!/usr/bin/env python3
"""Every causal language model class of transformers, tiny: does the engine give the stock model's numbers?

    python -m benchmarks.architectures                          # the table of docs/models.md, some minutes on two cores
    python -m benchmarks.architectures --only mamba bloom       # some rows, printed
    python -m benchmarks.architectures --device cuda            # on a GPU, printed

Each row is built from code, in float32, with weights in which a fault shows. What is compared, and with what, is in
`sweeper/models/proof.py` and `sweeper/training/export_proof.py`, which do the same before a model is trained. Each
check is tried on each row: with a planted fault it must fail.
"""

import argparse
import contextlib
import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import tiny_models
from sweeper.errors import ModelError, SweeperError
from sweeper.methods import adapter as adapter_of
from sweeper.models import BaseModel, forward, proof
from sweeper.models.architecture import number_of_layers, structure
from sweeper.models.base import settle
from sweeper.placement.placement import PLACEMENTS, report, resolve
from sweeper.record import ADAPTER, write_atomically
from sweeper.spec import ModelSpec, PlacementSpec, RunSpec, run_spec
from sweeper.training import export_proof
from sweeper.training.generate import generate
from sweeper.training.pack import open_pack
from sweeper.training.pack_config import PackConfig

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
RANK, WRITTEN = 4, 6  # of the adapters; tokens that are generated


@dataclasses.dataclass(kw_only=True)
class Row:
    """What one model gave; an empty text is a column that was not reached."""

    name: str
    kind: str
    placement: str = ""
    packed: str = ""
    cached: str = ""
    export: str = ""
    refused: str = ""
    faults: dict[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def passes(self) -> bool:
        return not self.refused and all((self.placement, self.packed, self.cached, self.export))


def base_of(name: str, device: str = "cpu") -> BaseModel:
    """The tiny model of a row on a device, proved.

    Raises:
        ModelError: it is refused, as it would be before training.
    """
    model: Any = tiny_models.build(name, prepare=settle).requires_grad_(False)
    model.to(device)
    spec = ModelSpec(name=name, source="random", location=name.split(" ")[0])
    return BaseModel(
        model=model, tokenizer=None, targets=structure(model), spec=spec, stop_ids=(), verdict=proof.prove(model)
    )  # type: ignore[arg-type]  # fmt: skip


def run_of(base: BaseModel, method: str = "lora") -> tuple[RunSpec, dict[Any, int]]:
    """A run that adapts all that the model has, and its ranks.

    Raises:
        SweeperError: no placement fits the model.
    """
    found = report(base.targets)
    name = next((name for name in ("all", "full", "attn", "ff", "mixer") if found[name].isdigit()), None)
    if name is None:
        raise ModelError(found["full"])
    placed = PlacementSpec(name=name, roles=PLACEMENTS[name])
    targets = resolve(base.targets, placed, layers=number_of_layers(base.targets))
    spec = run_spec(
        {
            "model": {"name": base.spec.name, "source": "random", "location": base.spec.location},
            "dataset": {"name": "jsonl", "family": "jsonl"}, "method": {"name": method},
            "placement": {"name": name, "roles": list(placed.roles)}, "allocation": {"name": "uniform"}, "rank": RANK,
            "optim": {"lr": 1e-3}, "trainer": {"max_steps": 1, "batch_size": 2}, "evaluation": {"name": "default"},
        }
    )  # fmt: skip
    return spec, dict.fromkeys(targets, RANK)


def look(name: str, *, faults: bool = True, device: str = "cpu") -> Row:
    """All columns of a row."""
    row = Row(name=name, kind=tiny_models.kind(name))
    if (why := tiny_models.refusal(name)) is not None:
        row.refused = why
    try:
        base = base_of(name, device)
    except ModelError as error:
        row.refused = row.refused or str(error)
        return row
    except Exception:
        if row.refused:
            return row
        raise
    row.refused = ""  # whatever it was made for, it is a causal language model
    try:
        spec, ranks = run_of(base)
    except SweeperError as error:
        row.refused = str(error)
        return row
    row.placement = " · ".join(f"{place} {count}" for place, count in report(base.targets).items() if count.isdigit())
    verdict = base.verdict
    row.packed = f"{verdict.padding}, {verdict.differences[verdict.padding]:.0e}"
    row.cached = "" if generated(base) != alone(base) else "cache" if verdict.cached else "whole rows"
    proved = export_proof.prove(base, spec, ranks)
    row.export = f"{proved.difference:.0e}" if proved.refused is None else ""
    if proved.refused is not None:
        row.refused = f"it trains, and its adapters are for `adapters.py merge` alone: {proved.refused}"
    elif proved.unreached:
        row.refused = f"an adapter on {', '.join(proved.unreached[:3])} changes nothing"
    if faults:
        row.faults = planted(base, spec, ranks)
    return row


def generated(base: BaseModel) -> list[tuple[int, ...]]:
    """What the engine writes after each row, greedily: the base, which is a pack's lane -1."""
    spec, ranks = run_of(base)
    rows = [tuple(row.tolist()) for row in proof.rows(base.model)]
    with open_pack(base, [adapter_of(spec, ranks)], PackConfig(batch_size=1)) as pack:
        (texts,) = generate(pack, [-1], rows, max_new_tokens=WRITTEN, stop_ids=[-1], rows=len(rows))
    return [text.ids for text in texts]


@torch.no_grad()
def alone(base: BaseModel) -> list[tuple[int, ...]]:
    """What the stock model writes, row by row, every token computed again at each step."""
    found = []
    for row in proof.rows(base.model):
        ids = row[None]
        for _ in range(WRITTEN):
            token = base.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, token[:, None]], dim=1)
        found.append(tuple(ids[0, len(row) :].tolist()))
    return found


def planted(base: BaseModel, spec: RunSpec, ranks: Any) -> dict[str, bool]:
    """Fault -> whether it was found."""
    found = {}
    for name, fault in (("mask", padding_seen), ("positions", positions_shifted)):
        with mock.patch.object(forward, "hidden_states", fault):
            found[f"packed/{name}"] = _is_refused(base.model)
    if base.verdict.cached:
        for name, decoding in (("mask", MaskDropped), ("positions", PositionsShifted)):
            with mock.patch.object(forward, "CachedDecoding", decoding):
                found[f"cached/{name}"] = not proof.prove(base.model).cached
    found["export/zeroed"] = export_proof.prove(base, spec, ranks, tamper=zero_one).refused is not None
    return found


def _is_refused(model: Any) -> bool:
    try:
        proof.prove(model)
    except ModelError:
        return True
    return False


def padding_seen(decoder: Callable[..., Any], ids: Tensor, lengths: Tensor, _padding: str) -> Tensor:
    """A planted fault: padding where every token sees it, and no mask."""
    width = ids.shape[1]
    moved = [row.roll(width - int(length)) for row, length in zip(ids, lengths, strict=True)]
    states = forward.last_hidden(decoder(input_ids=torch.stack(moved), use_cache=False))
    return torch.stack([row.roll(int(n) - width, 0) for row, n in zip(states, lengths, strict=True)])


def positions_shifted(decoder: Callable[..., Any], ids: Tensor, _lengths: Tensor, _padding: str) -> Tensor:
    """A planted fault: every text begins one position late, behind a token that is none of it."""
    late = torch.cat([ids[:, -1:] * 0, ids], dim=1)
    return forward.last_hidden(decoder(input_ids=late, use_cache=False))[:, 1:]


class MaskDropped(forward.CachedDecoding):
    """A planted fault: the padding before short rows counts as text."""

    def __init__(self, decoder: Any, model: Any, ids: Tensor, mask: Tensor) -> None:
        super().__init__(decoder, model, ids, torch.ones_like(mask))


class PositionsShifted(forward.CachedDecoding):
    """A planted fault: what is written stands three positions late; where none are given, after three more tokens."""

    def __init__(self, decoder: Any, model: Any, ids: Tensor, mask: Tensor) -> None:
        super().__init__(decoder, model, ids, mask)
        if self.takes_positions:  # some take them and look elsewhere
            there, twice = (
                forward.last_hidden(
                    decoder(input_ids=ids, attention_mask=mask, position_ids=factor * self.positions, use_cache=False)
                )
                for factor in (1, 2)
            )
            self.takes_positions = not torch.equal(there, twice)

    def append(self, token: Tensor, most: int | None = None) -> None:
        super().append(token, most)
        if self.takes_positions:
            self.positions = self.positions + 3
        else:
            self.ids = self.ids.repeat(1, 4)
            self.mask = torch.cat([self.mask, self.mask[:, -1:].repeat(1, 3)], dim=1)


def zero_one(run: Path) -> None:
    """A planted fault: one tensor of the saved adapter is zero."""
    file = run / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors, reverse=True) if "lora_B" in name)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def page(rows: Sequence[Row]) -> str:
    """docs/models.md."""
    import peft
    import transformers

    passed = [row for row in rows if row.passes]
    refused = [row for row in rows if row.refused]
    faults = Counter(found for row in rows for found in row.faults.values())
    lines = [
        "# Models",
        "",
        "Which models train here, and how each is proved. Made by `.venv/bin/python -m benchmarks.architectures`.",
        "",
        "Before a model is trained it is proved on its own weights: short rows padded in one batch, as they are "
        "trained on, must give the log-probabilities that the stock model gives each row alone; so must the key-value "
        "cache, else text is generated from whole rows, which is slower; and an adapter of the run's method on the "
        "run's modules, saved and loaded with stock PEFT, must give the engine's. What rounding explains is measured. "
        "A model that fails the first is refused; an adapter that fails the last is said to. "
        "Verdicts are kept in the cache folder, by the model's "
        "content, versions, device and precision.",
        "",
        f"The table does that with every causal language model class of transformers {transformers.__version__} that "
        f"can be built, tiny and in float32 (PEFT {peft.__version__}, torch {torch.__version__.split('+')[0]}, CPU), "
        "and with options that change how a class attends. Numbers are the largest differences of a log-probability, "
        "in nats. A row passes if all four columns do.",
        "",
        f"**{len(passed)} of {len(rows)} rows pass all four columns, {len(refused)} are refused, "
        f"{len(rows) - len(passed) - len(refused)} differ without a word.** Each check was tried on each row with "
        f"planted faults (mask dropped, positions shifted, one adapter tensor zeroed): {faults[True]} of "
        f"{faults.total()} were found.",
        "",
        "- *placement*: modules that each named placement adapts.",
        "- *packed = stock*: `causal`, without a mask; `masked`, with the model's own masks. Rows of 21, 14 and 8 "
        "tokens.",
        "- *cached = uncached*: whether text is generated through the cache or from whole rows; either way six tokens "
        "after each row are those of the stock model, row by row, without a cache.",
        "- *export*: LoRA of rank 4 on all that can be placed, through stock PEFT.",
        "",
        "| model | kind | placement | packed = stock | cached = uncached | export |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {row.kind} | {row.placement} | {row.packed} | {row.cached} | {row.export} |" for row in passed
    ]
    lines += ["", "Refused, with the line that a user reads:", "", "| model | kind | reason |", "| --- | --- | --- |"]
    lines += [f"| {row.name} | {row.kind} | {_cell(row.refused)} |" for row in refused]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="rows to look at; nothing is written")
    parser.add_argument("--device", default="cpu", help="where they run; other than the CPU, nothing is written")
    parser.add_argument("--no-faults", action="store_true", help="plant no faults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in options.only or tiny_models.names():
        with hushed():
            try:
                row = look(name, faults=not options.no_faults, device=options.device)
            except Exception as error:  # a row that breaks is a row that does not pass, and is shown
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                rows.append(Row(name=name, kind=tiny_models.kind(name)))
                continue
        rows.append(row)
        missed = [fault for fault, found in row.faults.items() if not found]
        state = "passes" if row.passes else f"refused: {row.refused}" if row.refused else "DIFFERS"
        print(
            f"{name}: {state}; {row.packed}; {row.cached}; {row.export}" + f"; MISSED {missed}" * bool(missed),
            flush=True,
        )
    silent = [row.name for row in rows if not (row.passes or row.refused)]
    missed = [row.name for row in rows if not all(row.faults.values())]
    print(f"{sum(row.passes for row in rows)} of {len(rows)} pass, {len(silent)} differ: {silent}; missed: {missed}")
    if not options.only and options.device == "cpu":
        write_atomically(PAGE, page(rows))
    return int(bool(silent or missed))


if __name__ == "__main__":
    sys.exit(main())
