"""Reads run folders into one tidy table, one row per run. Unreadable folders are reported, never silently dropped."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sweeper.record import (
    ADAPTER,
    COMBINED,
    EXAMPLES,
    LARGEST_LINES,
    LEFT_OUT,
    LEFT_OUT_OF_TASKS,
    LIBRARY,
    MERGED,
    METRICS,
    PREDICTIONS,
    RECORD,
    SCHEMA_VERSION,
    TENSORBOARD,
    WANDB,
    WEIGHTS,
    check_kinds,
    perplexity,
    read_json,
    read_text,
)
from sweeper.seal import BrokenSeal, unsealed

from . import groups, spectra, together

# of a spec, and the location of the files
CONTENTS = {
    "model.content": "model.location", "dataset.content": "dataset.path", "trainer.content": "trainer.init_from",
}  # fmt: skip
GROUPS = ("model", "dataset", "method", "placement", "allocation", "sharing", "together", "objective", "evaluation")
STATUSES = ("completed", "pruned", "diverged", "failed")
TASK_SPLITS = ("train", "validation", "test")
# earlier versions: with accumulation, a step's examples depended on how it was split into passes
ORDER = "trainer.order"
SIZES = ("examples", "groups", "truncated", "dropped", "seen", "texts")  # of a split, in a record's data
MADE_WITH = ("precision", "device_type", "device", "attention", "sandbox_python")  # of a record's environment
# of a split or metric, which tables and figures are named by: no path, no LaTeX
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+:-]{0,79}")
_NOT_RUNS = (ADAPTER, WEIGHTS, TENSORBOARD, WANDB, LIBRARY, EXAMPLES)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that could not be used: the folder, a short kind to count by, and the reason."""

    folder: str
    kind: str
    message: str


