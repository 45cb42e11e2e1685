"""What a run leaves on disk: the schema, the atomic write and the read. Nothing here needs torch."""

import dataclasses
import datetime
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from sweeper.redaction import without_credentials, without_secrets
from sweeper.seal import BrokenSeal, seal, sealed, unsealed

SCHEMA_VERSION = 1
RECORD = "record.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.jsonl"
"""A line for every example scored: `split`, `moment` (before, after), `id`, `nll` (nats of the whole response),
`tokens`, the example's metrics, the `text` that was generated and the `choice` that was made, and `group`, the unit of
independence that it shares with others: a template, a category, a document. A split in which every example is a unit of
its own has no `group`. Nor have the lines of earlier versions, whose records lack `data.SPLIT.groups`."""
EXAMPLES = "examples"
"""In a study: `DIGEST.jsonl.gz` has a line for each example of a split, `id`, `prompt`, `response` and maybe `choices`.
`data.SPLIT.texts` of a record is the digest; null where texts were not to be kept (`sweep.keep_texts=false`). Records
of earlier versions have none."""
LONGEST_TEXT, MOST_TEXTS = 4000, 2000
"""Characters of a prompt, reference or generated text, and examples of a split, that are kept at most."""
ADAPTER = "adapter"
WEIGHTS = "weights"
TASKS = "tasks"  # of a run whose tasks have blocks of their own: a folder with an adapter for each
SPECTRA = "spectra.json"
CHECKPOINT = "checkpoint.safetensors"
TRACEBACK = "traceback.txt"
WANDB_ID = "wandb.json"
SEARCHES = "searches.json"  # in a study whose arms are tuned: what the search of each did

COMMANDS = "commands.jsonl"

LIBRARY = "library"
"""In a study: what `adapters.py route` found of its runs as a library. `NAME.json` has the members, what was
asked and the `results` of every rule on a task; `NAME.jsonl` a line an example, with `task` and `rule`."""

# what else lies in a study folder: what trackers write, and the notes in folders that adapters.py wrote
TENSORBOARD, WANDB = "tensorboard", "wandb"
MLFLOW, TRACKIO = "mlflow", "trackio"  # beside the studies, which share them
EXPERTS = "experts"  # of a run with a learnt gate: a folder with an adapter for each expert, and what opens them
ROUTERS, ROUTER = "routers.safetensors", "router.json"
COMBINED, MERGED = "combined.json", "merged.json"

# what is read at most of a file that somebody else may have made, in bytes
LARGEST_JSON, LARGEST_LINES, LARGEST_HEADER = 64 << 20, 2 << 30, 100 << 20

Status = Literal["completed", "pruned", "failed", "diverged"]
COMPLETED: tuple[Status, ...] = ("completed", "diverged")
"""Ended by themselves."""


def perplexity(nll: float) -> float:
    """exp of the mean token negative log-likelihood (nats); infinite where that overflows."""
    return math.exp(nll) if nll < 709 else math.inf


