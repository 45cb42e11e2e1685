"""Runs of several tasks, seen task by task: each is a row of its task's dataset, beside the runs of that task alone.

So every table, test and figure of a dataset compares tasks trained together with the same task trained alone, on the
same examples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

PARTS = "_parts"  # the tasks of a row not yet split up, as the spec has them
FIELD = "together"  # what a task was trained with
ALONE = "alone"
THEN, AND = " > ", " + "  # between the tasks of a sequence and of a mixture
IN_TURN = " in turn"  # ends the tasks of a sequence whose order the seed draws, which is no part of an arm
ORDER = "order_of_tasks"  # column: of a run of a sequence, its tasks with THEN between them
OPTIONS = (
    "sampling",
    "temperature",
    "weights",
    "surgery",
    "replay",
    "unseen",
)  # of the dataset that is made of several
CONTENT = "made_with.dataset.content"
CHOSEN = f"{FIELD}."  # begins the columns of scores over all tasks, which trials are chosen by

ROUTED, RIGHT = "routed.", "right"  # columns ROUTED + TASK.METRIC, and the share that is taken for its own task
GATE, TOLD_APART, BALANCE = "gate.", "experts.told_apart", "experts.balance"  # columns GATE + TASK.EXPERT, and two
COMPARED = "conflict.steps"  # column of a run: at how many steps its tasks' gradients were compared

Row = dict[str, Any]
Flat = Callable[[Mapping[str, Any]], Row]


def by_task(rows: Iterable[Row], flat: Flat) -> list[Row]:
    """Rows of runs of several tasks as a row a task; where there are any, `together` of the others is `alone`."""
    rows = list(rows)
    if not any(row.get(PARTS) for row in rows):
        return [{key: value for key, value in row.items() if key != PARTS} for row in rows]
    return [one for row in rows for one in (_split(row, flat) if row.get(PARTS) else [_alone(row)])]


def fields(rows: Iterable[Row]) -> list[str]:
    """The fields that runs of several tasks add to a study's."""
    found = dict.fromkeys(key for row in rows for key in row if key == FIELD or key.startswith(f"{FIELD}.option."))
    return list(found)


def split_of(run_id: str, split: str) -> str:
    """What a split of a row is called in the run's own files."""
    _, slash, task = run_id.partition("/")
    return f"{split}/{task}" if slash else split


def _alone(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != PARTS} | {FIELD: ALONE}


def _split(row: Row, flat: Flat) -> list[Row]:
    parts: Sequence[Mapping[str, Any]] = row[PARTS]
    sequence = row.get("dataset.family") == "sequence"
    options = {
        f"{FIELD}.option.{name}": row[f"dataset.options.{name}"]
        for name in OPTIONS
        if row.get(f"dataset.options.{name}") is not None
    }
    common = {
        key: value
        for key, value in row.items()
        if key not in (PARTS, "dataset") and not key.startswith("dataset.") and "/" not in key
    }
    splits = {key.partition("/")[0].removeprefix("data.") for key in row if "/" in key and "." in key}
    over_all = {}
    for split in splits:
        for key in [key for key in common if key.startswith((f"{split}.", f"data.{split}."))]:
            over_all[f"{CHOSEN}{key}"] = common.pop(key)
    names = [part["name"] for part in parts]
    told = str(row.get(CONTENT)).split("; ")
    contents = told if len(told) == len(parts) else [None] * len(parts)
    return [
        common | over_all | options | flat({"dataset": {**part, "content": None}}) | _own(row, part["name"])
        | {
            "run_id": f"{row['run_id']}/{part['name']}", **_tasks(names, row, sequence=sequence),
            CONTENT: part.get("content") or content,
        }
        for part, content in zip(parts, contents, strict=True)
    ]  # fmt: skip


def _tasks(names: Sequence[str], row: Row, *, sequence: bool) -> Row:
    """What the tasks of a run are called."""
    if not sequence:
        return {FIELD: AND.join(names)}
    order = THEN.join(names)
    drawn = row.get("dataset.options.order") == "seed"
    return {FIELD: ", ".join(sorted(names)) + IN_TURN if drawn else order, ORDER: order}


def _own(row: Row, task: str) -> Row:
    """A task's scores and sizes, under the names that those of a run of it alone have."""
    found = {}
    for key, value in row.items():
        split, slash, rest = key.partition(f"/{task}.")
        if slash and "/" not in split:
            found[f"{split}.{rest}"] = value
    return found


def expert_columns(sharing: Mapping[str, Any]) -> dict[str, float]:
    """Columns of a run from its record's `sharing`; none without experts."""
    if not sharing.get("usage"):
        return {}
    gates = {f"{GATE}{task}.{k}": gate for task, own in sharing["usage"].items() for k, gate in enumerate(own)}
    return gates | {TOLD_APART: sharing.get("told_apart"), BALANCE: sharing.get("balance")}


def routed_columns(routing: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of what a record says of routing."""
    row: dict[str, Any] = {"router": routing["router"]} if routing else {}
    for task, counts in (routing.get("confusion") or {}).items():
        row[f"{ROUTED}{task}.{RIGHT}"] = counts.get(task, 0) / sum(counts.values())
    for task, scores in (routing.get("scores") or {}).items():
        row |= {f"{ROUTED}{task}.{metric}": value for metric, value in scores.items()}
    return row