@dataclass(kw_only=True)
class Study:
    """Runs, one row each, and problems found while reading. Examples, curves and modules are read on demand.

    A run of several tasks is a row for each, its run_id "RUN/TASK" (`analysis.together`).

    Columns of `runs`: run_id, study, status, folder, source; every field of the spec by its dotted name (the name of a
    group under the group itself); `SPLIT.METRIC` after training and `SPLIT.before.METRIC` before it; every field of
    the efficiency; `data.SPLIT.examples`, `data.SPLIT.groups`, `data.SPLIT.truncated`, `data.SPLIT.dropped`;
    `forgetting.SPLIT`, the rise of NLL on splits other than train, validation and test; where `adapters.py spectra`
    looked at a run, `analysis.spectra.columns`; of a run that began with another's adapter `init_from.SPLIT.nll`, what
    that scored. `fields` are those columns that come from the spec.
    """

    name: str
    runs: pd.DataFrame
    fields: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    layouts: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    _folders: dict[str, str] | None = None
    _unnamed: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def examples(self, run_ids: Iterable[str], *, split: str = "test", phase: str = "after") -> pd.DataFrame:
        """Per-example scores: run_id, id, nll (nats of the whole response), tokens, and one column a metric."""
        parts = []
        for run_id in run_ids:
            columns = self.example_columns(run_id, split=split, phase=phase)
            if columns:
                parts.append(pd.DataFrame({"run_id": run_id, **columns}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", "id", "nll", "tokens"])

    def example_columns(self, run_id: str, *, split: str, phase: str) -> dict[str, list[Any]]:
        """Per-example scores of one run, a list per column; empty if the run left none.

        "group" is the unit of independence of each example. It is missing where every example is a unit of its own, and
        where the units are not known (`ungrouped`).
        """
        written = together.split_of(run_id, split)
        wanted = f'"split": "{written}", "moment": "{phase}"'
        rows = self._lines(self.folder(run_id), PREDICTIONS, wanted)
        rows = [row for row in rows if row.get("split") == written and phase in (row.get("phase"), row.get("moment"))]
        names = [key for key in rows[0] if key not in ("split", "phase", "moment")] if rows else []
        found: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in names}
        if any("group" in row for row in rows):
            found["group"] = [row.get("group") or row.get("id") for row in rows]
        elif "id" in found and run_id in (unnamed := self._without_groups(split)):
            units = groups.recovered(unnamed[run_id], found["id"])
            if units is not None and units != found["id"]:
                found["group"] = units
        return found

    def ungrouped(self, *, split: str = "test") -> list[str]:
        """Runs, by id, whose predictions may share units of independence without saying so: of an earlier version, on
        data whose ids do not tell the units. Their examples can only be treated as independent.

        Args:
            split: one of the dataset's own.
        """
        found = []
        for run_id, family in self._without_groups(split).items():
            columns = self.example_columns(run_id, split=split, phase="after")
            if columns and "group" not in columns and groups.recovered(family, columns.get("id", ())) is None:
                found.append(run_id)
        return sorted(found)

    def _without_groups(self, split: str) -> dict[str, str | None]:
        """run_id -> family of its dataset, of runs whose record does not count the units of a split."""
        if split not in self._unnamed:
            counted = f"data.{split}.groups"
            rows = self.runs if counted not in self.runs else self.runs[self.runs[counted].isna()]
            families = rows["dataset.family"] if "dataset.family" in rows else [None] * len(rows)
            self._unnamed[split] = {
                run_id: family if isinstance(family, str) else None
                for run_id, family in zip(rows["run_id"], families, strict=True)
            }
        return self._unnamed[split]

    def folder(self, run_id: str) -> Path | None:
        """The folder of a run; None of one that came from elsewhere, which has none."""
        if self._folders is None:
            self._folders = dict(zip(self.runs["run_id"], self.runs["folder"], strict=True))
        found = self._folders[run_id]
        return Path(found) if isinstance(found, str) else None  # pandas makes nan of None in some columns

    def curves(self, run_ids: Iterable[str]) -> pd.DataFrame:
        """Training curves: run_id, step, loss, lr, grad_norm, tokens of every optimiser step."""
        parts = []
        for run_id in run_ids:
            rows = [row for row in self._lines(self.folder(run_id), METRICS, '"loss"') if "loss" in row]
            if rows:
                parts.append(pd.DataFrame(rows).assign(run_id=run_id))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", "step", "loss", "lr"])

    def evaluations(self, run_ids: Iterable[str], *, split: str = "validation") -> pd.DataFrame:
        """Scores of a split before, while and after runs train: run_id, step, nll, and one column a metric."""
        parts = []
        for run_id in run_ids:
            lines = self._lines(self.folder(run_id), METRICS, f'"split": "{split}"')
            rows = [row for row in lines if row.get("split") == split and "step" in row]
            if rows:
                parts.append(pd.DataFrame(rows).assign(run_id=run_id))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", "step", "nll"])

    def modules(self, run_ids: Iterable[str]) -> pd.DataFrame:
        """Adapted modules: run_id, name, role, layer, rank, parameters."""
        layouts = self.runs.set_index("run_id")["layout"]
        found = {run_id: self.layouts.get(layouts[run_id]) for run_id in run_ids}
        parts = [pd.DataFrame(rows).assign(run_id=run_id) for run_id, rows in found.items() if rows]
        columns = ["run_id", "name", "role", "layer", "rank", "parameters"]
        return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)

    def spectra(self, run_ids: Iterable[str]) -> pd.DataFrame:
        """Spectra of updates by module, of runs that have them: run_id and `analysis.spectra.BY_MODULE`."""
        parts = []
        for run_id in run_ids:
            folder = self.folder(run_id)
            rows = [] if folder is None else self.read_spectra(folder)
            if rows:
                parts.append(pd.DataFrame(rows)[list(spectra.BY_MODULE)].assign(run_id=run_id))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id", *spectra.BY_MODULE])

    def read_spectra(self, folder: Path) -> list[dict[str, Any]]:
        """Rows of a run's spectra; an unreadable file becomes a problem."""
        try:
            return spectra.read(folder)
        except ValueError as error:
            self.note(Problem(folder=str(folder), kind="broken spectra", message=str(error)))
            return []

    def counts(self) -> dict[str, int]:
        """How many runs ended in which status, and how many folders had which problem."""
        once = self.runs.loc[~self.runs["run_id"].str.partition("/")[0].duplicated()] if len(self.runs) else self.runs
        statuses = once["status"].value_counts() if len(once) else {}
        found = {status: int(statuses[status]) for status in STATUSES if status in statuses}
        for problem in self.problems:
            found[problem.kind] = found.get(problem.kind, 0) + 1
        return found

    def _lines(self, folder: Path | None, name: str, wanted: str) -> list[dict[str, Any]]:
        if folder is None:
            return []
        path = folder / name
        # One parse of the lines that matter is four times faster than a parse of each line.
        try:
            lines = read_text(path, largest=LARGEST_LINES).splitlines()
        except OSError:
            return []
        except ValueError as error:
            self.note(Problem(folder=str(path.parent), kind="unreadable lines", message=f"{path.name}: {error}"))
            return []
        kept = [line for line in lines if wanted in line] or [line for line in lines if line.strip()]
        try:
            rows: list[dict[str, Any]] = read_json("[" + ",".join(kept) + "]")
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("not objects")
        except ValueError:
            self.note(Problem(folder=str(path.parent), kind="broken lines", message=f"{path.name}: not JSON lines"))
            return []
        return rows

    def note(self, problem: Problem) -> None:
        """Adds a problem once."""
        if problem not in self.problems:
            self.problems.append(problem)