# dotted field of a spec -> what a run has whose plain data leave it out: a field that came later, at its default
LEFT_OUT: dict[str, Any] = {
    "objective": "nll", "sharing": "single", "sharing.elasticity": 0.0, "sharing.experts": 0,
    "sharing.router": "token", "sharing.kept": 0, "sharing.tied": False, "sharing.balance": 0.0,
    "trainer.deterministic": False, "evaluation.conflict": 0
}  # fmt: skip
LEFT_OUT_OF_TASKS: dict[str, Any] = {"dataset.options.order": "given", "dataset.options.surgery": "none"}
"""As `LEFT_OUT`, of runs of several tasks."""


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

    def value(self, name: str) -> float | None:
        """`nll`, `perplexity` or a metric by its name; None where there is no such score."""
        return {"nll": self.nll, "perplexity": self.perplexity}.get(name, self.metrics.get(name))


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Costs of a run. Amortised figures are shares of a pack; solo figures come from a calibration alone on the device.

    Seconds are wall clock, memory is bytes, `train_flops` is the closed form of `sweeper.models.budget`. The probe's
    cost is that of the probe whose scores allocated the ranks, in full, also where several runs share it.
    `step_seconds_solo` are the repeated timings whose median is behind `train_seconds_solo`; former versions timed
    once. `memory_measured` says how the solo peak was (`sweeper.training.calibrate`). Records of former versions do not
    have it: on CUDA the run of theirs that was measured first has its process's one-off allocations in its peak.
    """

    train_seconds_amortised: float | None = None
    eval_seconds_amortised: float | None = None
    train_seconds_solo: float | None = None
    step_seconds_solo: tuple[float, ...] = ()
    peak_memory_solo_bytes: int | None = None
    memory_measured: str | None = None
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
    has the sizes of each split and, as `majority`, what always giving the commonest training answer scores on it; of
    "train" also the `order` of its examples (none: that of former versions, in which each pass of a step had its own).
    `seen` of a task's "train" is how many of its examples the run trained on, repeats counted.
    `groups` of a split is the number of its independent units (none: a former version, which did not say).

    `saved` says which weights were scored "after" and saved: those of which `step`, whether a moving `average` of them,
    and whether the run was `stopped_early`.

    A run of several tasks has the `scores` and `data` of each as SPLIT/TASK beside those over all. Where its adapter
    has rank blocks, `sharing` has the `blocks`, the `active_parameters` that the rows of each task run through, the
    test NLLs of each task `through` the blocks of every other one, and as `routing` what is so where no example's task
    is named: which tasks they are taken for (`confusion`), and the scores through the blocks of those. With elastic
    weights it has as `fisher_examples` how many examples each task's Fisher information is the mean over. With a learnt
    gate it has the number of `experts`, how many of them are `kept`, which `router` opens them and whether it is
    `tied`, the `router_parameters` and `active_parameters`; on test examples the mean gate of each expert by task
    (`usage`), the share of examples that are `told_apart`, and the load-balancing loss (`balance`).

    `init_from` of a run that began with the adapter of another: that run's `run_id`, the `digest` of the adapter, and
    its `nll` by split. The gain over what it began with is that less the NLL after; `before` is the base's, as ever.

    Where the weights of the tasks' losses are learnt, `weighing` has the `log_variance` s and the `weight` exp(-s) of
    each task after the last step. Where gradients were compared, `conflict` has the `steps` done by then, the `tasks`
    and `pairs` of them, of how many `examples` a task they are, the cosine of each pair over the whole `adapter` by
    step, of the `modules` by name `cosine` by step and pair (None: nothing in common) and `norms` by step and task, and
    the `seconds` that all of it took.

    `environment` is what it was made with; its `git_commit` ends in "+" where tracked files of the source differed from
    the commit, and is None where neither git nor a `.commit` file knew it (`sweeper.commit`). `pack` are the runs that
    were in its pack when it began, by slot; a run that began alone, and former versions, do not have it.

    `error` of a failed run: its `class`, its `message`, and as `traceback` the file beside the record that has it all.

    `search` is empty for a run of a plain grid; else `arm` and `trial` say which trial it was of, `tuned` names the
    tuned fields, and `purpose` says whether it was one of those tried ("trial"), one that was pruned after `pruned_at`
    steps and then trained whole, as it lay beside the best ("finish"), or the best again on fresh seeds ("confirm"):
    after the space was `widened` so many times, with the `edges` where the best still lay.
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
    sharing: Mapping[str, Any] = field(default_factory=dict)
    weighing: Mapping[str, Any] = field(default_factory=dict)
    conflict: Mapping[str, Any] = field(default_factory=dict)
    init_from: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    schema: int = SCHEMA_VERSION


def shortened(data: Mapping[str, Mapping[str, Any]], *, above: float = 0.0) -> str | None:
    """What `dataset.max_length` did to examples, by split; None where it did nothing.

    Args:
        data: as in a record. above: the share of a split's examples from which on it counts.
    """
    parts = []
    for key, what in (("dropped", "left out (their response is too long)"), ("truncated", "cut at the prompt's start")):
        counts = []
        for split, facts in data.items():
            if any(other.startswith(f"{split}/") for other in data):  # each of its tasks says so
                continue
            count, every = facts.get(key) or 0, (facts.get("examples") or 0) + (facts.get("dropped") or 0)
            if count and count > above * every:
                counts.append(f"{count:,} of {every:,} {split}")
        if counts:
            parts.append(f"{', '.join(counts)} examples are {what}")
    return f"dataset.max_length: {'; '.join(parts)}" if parts else None


def write_record(folder: Path, record: Record) -> Path:
    """Writes `folder/record.json` atomically: temporary file, fsync, rename. Write all it refers to before.

    A record that is there and cannot be read, being damaged or edited, is kept beside it under another name.
    """
    plain = dataclasses.asdict(record)
    for moments in plain["scores"].values():
        for score in moments.values():
            score["perplexity"] = perplexity(score["nll"])
    _keep_unreadable(folder / RECORD)
    text = json.dumps(_finite(plain), indent=1, allow_nan=False)
    return write_atomically(folder / RECORD, seal(without_secrets(text)))


def _keep_unreadable(path: Path) -> None:
    try:
        read_sealed(path)
    except OSError:
        return
    except ValueError:
        path.replace(_beside(path).with_name(f"{path.stem}.unreadable.{secrets.token_hex(4)}.json"))


def read_text(path: Path, *, largest: int = LARGEST_JSON) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read. ValueError: it is no plain file, has more than `largest` bytes, or is not UTF-8.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name} is no plain file")
        if found.st_size > largest:
            raise ValueError(f"{path.name} has {found.st_size:,} bytes, more than the {largest:,} that are read")
        return file.read(largest).decode()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would wait for who writes to it


def read_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, or so deeply nested that reading it would end the program.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def read_sealed(path: Path) -> Any:
    """What the JSON file holds that was written with a seal, or by an earlier version without one.

    Raises:
        OSError: it cannot be read. ValueError: as `read_text` and `read_json`; BrokenSeal: it is not what was written.
    """
    return read_json(unsealed(read_text(path)))


def write_sealed(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a JSON object that `read_sealed` reads, atomically."""
    return write_atomically(path, sealed(content))


