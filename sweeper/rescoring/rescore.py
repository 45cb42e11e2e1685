"""Scores saved adapters on any tasks, without training: what `evaluate.py` does.

Adapters of one base model are scored together in a pack, with the base model as slot -1. Results go to
`RUN_FOLDER/evaluations/DATASET.json`, per-example rows to `DATASET-SPLIT.jsonl` beside it. Records are not changed.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import installation, naming, record, register, tasks
from sweeper.errors import DataError, Problems, SweeperError
from sweeper.identity import Former, changes, former_of
from sweeper.record import ADAPTER, COMBINED, EXPERTS, RECORD, ROUTER, ROUTERS, TASKS, WEIGHTS, Score
from sweeper.rescoring import lm_harness
from sweeper.spec import DatasetSpec, EvaluationSpec, Precision, RunSpec, Settings, alone, run_spec, to_mapping, unique
from sweeper.tasks import general_text

if TYPE_CHECKING:
    import torch

    from sweeper.lora.forms.peft import Loaded
    from sweeper.models import BaseModel
    from sweeper.models.architecture import Target
    from sweeper.training.pack import Pack

FOLDER = "evaluations"
MOST_EXPERTS, ROUTERS_KNOWN = 1024, ("token", "prompt")  # of a file that may come from somebody else
PACK_SIZE = 16  # adapters in one pack
TRUST = "SWEEPER_TRUST_REMOTE_CODE"  # a record may come from somebody else, and is not to decide that code is run


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A completed run, or a combination written by `adapters.py combine`: folder, spec and ranks by module.

    `gate` is how its experts open, where it has some. `precision` is the training precision; `former` is what the
    record says of its model and data.
    """

    folder: Path
    spec: RunSpec
    ranks: Mapping[str, int]
    combined: str = ""
    gate: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "auto"
    former: Former | None = None

    @property
    def adapter(self) -> Path:
        """The folder that PEFT reads."""
        return self.folder / ADAPTER


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescored:
    """One run on one split of one dataset: its scores, the base model's, and the majority baseline's metrics.

    `remarks` are caveats about this dataset with this model.
    """

    run: Saved
    dataset: DatasetSpec
    split: str
    score: Score
    base: Score
    majority: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()


def find(paths: Sequence[Path], *, gates: bool = False) -> list[Saved]:
    """The completed runs in run folders and study folders.

    Args:
        gates: whether runs count whose experts open by a learnt gate, which are no adapter that PEFT has.

    Raises:
        DataError: a path has no completed run with an adapter or weights, or a record asks for foreign code to be run.
    """
    found: dict[Path, Saved] = {}
    for path in paths:
        single = (path / RECORD).is_file() or (path / COMBINED).is_file()
        folders = [path] if single else sorted(p.parent for p in path.glob(f"*/{RECORD}"))
        runs = [run for folder in folders for run in _saved(folder)]
        if not gates and any(run.gate for run in runs):
            runs = [run for run in runs if not run.gate]
            if not runs:
                raise DataError(
                    f"{path}: its experts open by a learnt gate, so it has no adapter for PEFT; "
                    f"{installation.program('evaluate')} scores it, and sweeper.adapters.routed loads it"
                )
        if not runs:
            raise DataError(
                f"{path}: no completed run with an adapter in it; give outputs/STUDY/RUN_ID or outputs/STUDY"
            )
        found |= {run.folder: run for run in runs}
    for run in found.values():
        if run.spec.model.trust_remote_code and os.environ.get(TRUST) != "1":
            raise DataError(
                f"{run.folder}: its record asks for the code that {run.spec.model.location} brings to be run; "
                f"{TRUST}=1 says that you trust record and model"
            )
    return list(found.values())


def _saved(folder: Path) -> list[Saved]:
    """The adapter of a folder, or of a run whose tasks have blocks of their own, that of each."""
    tasks = sorted(path.parent for path in folder.glob(f"{TASKS}/*/{COMBINED}"))
    found = map(_read_combined, tasks) if tasks else [_read(folder)]
    return [run for run in found if run is not None]