def load(*folders: Path | str, rows: Sequence[Mapping[str, Any]] = ()) -> Study:
    """Reads study folders (or folders of them).

    Args:
        folders: each a study, a folder of studies or one run's folder.
        rows: further runs, as `analysis.exchange` reads them from elsewhere.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    study = Study(name=", ".join(Path(folder).name for folder in folders), runs=pd.DataFrame())
    found: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder. Give the folder of a study, such as outputs/default.")
        for path in _run_folders(folder):
            row = _read(path, study)
            if row is None:
                continue
            known = found.get(row["run_id"])
            if known is not None:
                message = f"run {row['run_id']} is also in {known['folder']}; the one that finished last is used"
                study.note(Problem(folder=str(path), kind="duplicate", message=message))
            if known is None or str(known["finished"]) < str(row["finished"]):
                found[row["run_id"]] = row
    found = _latest(found, study)
    every = together.by_task([*found.values(), *map(dict, rows)], flat)
    study.fields += [key for key in together.fields(every) if key not in study.fields]
    ordered = sorted(every, key=lambda row: str(row["run_id"]))
    study.runs = _tidy(pd.DataFrame(ordered))
    imported = (
        "experiment",
        "model",
        "dataset",
        "method",
        "placement",
        "rank",
        "seed",
        "optim.lr",
        "trainer.max_steps",
    )
    study.fields += [key for key in imported if key in study.runs and key not in study.fields]
    return study


def _latest(found: Mapping[str, dict[str, Any]], study: Study) -> dict[str, dict[str, Any]]:
    """Of runs that differ only in their files' content, the one that finished last; files may have moved."""
    last: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in sorted(found.values(), key=lambda row: str(row["finished"])):
        key = tuple(str(row.get(name)) for name in study.fields)
        former = last.get(key)
        if former is not None and not any(f"made_with.{name}" in one for one in (former, row) for name in CONTENTS):
            key = (*key, str(row["run_id"]))
        elif former is not None:
            message = f"run {former['run_id']} was trained again on other files, as {row['run_id']}, which is used"
            study.note(Problem(folder=str(former["folder"]), kind="former data", message=message))
        last[key] = row
    places: dict[tuple[Any, ...], Any] = {}
    for row in reversed(last.values()):
        for name, where in CONTENTS.items():
            content = row.get(f"made_with.{name}")
            if content is not None and where in row:
                row[where] = places.setdefault((where, row.get(name.split(".")[0]), content), row[where])
    return {row["run_id"]: row for row in last.values()}


def flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> plain value of a spec; lists become text, so that every value can be compared and grouped."""
    found: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if key == "name" and prefix.rstrip(".") in GROUPS:
                found[prefix.rstrip(".")] = value
            elif isinstance(value, Mapping):
                walk(value, f"{name}.")
            else:
                found[name] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    walk(spec, "")
    return found


def _run_folders(folder: Path) -> Iterator[Path]:
    """Run folders at or under `folder`, with or without a record."""
    if (folder / RECORD).is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        if child.name in _NOT_RUNS and not any(child.glob(f"*/{RECORD}")):  # a study may have that name too
            continue
        if (child / COMBINED).is_file() or (child / MERGED).is_file():
            continue
        if (child / RECORD).is_file():
            yield child
            continue
        inside = [path for path in child.iterdir() if path.is_dir() and path.name not in _NOT_RUNS]
        if inside and not any((child / name).exists() for name in (METRICS, PREDICTIONS)):
            yield from _run_folders(child)
        else:
            yield child


def _read(folder: Path, study: Study) -> dict[str, Any] | None:
    def problem(kind: str, message: str) -> None:
        study.note(Problem(folder=str(folder), kind=kind, message=message))

    try:
        text = read_text(folder / RECORD)
    except FileNotFoundError:
        problem("no record", "the run has not finished or was cut off; repeating its command completes it")
        return None
    except (OSError, ValueError) as error:
        problem("unreadable record", f"{type(error).__name__}: {error}")
        return None
    try:
        plain = read_json(unsealed(text))
        if not isinstance(plain, dict):
            raise ValueError("not a mapping")
    except BrokenSeal as error:
        problem("broken seal", f"{error}; its command trains the run again")
        return None
    except ValueError as error:
        problem("broken record", f"not a JSON object: {error}")
        return None
    schema = plain.get("schema")
    if schema != SCHEMA_VERSION:
        age = "older" if isinstance(schema, int) and schema < SCHEMA_VERSION else "unknown"
        problem(f"{age} schema", f"record of schema {schema!r}; this version reads {SCHEMA_VERSION}")
        return None
    try:
        return _row(plain, folder, study)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        problem("broken record", f"{type(error).__name__}: {error}")
        return None


def _row(plain: dict[str, Any], folder: Path, study: Study) -> dict[str, Any]:
    if plain["status"] not in STATUSES:
        raise ValueError(f"status {plain['status']!r}; known are {', '.join(STATUSES)}")
    check_kinds(plain)
    modules = plain.get("modules") or []
    layout = hash(tuple((module["name"], module["rank"]) for module in modules))
    study.layouts.setdefault(layout, modules)
    row: dict[str, Any] = {key: plain[key] for key in ("run_id", "study", "status")}
    parts = plain["spec"]["dataset"].get("parts")
    spec = LEFT_OUT | (LEFT_OUT_OF_TASKS if parts else {})
    spec |= {name: value for name, value in flat(plain["spec"]).items() if name not in CONTENTS}
    trained_on = (plain.get("data") or {}).get("train")
    if trained_on and (spec.get("trainer.accumulation") or 1) > 1 and "order" not in trained_on:
        spec[ORDER] = "by pass"
    study.fields += [key for key in spec if key not in study.fields]
    row |= {"folder": str(folder), "source": "study", "layout": layout, **spec}
    row[together.PARTS] = parts
    for key in ("trainable_parameters", "total_parameters", "steps", "started", "finished"):
        row[key] = plain.get(key)
    row |= plain.get("efficiency") or {}
    row |= score_columns(plain.get("scores") or {})
    through = (plain.get("sharing") or {}).get("through") or {}
    row |= {f"through.{task}.{path}": nll for task, own in through.items() for path, nll in own.items()}
    row |= {f"loss_weight.{task}": one["weight"] for task, one in (plain.get("weighing") or {}).items()}
    if isinstance(steps := (plain.get("conflict") or {}).get("steps"), list):
        row[together.COMPARED] = len(steps)
    row |= together.expert_columns(plain.get("sharing") or {})
    row |= together.routed_columns((plain.get("sharing") or {}).get("routing") or {})
    began = plain.get("init_from") or {}
    row |= {f"init_from.{key}": began.get(key) for key in ("run_id", "digest") if began}
    row |= {f"init_from.{split}.nll": nll for split, nll in (began.get("nll") or {}).items()}
    for split, facts in (plain.get("data") or {}).items():
        row |= {f"{split}.majority.{name}": score for name, score in (facts.get("majority") or {}).items()}
        row |= {f"data.{split}.{key}": facts[key] for key in SIZES if key in facts}
    environment = plain.get("environment") or {}
    row |= {name: environment.get(name) for name in ("device", "device_type", "git_commit")}
    row |= made_with(environment, plain["spec"])
    row |= {f"versions.{name}": version for name, version in (environment.get("versions") or {}).items()}
    error = plain.get("error") or {}
    row |= {"error": error.get("class"), "error_message": error.get("message")}
    # Fields that a later schema-1 record adds keep their own names.
    known = {
        "run_id", "study", "status", "spec", "modules", "scores", "efficiency", "environment", "error", "data",
        "sharing", "weighing", "conflict", "init_from",
    }  # fmt: skip
    extra = {key: value for key, value in plain.items() if key not in known and key not in row and key != "schema"}
    return row | flat(extra) | spectra.columns(study.read_spectra(folder))


def made_with(environment: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of what a run was made with, as `made_with.NAME`: a value, or several where it was resumed with another.

    `spec` and environment say what was in the files of model and dataset; a record of an earlier version does not.
    """
    found: dict[str, Any] = {name: environment.get(name) for name in MADE_WITH}
    found |= {f"versions.{name}": version for name, version in (environment.get("versions") or {}).items()}
    contents = environment.get("content") or {}
    for group in ("model", "dataset"):
        found[f"{group}.content"] = (spec.get(group) or {}).get("content") or contents.get(group)
    for name, former in (environment.get("resumed_from") or {}).items():
        before = {f"versions.{key}": value for key, value in former.items()} if name == "versions" else {name: former}
        for key, value in before.items():
            if found.get(key) != value:
                found[key] = f"{value}, then {found.get(key)}"
    return {f"made_with.{name}": value for name, value in found.items() if value is not None}


