"""Scores of every rule on every task, beside the base model, the task's own member and the best single one."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sweeper import tasks
from sweeper.adapters.library import members
from sweeper.adapters.library.arrow import check_general
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, ByExample, Task
from sweeper.adapters.library.experts import Folded, Gated, Router
from sweeper.adapters.library.made import Made
from sweeper.adapters.library.rules import MAKERS
from sweeper.errors import Problems, SweeperError
from sweeper.record import Score
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import DatasetSpec, EvaluationSpec

BASE, OWN, BEST = "base", "own", "best_member"
"""What rules are compared with: no adapter; the member trained on the task; the best of all on validation."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One rule, or one of the things it is compared with, on the test split of one task.

    Attributes:
        rows: of each example. right: the share of rows (centroid) or of tokens and modules (arrow, mole) whose first
            member was trained on the task; None where none was, or where nothing is routed.
        seconds_per_token: of a forward pass without a head. cost: over that of the best single member's adapter.
        fit_seconds: what making the router took. facts: what was found, such as weights.
    """

    task: str
    rule: str
    score: Score
    rows: Sequence[Mapping[str, Any]]
    right: float | None
    seconds_per_token: float
    cost: float
    fit_seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


def check(runs: Sequence[Saved], datasets: Sequence[DatasetSpec], asked: Asked, evaluation: EvaluationSpec) -> None:
    """Raises `Problems`, a line for each reason that the rules cannot be scored, before a model is loaded."""
    problems: list[str] = []
    acts: list[Callable[[], object]] = [
        partial(members.check, runs), partial(asked.most, len(runs)),
        partial(rescore.check, runs, datasets, evaluation),
    ]  # fmt: skip
    if asked.general:
        general = general_runs(asked)
        acts += [
            lambda: members.check([runs[0], *general], word="route general="),
            partial(check_general, runs, general),
        ]
    if "centroid" in asked.rules:
        acts += [partial(tasks.check, run.spec.dataset) for run in runs if members.tasks_of(run)]
    for act in acts:
        try:
            act()
        except SweeperError as error:
            problems.extend(error.lines)
    known = members.trained_on(runs)
    if "centroid" in asked.rules or any(task in known for task in datasets):
        problems.extend(rescore.changed(runs, ["dataset"], certain=True))
    if not datasets:
        problems.append("route: no member says what it was trained on: give dataset=TASKS to score on")
    names = [task.name for task in datasets]
    problems += [
        f"dataset={name} is there twice: score one of the two" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    for task in datasets:
        if asked.learns and getattr(tasks.FAMILIES.get(task.family), "EVALUATION_ONLY", False):
            rules = ",".join(asked.learns)
            problems.append(f"rules={rules} learns from training examples, and dataset={task.name} has none")
    if "centroid" in asked.rules and not known:
        problems.append("rules=centroid: no member says what it was trained on")
    if problems:
        raise Problems(problems)


def general_runs(asked: Asked) -> list[Saved]:
    """The runs whose mean adapter arrow takes off its members.

    Raises:
        DataError: a folder has no completed run.
    """
    return rescore.find([Path(path) for path in asked.general]) if asked.general else []


def compare(bench: Bench, dataset: DatasetSpec, asked: Asked, *, generation: bool) -> Iterator[tuple[Scored, Made]]:
    """What every rule scores on a task, after what it is compared with.

    Args:
        generation: whether metrics that need generated text are computed.
    """
    task = bench.task(dataset)
    own = members.own(bench.members, dataset)
    order = _ranked(bench, task)
    best = bench.alone(order[0])
    references = {BASE: Made(None)}
    for name, k in ({BEST: order[0]} | ({OWN: next(k for k in order if k in own)} if own else {})).items():
        references[name] = Made(bench.alone(k), {"member": members.name(bench.members[k])})
    for name in [*references, *asked.rules]:
        began = time.perf_counter()
        made = references[name] if name in references else MAKERS[name](bench, asked, task)
        yield _scored(bench, task, name, made, own, best, time.perf_counter() - began, generation), made


def _ranked(bench: Bench, task: Task) -> list[int]:
    """The members, the one with the least NLL on the validation split first."""
    examples = task.splits["validation"].examples
    if not examples:  # of a task for evaluation only; the first member then counts as the best
        return list(range(len(bench.members)))
    nlls = [bench.nll(bench.alone(k), examples) for k in range(len(bench.members))]
    return sorted(range(len(nlls)), key=lambda k: (math.isnan(nlls[k]), nlls[k]))


def _scored(
    bench: Bench, task: Task, name: str, made: Made, own: Sequence[int], best: Folded, fit_seconds: float,
    generation: bool,
) -> Scored:  # fmt: skip
    examples = task.splits["test"].examples
    found = bench.evaluate(made.router, examples, task.dataset, generation=generation)
    seconds, unit = bench.seconds(made.router, best, examples)
    return Scored(
        task=task.dataset.name, rule=name, score=found.score, rows=found.rows,
        right=_right(bench, made.router, task, own), seconds_per_token=seconds, cost=seconds / unit,
        fit_seconds=fit_seconds, facts=made.facts,
    )  # fmt: skip


def _right(bench: Bench, router: Router | ByExample | None, task: Task, own: Sequence[int]) -> float | None:
    if not own:
        return None
    if isinstance(router, ByExample):
        return sum(k in own for k in router.chosen.values()) / len(router.chosen)
    if isinstance(router, Gated):
        shares = bench.top(router, task.splits["test"].examples)
        return None if shares is None else float(shares[list(own)].sum())
    return None