def csv_cell(value: Any) -> Any:
    """A value for a CSV file. A spreadsheet takes a text that begins like a formula for one: it gets a ' before it."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def markdown_text(text: str) -> str:
    """A text for a Markdown file, whose viewers take for HTML what looks like a tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def note_command(study: Path, typed: str) -> None:
    """Adds a command that trains to `study/commands.jsonl`: `at`, UTC, and what was `typed`, passwords hidden."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    study.mkdir(parents=True, exist_ok=True)
    with (study / COMMANDS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"at": at, "typed": without_credentials(typed, typed=True)}) + "\n")


def read_commands(study: Path) -> list[dict[str, str]]:
    """The commands that trained a study, oldest first; none where a former version did."""
    try:
        lines = read_text(study / COMMANDS).splitlines()
        return [{key: str(value) for key, value in read_json(line).items()} for line in lines if line.strip()]
    except (OSError, ValueError, AttributeError):
        return []


def read_record(folder: Path) -> Record:
    """Reads a run folder's record.

    Raises:
        ValueError: the file is no record of a schema this version knows.
    """
    try:
        plain = read_sealed(folder / RECORD)
    except BrokenSeal as error:
        raise ValueError(f"{folder / RECORD}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: no record ({error})") from None
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{folder / RECORD}: no record of schema {SCHEMA_VERSION}")
    try:
        return _record(plain)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / RECORD}: no record that can be read ({type(error).__name__}: {error})") from None


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("run_id", "study", "started", "finished"), str),
    **dict.fromkeys(("spec", "scores", "efficiency", "data", "environment", "search"), dict),
    **dict.fromkeys(("saved", "sharing", "weighing", "conflict", "init_from", "error"), dict),
    **dict.fromkeys(("trainable_parameters", "total_parameters", "steps"), int),
    "modules": list,
}


def check_kinds(plain: Mapping[str, Any]) -> None:
    """Raises ValueError where a field of a record, read as plain data, is of another kind than its name says."""
    for name, kind in _KINDS.items():
        if plain.get(name) is not None and not isinstance(plain[name], kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    for name in ("environment", "data"):
        for key, value in (plain.get(name) or {}).items():
            if (name == "data" or key in ("versions", "content", "resumed_from")) and not isinstance(
                value, dict | None
            ):
                raise ValueError(f"{name}.{key} is no dict")


def _record(plain: dict[str, Any]) -> Record:
    check_kinds(plain)
    if not isinstance(plain["spec"], dict):
        raise ValueError("spec is no dict")
    if plain["status"] not in get_args(Status):
        raise ValueError(f"status {plain['status']!r}")
    plain["modules"] = tuple(Module(**module) for module in plain["modules"])
    if not all(isinstance(module.name, str) and isinstance(module.rank, int) for module in plain["modules"]):
        raise ValueError("a module without a name or rank")
    plain["efficiency"] = Efficiency(
        **plain["efficiency"] | {"step_seconds_solo": tuple(plain["efficiency"].get("step_seconds_solo", ()))}
    )
    plain["scores"] = {
        split: {moment: _score(values) for moment, values in moments.items()}
        for split, moments in plain["scores"].items()
    }
    return Record(**plain)


def records(study: Path) -> Iterator[Record]:
    """The record of every run folder of a study that has one, by run id.

    Raises:
        ValueError: as `read_record`.
    """
    for path in sorted(study.glob(f"*/{RECORD}")):
        yield read_record(path.parent)


def status(folder: Path) -> Status | None:
    """The status in a run folder's record; None where there is no record of a schema this version knows."""
    try:
        plain = read_sealed(folder / RECORD)
    except (OSError, ValueError):
        return None
    known = isinstance(plain, dict) and plain.get("schema") == SCHEMA_VERSION
    return plain["status"] if known and plain.get("status") in get_args(Status) else None