def score_columns(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Columns of a record's scores. Perplexity is always exp(NLL); a stated perplexity gets a column of its own."""
    row: dict[str, Any] = {}
    rises = []
    for split, phases in scores.items():
        for phase, score in phases.items():
            # of a run of several tasks a split may be one task's: SPLIT/TASK
            for name in (*split.split("/", 1), phase, *(score.get("metrics") or {})):
                if not NAME.fullmatch(name):
                    raise ValueError(f"{name[:40]!r} is no name of a split or metric")
            prefix = f"{split}." if phase == "after" else f"{split}.{phase}."
            nll = math.nan if score.get("nll") is None else float(score["nll"])
            row |= {f"{prefix}nll": nll, f"{prefix}perplexity": math.nan if math.isnan(nll) else perplexity(nll)}
            row[f"{prefix}perplexity_stated"] = score.get("perplexity")
            row |= {f"{prefix}{key}": score.get(key) for key in ("tokens", "examples")}
            row |= {f"{prefix}{name}": value for name, value in (score.get("metrics") or {}).items()}
        if split.partition("/")[0] not in TASK_SPLITS and {"before", "after"} <= set(phases):
            row[f"forgetting.{split}"] = row[f"{split}.nll"] - row[f"{split}.before.nll"]
            rises.append(row[f"forgetting.{split}"])
    if rises:
        row["forgetting"] = sum(rises) / len(rises)
    return row


def _tidy(runs: pd.DataFrame) -> pd.DataFrame:
    if runs.empty:
        return pd.DataFrame(columns=["run_id", "study", "status", "folder", "source"])
    for column in ("method", "allocation", "placement", "model", "dataset", "rank", "seed", "source", "error"):
        if column not in runs:
            runs[column] = None
    for column in ("trainable_parameters", "total_parameters"):
        known = runs[column] if column in runs else pd.Series(float("nan"), index=runs.index)
        runs[column] = pd.to_numeric(known).where(lambda values: values > 0)
    share = 100 * runs["trainable_parameters"] / runs["total_parameters"]
    return runs.assign(trainable_percent=share).copy()