def _read(folder: Path) -> Saved | None:
    if (folder / COMBINED).is_file():
        return _read_combined(folder)
    try:
        known = record.read_record(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    adapter, weights = folder / ADAPTER / "adapter_model.safetensors", folder / WEIGHTS / "model.safetensors"
    saved = adapter, weights, folder / EXPERTS / ROUTERS
    if known.status != "completed" or not any(file.is_file() for file in saved):
        return None
    try:
        return _of_record(folder, known)
    except (TypeError, ValueError, AttributeError, KeyError, OSError) as error:
        raise DataError(f"{folder}: its record cannot be read: {error}") from None


def _of_record(folder: Path, known: record.Record) -> Saved:
    ranks = {module.name: module.rank for module in known.modules}
    spec = run_spec(known.spec)
    were: dict[object, Precision] = {"float32": "float32", "bfloat16": "bfloat16"}
    precision = spec.trainer.precision
    if precision == "auto":  # this device may resolve it differently
        precision = were.get(str(known.environment.get("precision")), "auto")
    gate = _gate(folder / EXPERTS / ROUTER) if (folder / EXPERTS).is_dir() else {}
    return Saved(folder=folder, spec=spec, ranks=ranks, gate=gate, precision=precision, former=former_of(known))


def _gate(file: Path) -> dict[str, Any]:
    """How experts open; raises ValueError where the file does not say so."""
    kinds = {"experts": int, "router": str, "kept": int, "tied": bool, "balance": int | float}
    found = record.read_json(record.read_text(file))
    if not isinstance(found, dict) or any(not isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{file.name} does not say how its experts open")
    if not 2 <= found["experts"] <= MOST_EXPERTS or found["router"] not in ROUTERS_KNOWN:
        raise ValueError(f"{file.name} has {found['experts']} experts and a router of {found['router']}")
    return {name: found[name] for name in kinds}


def _read_combined(folder: Path) -> Saved | None:
    try:
        note = record.read_json(record.read_text(folder / COMBINED))
        spec, ranks, method = run_spec(note["spec"]), dict(note["ranks"]), str(note["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    task = folder.parent.name == TASKS
    said = f"{method} {note['from'][0]}" if task else f"{method} of {len(note['from'])}"
    return Saved(folder=folder, spec=spec, ranks=ranks, combined=said)


def labels(runs: Sequence[Saved]) -> dict[Path, str]:
    """Folder -> the run's label in tables: its id and the fields in which it differs from the others."""
    specs = {run.folder: to_mapping(run.spec) for run in runs if not run.combined}
    fields = naming.varying(list(specs.values()))
    return {run.folder: f"{run.folder.name} {run.combined or naming.label(specs[run.folder], fields)}" for run in runs}


def check(runs: Sequence[Saved], datasets: Sequence[DatasetSpec], evaluation: EvaluationSpec) -> None:
    """Raises `Problems` with one line per reason the evaluation cannot run, before any model is loaded.

    Args:
        datasets: as `rescore` takes them.
    """
    from sweeper import models

    read = ["dataset"] if not datasets else []
    problems = list(changed(runs, ["model", *read], certain=True))
    problems += dict.fromkeys(line for run in runs for line in register.missing(run.spec, ["method", *read]))
    wanted = unique(datasets or [run.spec.dataset for run in runs])
    acts: list[Callable[[], object]] = [partial(tasks.check, d, training=False) for d in wanted]
    acts += [partial(tasks.check_evaluation, d, evaluation, training=False) for d in wanted]
    if evaluation.name == lm_harness.NAME:
        for run in (run for run in runs if run.gate):
            problems.append(f"evaluation=lm_eval: {run.folder}: lm-eval cannot open its experts by their gate")
        acts.append(partial(lm_harness.check, evaluation))
    for model in unique(run.spec.model for run in runs):
        acts.append(partial(models.check, model))
        acts += [partial(models.check_length, model, dataset.max_length) for dataset in unique(datasets)]
    for act in acts:
        try:
            act()
        except SweeperError as error:
            problems.extend(error.lines)
    if problems:
        raise Problems(problems)


def changed(runs: Sequence[Saved], names: Sequence[str] = ("model",), *, certain: bool) -> Iterator[str]:
    """One line per model or dataset that has changed since training (`certain`) or may have changed (not `certain`)."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.former is not None:
            for line, sure in changes(run.spec, run.former, names):
                if sure == certain:
                    found.setdefault(line, []).append(run.folder.name)
    for line, folders in found.items():
        yield f"{folders[0]}{f' and {len(folders) - 1} more' if len(folders) > 1 else ''}: {line}"


def check_models(runs: Sequence[Saved]) -> None:
    """Raises `Problems` if a run's base model is not the one it was trained on."""
    if problems := list(changed(runs, certain=True)):
        raise Problems(problems)


def rescore(
    runs: Sequence[Saved], datasets: Sequence[DatasetSpec], evaluation: EvaluationSpec, settings: Settings
) -> Iterator[Rescored]:
    """Scores every run on every dataset and split of `evaluation`, and writes the results to the run's folder.

    Args:
        datasets: what every run is scored on; if empty, each run is scored on its training dataset.
    """
    from sweeper.cache import cache_folder

    for base, same in _by_base(runs, settings):
        wanted = unique(one for dataset in datasets or [run.spec.dataset for run in same] for one in _tasks(dataset))
        for part in _parts(same):
            with packed(base, part) as pack:
                for dataset in wanted:
                    chosen = [run for run in part if datasets or dataset in _tasks(run.spec.dataset)]
                    slots = [part.index(run) for run in chosen]
                    yield from _on_dataset(
                        pack, chosen, slots, dataset, evaluation, cache_folder() / "tokens", keep=settings.keep_texts
                    )


def _tasks(dataset: DatasetSpec) -> Sequence[DatasetSpec]:
    """A dataset's tasks, or itself."""
    return dataset.parts or (dataset,)


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessResult:
    """lm-eval's scores of one run and of its base model, by task and metric."""

    run: Saved
    scores: Mapping[str, Mapping[str, float]]
    base: Mapping[str, Mapping[str, float]]


def harness(
    runs: Sequence[Saved], datasets: Sequence[DatasetSpec], evaluation: EvaluationSpec, settings: Settings
) -> Iterator[HarnessResult]:
    """Like `rescore`, but with lm-eval on the test split; writes `RUN_FOLDER/evaluations/lm_eval.json`."""
    for base, same in _by_base(runs, settings):
        wanted = unique(datasets or [run.spec.dataset for run in same])
        asked: list[Any] = [lm_harness.as_task(d, tasks.load(d)["test"], base.tokenizer) for d in wanted]
        asked += evaluation.options.get("tasks") or []
        before = lm_harness.score(base.model, base.tokenizer, asked, evaluation.options)
        for run in same:
            found = lm_harness.score(adapted_model(base, run), base.tokenizer, asked, evaluation.options)
            _merge_harness_scores(run, before, found)
            yield HarnessResult(run=run, scores=found, base=before)


def _merge_harness_scores(
    run: Saved, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> None:
    """Merges these scores with those of other tasks from earlier commands."""
    path = run.folder / FOLDER / "lm_eval.json"
    try:
        known = json.loads(path.read_text())
        before, after = known["before"] | before, known["after"] | after
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no earlier scores, or unreadable ones
    record.write_json(path, {"run_id": run.folder.name, "before": before, "after": after})


def _by_base(runs: Sequence[Saved], settings: Settings) -> "Iterator[tuple[BaseModel, list[Saved]]]":
    """Each base model, loaded lazily, with its runs."""
    from sweeper import methods
    from sweeper.device import device_for, precision_for

    device = device_for(settings.device)
    for _, group in itertools.groupby(sorted(runs, key=_model_key), key=_model_key):
        same = list(group)
        dtype = precision_for(device, same[0].precision)
        yield methods.load_base(same[0].spec, dtype=dtype, device=device), same


def adapted_model(base: "BaseModel", run: Saved) -> Any:
    """A run's model for other libraries: stock PEFT on a copy of the base, or a copy with the run's own weights."""
    from sweeper.training.export import as_stock

    return as_stock(base, run.folder)


def _parts(runs: Sequence[Saved]) -> Iterator[list[Saved]]:
    """Batches of runs to score together: up to `PACK_SIZE` that can be packed, the others one by one."""
    from sweeper import methods

    packed = [run for run in runs if methods.packs(run.spec)]
    for start in range(0, len(packed), PACK_SIZE):
        yield packed[start : start + PACK_SIZE]
    yield from ([run] for run in runs if not methods.packs(run.spec))


def _model_key(run: Saved) -> str:
    from sweeper import methods

    return repr((run.spec.model, run.precision, methods.find(run.spec.method.name).quantised))


def _on_dataset(
    pack: "Pack", runs: Sequence[Saved], slots: Sequence[int], dataset: DatasetSpec, evaluation: EvaluationSpec,
    cache: Path, *, keep: bool,
) -> Iterator[Rescored]:  # fmt: skip
    from sweeper import models
    from sweeper.training import generate, texts
    from sweeper.training.evaluate import evaluate_examples, general_examples

    key = models.tokens_key(runs[0].spec.model)
    encoded = tasks.encode(dataset, pack.base.tokenizer, model_key=key, cache=cache)
    slow = generate.remark(pack.base, dataset, evaluation)
    remarks = (*tasks.remarks(dataset, pack.base.tokenizer, encoded), *([] if slow is None else [slow]))
    found: dict[str, list[Rescored]] = {}
    for split in evaluation.splits:
        general = split == general_text.SPLIT
        examples = general_examples(pack) if general else encoded[split].examples
        if not examples:
            continue
        began = time.perf_counter()
        base, *adapted = evaluate_examples(
            pack, [-1, *slots], examples, None if general else dataset, generation=evaluation.generate,
            exact_match=not general and "exact_match" in dataset.metrics,
        )  # fmt: skip
        share = (time.perf_counter() - began) / (len(slots) + 1)
        majority = {} if general else encoded[split].majority
        for run, result in zip(runs, adapted, strict=True):
            done = Rescored(
                run=run, dataset=dataset, split=split, score=result.score, base=base.score, majority=majority,
                seconds=share, remarks=remarks,
            )  # fmt: skip
            found.setdefault(str(run.folder), []).append(done)
            rows = [{"split": split, "moment": "before", **row} for row in base.rows]
            rows += [{"split": split, "moment": "after", **row} for row in result.rows]
            rows = texts.bounded(rows, keep=keep and keeps_texts(run.folder))
            record.write_lines(run.folder / FOLDER / f"{dataset.name}-{split}.jsonl", rows)
            yield done
    for results in found.values():
        _write(results)


def keeps_texts(folder: Path) -> bool:
    """Whether texts may stay beside an adapter: not where a run that it comes from was trained without keeping them.

    That is the run itself, the one whose task it is, or of a combination any run of its study.
    """
    own = next((place for place in (folder, folder.parent.parent) if (place / RECORD).is_file()), None)
    for place in [path.parent for path in folder.parent.glob(f"*/{RECORD}")] if own is None else [own]:
        try:
            data = record.read_record(place).data
        except (OSError, ValueError):
            continue
        if any("texts" in facts and facts["texts"] is None for facts in data.values()):
            return False
    return True


def _write(results: Sequence[Rescored]) -> None:
    run, dataset = results[0].run, results[0].dataset
    plain = {
        "run_id": run.folder.name,
        "dataset": to_mapping(dataset),
        "splits": {
            one.split: {
                "before": _plain(one.base), "after": _plain(one.score), "majority": dict(one.majority),
                "seconds": one.seconds,
            }
            for one in results
        },
    }  # fmt: skip
    record.write_json(run.folder / FOLDER / f"{dataset.name}.json", plain)


def _plain(score: Score) -> dict[str, Any]:
    return asdict(score) | {"metrics": dict(score.metrics), "perplexity": score.perplexity}


def packed(base: "BaseModel", runs: Sequence[Saved]) -> "Pack":
    """A pack whose slots hold the runs' adapters, in order."""

    from sweeper import methods
    from sweeper.lora.unpacked import UnpackedStore
    from sweeper.training.pack import open_pack
    from sweeper.training.pack_config import PackConfig

    targets = {target.name: target for target in base.targets}
    adapters = [
        methods.saved_adapter(alone(run.spec), {targets[name]: rank for name, rank in run.ranks.items()}, run.gate)
        for run in runs
    ]
    pack = open_pack(base, adapters, PackConfig(batch_size=1))
    if isinstance(pack.store, UnpackedStore):
        pack.store.read(runs[0].folder)
        return pack
    for slot, (run, adapter) in enumerate(zip(runs, adapters, strict=True)):
        parts = _parts_of_experts if run.gate else _parts_of_adapter
        pack.store.assign(slot, adapter, parts(run, {name: targets[name] for name in run.ranks}))
    return pack


def _parts_of_adapter(run: Saved, targets: "Mapping[str, Target]") -> "dict[str, tuple[torch.Tensor, ...]]":
    saved = read_adapter(run.folder)
    return {name: saved.parts(target) for name, target in targets.items()}


def _parts_of_experts(run: Saved, targets: "Mapping[str, Target]") -> "dict[str, tuple[torch.Tensor, ...]]":
    """A and B of all experts, one below another, and the routers."""
    import torch

    folder = run.folder / EXPERTS
    experts = [read_adapter(folder / str(number)) for number in range(run.gate["experts"])]
    routers = read_tensors(folder / ROUTERS)
    return {
        name: (*map(torch.cat, zip(*(one.parts(target) for one in experts), strict=True)), routers[name])
        for name, target in targets.items()
    }


def read_tensors(file: Path) -> "dict[str, torch.Tensor]":
    """A run's saved tensors, by name.

    Raises:
        DataError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def read_adapter(folder: Path) -> "Loaded":
    """A run's saved adapter.

    Raises:
        DataError: the file is damaged, or it is of no form that the engine has.
    """
    from sweeper.lora.forms import peft

    tensors = read_tensors(folder / ADAPTER / "adapter_model.safetensors")
    found = peft.loaded(read_config(folder), tensors)
    if found is None:
        raise DataError(f"{folder / ADAPTER}: an adapter that PEFT alone can load")
    return found


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, of which only the header is read.

    Raises:
        DataError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def read_config(folder: Path, *, adapter: str = ADAPTER) -> dict[str, Any]:
    """PEFT's configuration of a run's saved adapter; empty where there is none.

    Args:
        adapter: the folder of the adapter in that of the run.

    Raises:
        DataError: it is no JSON object.
    """
    file = folder / adapter / "adapter_config.json"
    if not file.is_file():
        return {}
    try:
        found = record.read_json(record.read_text(file))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return found
