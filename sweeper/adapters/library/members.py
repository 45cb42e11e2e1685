"""Which runs a library is made of: chosen by folder and field, all plain LoRA inside the layers of one base model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sweeper import methods, naming, record
from sweeper.adapters import combine
from sweeper.errors import SpecError, unknown
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import DatasetSpec, to_mapping

TRAINED_ON = "trained_on"
"""Selects members by the task that they were trained on, as `dataset=` says what is scored."""


def choose(
    paths: Sequence[Path], selection: Mapping[str, Sequence[str]], *, but: Sequence[Path] = ()
) -> list[Saved]:  # fmt: skip
    """The completed runs in some folders whose fields have one of the values that `selection` gives.

    Args:
        paths: run folders, study folders, `RUN/tasks/TASK`. selection: dotted field of a run's spec, or `trained_on`,
            -> values as they are typed. but: run folders that are no members.

    Raises:
        SweeperError: no run in a folder, a field that runs do not have, or fewer than two members left.
    """
    others = {path.resolve() for path in but}
    runs = [run for run in rescore.find(paths) if run.folder.resolve() not in others]
    fields = {run.folder: naming.flat(to_mapping(run.spec)) for run in runs}
    known = sorted({TRAINED_ON, *(key for own in fields.values() for key in own)})
    for key in selection:
        if key not in known:
            raise SpecError(unknown("field", key, known, given=f"{key}={','.join(selection[key])}"))
    kept = [run for run in runs if all(_fits(run, fields[run.folder], *one) for one in selection.items())]
    if len(kept) < 2:
        asked = " ".join(f"{key}={','.join(values)}" for key, values in selection.items())
        there = ", ".join(f"{name(run)} ({' + '.join(map(_name, tasks_of(run)))})" for run in runs[:6])
        raise SpecError(
            f"route: a library has two members or more, and {asked or 'what is given'} leaves {len(kept)}; there are "
            f"{there}{', ...' if len(runs) > 6 else ''}"
        )
    return kept


def check(runs: Sequence[Saved], *, word: str = "route") -> None:
    """Raises `SpecError` for runs that are not all plain LoRA on the linear modules of one base model.

    Args:
        word: the command, for the message.
    """
    for run in runs:
        if not (run.folder / record.ADAPTER / "adapter_config.json").is_file():
            raise SpecError(
                f"{word}: {run.folder.name} left no adapter (method={run.spec.method.name}): members are runs of LoRA, "
                "such as method=lora, rslora, lora_plus, pissa"
            )
    combine.check_alike(runs, word=word, does="be members of a library")
    quantised = [run for run in runs if methods.find(run.spec.method.name).quantised]
    if quantised and len(quantised) < len(runs):
        whole = next(run for run in runs if run not in quantised)
        raise SpecError(
            f"{word}: {name(quantised[0])} was trained on a quantised base (method={quantised[0].spec.method.name}), "
            f"{name(whole)} was not: select one kind with method="
        )
    for run in runs:
        ends = [name for name, layer in _layers(run).items() if layer is None]
        if ends:
            raise SpecError(
                f"{word}: {run.folder.name} adapts {ends[0]}, and a library routes modules inside the layers alone: "
                "placement=attn, ff, full"
            )


def tasks_of(run: Saved) -> Sequence[DatasetSpec]:
    """The tasks that a run was trained on; none of what `adapters.py combine` made, which names its first part's."""
    if run.combined and run.folder.parent.name != record.TASKS:
        return ()
    return run.spec.dataset.parts or (run.spec.dataset,)


def name(run: Saved) -> str:
    """RUN_ID, or RUN_ID/TASK of the part of a run that is a task's own."""
    part = run.folder.parent.name == record.TASKS
    return f"{run.folder.parent.parent.name}/{run.folder.name}" if part else run.folder.name


def own(runs: Sequence[Saved], task: DatasetSpec) -> list[int]:
    """The numbers of the members that were trained on a task, alone or among others: of its name, family and files."""
    return [place for place, run in enumerate(runs) if _key(task) in map(_key, tasks_of(run))]


def trained_on(runs: Sequence[Saved]) -> list[DatasetSpec]:
    """Every task that some member was trained on, once, in order; as the first such member has it."""
    found: dict[tuple[object, ...], DatasetSpec] = {}
    for task in (task for run in runs for task in tasks_of(run)):
        found.setdefault(_key(task), task)
    return list(found.values())


def _fits(run: Saved, fields: Mapping[str, object], key: str, values: Sequence[str]) -> bool:
    if key == TRAINED_ON:
        return any(_name(task) in values for task in tasks_of(run))
    return any(_same(fields.get(key), value) for value in values)


def _same(found: object, typed: str) -> bool:
    if isinstance(found, int | float) and not isinstance(found, bool):
        try:
            return float(typed) == found
        except ValueError:
            return False
    return str(found).casefold() == typed.casefold() if isinstance(found, bool | None) else str(found) == typed


def _key(task: DatasetSpec) -> tuple[object, ...]:
    return task.name, task.family, task.path


def _name(task: DatasetSpec) -> str:
    return task.name


def _layers(run: Saved) -> Mapping[str, int | None]:
    """Module name -> its layer, read off the name: a base model need not be loaded for that."""
    return {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in run.ranks}
