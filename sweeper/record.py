"""What a run leaves on disk: the schema, the atomic write and the read. Nothing here needs torch."""

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1
RECORD = "record.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.jsonl"
ADAPTER = "adapter"
WEIGHTS = "weights"
SPECTRA = "spectra.json"

Status = Literal["completed", "pruned", "failed", "diverged"]
COMPLETED: tuple[Status, ...] = ("completed", "diverged")
"""Ended by themselves."""


def perplexity(nll: float) -> float:
    """exp of the mean token negative log-likelihood (nats); infinite where that overflows."""
    return math.exp(nll) if nll < 709 else math.inf


@dataclass(frozen=True, kw_only=True)
class Module:
    """One adapted module: full name, role, layer (None outside the layers), rank and trainable parameters.

    `score` is what a probe found of it, where its rank was allocated by importance.
    """

    name: str
    role: str
    layer: int | None
    rank: int
    parameters: int
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of one split at one moment. `nll` is nats per response token; `metrics` are means over examples."""

    nll: float
    tokens: int
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Costs of a run. Amortised figures are shares of a pack; solo figures come from a calibration alone on the device.

    Seconds are wall clock, memory is bytes, `train_flops` is the closed form of `sweeper.budget`. The probe's cost is
    that of the probe whose scores allocated the ranks, in full, also where several runs share it.
    """

    train_seconds_amortised: float | None = None
    eval_seconds_amortised: float | None = None
    train_seconds_solo: float | None = None
    peak_memory_solo_bytes: int | None = None
    tokens_per_second_solo: float | None = None
    train_tokens: int = 0
    train_flops: float = 0.0
    adapter_bytes: int = 0
    pack_runs: int = 1
    pack_seconds: float | None = None
    pack_peak_memory_bytes: int | None = None
    compile_seconds: float | None = None
    probe_seconds: float | None = None
    probe_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything the analysis may know about a run. `scores` maps split -> "before"/"after" -> Score; `data`
    has the sizes of each split and, as `majority`, what always giving the commonest training answer scores on it.

    `saved` says which weights were scored "after" and saved: those of which `step`, whether a moving `average` of them,
    and whether the run was `stopped_early`.

    `search` is empty for a run of a plain grid; else `arm` and `trial` say which trial it was of, `tuned` names the
    tuned fields, and `purpose` says whether it was one of those tried ("trial") or the best again on fresh seeds
    ("confirm").
    """

    run_id: str
    study: str
    status: Status
    spec: Mapping[str, Any]
    modules: tuple[Module, ...] = ()
    trainable_parameters: int = 0
    total_parameters: int = 0
    steps: int = 0
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    efficiency: Efficiency = field(default_factory=Efficiency)
    environment: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    schema: int = SCHEMA_VERSION


def write_record(folder: Path, record: Record) -> Path:
    """Writes `folder/record.json` atomically: temporary file, fsync, rename. Write all it refers to before."""
    plain = dataclasses.asdict(record)
    for moments in plain["scores"].values():
        for score in moments.values():
            score["perplexity"] = _finite(perplexity(score["nll"]))
    return write_atomically(folder / RECORD, json.dumps(_finite(plain), indent=1, allow_nan=False) + "\n")


def read_record(folder: Path) -> Record:
    """Reads a run folder's record.

    Raises:
        ValueError: the file is no record of a schema this version knows.
    """
    plain = json.loads((folder / RECORD).read_text())
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{folder / RECORD}: no record of schema {SCHEMA_VERSION}")
    plain["modules"] = tuple(Module(**module) for module in plain["modules"])
    plain["efficiency"] = Efficiency(**plain["efficiency"])
    plain["scores"] = {
        split: {moment: _score(values) for moment, values in moments.items()}
        for split, moments in plain["scores"].items()
    }
    return Record(**plain)


def records(study: Path) -> Iterator[Record]:
    """Every readable record of a study folder, by run id."""
    for path in sorted(study.glob(f"*/{RECORD}")):
        yield read_record(path.parent)


def status(folder: Path) -> Status | None:
    """The status in a run folder's record; None where there is no record of a schema this version knows."""
    try:
        plain = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(plain, dict) and plain.get("schema") == SCHEMA_VERSION
    return plain.get("status") if known else None


def finished_run_ids(study: Path, *, statuses: Iterable[Status] = ("completed", "pruned", "diverged")) -> set[str]:
    """Ids of the runs of a study that ended with one of `statuses`. An unreadable record counts as not finished."""
    wanted, done = set(statuses), set()
    for path in study.glob(f"*/{RECORD}"):
        try:
            plain = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(plain, dict) and plain.get("status") in wanted and plain.get("schema") == SCHEMA_VERSION:
            done.add(path.parent.name)
    return done


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON lines, atomically."""
    return write_atomically(path, "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows))


def write_atomically(path: Path, text: str) -> Path:
    """Replaces `path` by `text` so that a reader, or a crash, sees the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp, whose files only their owner may read: studies are shared
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _score(values: dict[str, Any]) -> Score:
    nll = values["nll"] if values["nll"] is not None else math.nan
    return Score(nll=nll, tokens=values["tokens"], examples=values["examples"], metrics=values["metrics"])


def _finite(value: Any) -> Any:
    # JSON has no NaN or infinity; absence is null
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