def checkpoint_progress(folder: Path) -> dict[str, Any] | None:
    """What the checkpoint of a run that was cut off says of it, tensors left unread; None where there is none."""
    try:
        with (folder / CHECKPOINT).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = read_json(file.read(size)) if size <= LARGEST_HEADER else {}
        progress = read_json(header["__metadata__"]["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return progress if isinstance(progress, dict) else None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON lines, atomically."""
    return write_atomically(path, "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows))


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a JSON object, atomically; numbers that are not finite are null."""
    return write_atomically(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def write_first(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object as a whole, unless there is a file; of several who write at once, one is first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        write_json(temporary, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not path.exists():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> Path:
    """Replaces `path` by `text` as a whole, less what secrets of the environment are in it."""
    with replacing(path) as file:
        file.write(without_secrets(text).encode())
    return path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once all of it is on disk.

    A reader, or a crash, sees the old content or the new, never half; readable to whom the umask lets read.
    """
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """As `replacing`, for a library that writes to a name, itself by a rename maybe and readable to its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with temporary.open("xb"):
            mode = temporary.stat().st_mode
        yield temporary
        _settle(temporary, mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to write files into that takes the place of the folder `path` once all of them are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _settle(file, temporary.stat().st_mode & 0o666)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed left half written in a folder that nobody else writes to."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _settle(file: Path, mode: int) -> None:
    with suppress(PermissionError):  # a file system where every file has the same mode
        file.chmod(stat.S_IMODE(mode))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


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
