"""`adapters.py route`: what is typed, what is checked before a model is loaded, and the tables that are printed."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import installation
from sweeper.adapters.library import asked as options_of
from sweeper.adapters.library import members
from sweeper.adapters.library.asked import FREE, RULES, Asked
from sweeper.errors import SpecError
from sweeper.reporting.console import make_console
from sweeper.reporting.table import print_table
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import DatasetSpec, EvaluationSpec

if TYPE_CHECKING:
    from sweeper.adapters.library.scoring import Scored

ABOUT = "a library of adapters trained apart: rules that route or combine them, scored on tasks"
_RULES = "\n".join(f"                     {name:<9}{about}" for name, about in RULES.items())
EPILOG = f"""\
FOLDER...          outputs/STUDY for all its runs, outputs/STUDY/RUN_ID, RUN/tasks/TASK
FIELD=A,B          members are those runs whose field has one of these values: placement=attn rank=8,16 seed=0
trained_on=TASKS   members are the runs that were trained on these tasks
dataset=TASKS      tasks to score on, also dataset.FIELD=... (default: the members' own)
rules=A,B          (default: {",".join(FREE)})
{_RULES}
top_k= temperature= general=RUN    of arrow: members at a token (3), of the softmax (1), runs whose mean is taken off
examples=          training examples of the task that lorahub and mole learn from (5)
budget= alpha=     of lorahub: candidates tried (40), weight of sum |w| (0.05)
steps= lr= balance= gates=         of mole: 100, 1e-3, weight of the balancing loss (0.5), layer or module
evaluation.generate=false          leave out metrics that need generated text"""
_OVERRIDES = ("dataset", "evaluation", "plugins")


@dataclass(frozen=True)
class Command:
    """A command that has been read: members, tasks, rules."""

    runs: Sequence[Saved]
    datasets: Sequence[DatasetSpec]
    evaluation: EvaluationSpec
    asked: Asked


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `route` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run", nargs="+", metavar="FOLDER|KEY=VALUE", help="members, and what is asked, as below")
    parser.add_argument("--out", type=Path, help="folder of the results (default: library/ in the first run's study)")
    parser.add_argument("--save", type=Path, help="lorahub's adapters, and how PEFT loads arrow's")
    parser.add_argument("--seed", type=int, default=0, help="of lorahub and mole: examples drawn, search, batches")


def read(words: Sequence[str], *, seed: int = 0) -> Command:
    """What is typed after `route`, checked as far as no model is needed.

    Raises:
        SweeperError: a word, a value, a folder or a member that cannot be used.
    """
    from sweeper import config
    from sweeper.adapters.library import scoring
    from sweeper.rescoring import command as evaluate

    paths = [Path(word) for word in words if "=" not in word]
    if not paths:
        raise SpecError("route: give the folders of the members, such as outputs/STUDY")
    overrides: list[str] = []
    typed: dict[str, str] = {}
    selection: dict[str, list[str]] = {}
    for word in (word for word in words if "=" in word):
        key, _, value = word.partition("=")
        if key.startswith("evaluation") and key != "evaluation.generate":
            raise SpecError(f"{key}: route scores the test split; of the evaluation it takes evaluation.generate alone")
        if key.lstrip("+~").split(".")[0] in _OVERRIDES:
            overrides.append(word)
        elif key in options_of.NAMES:
            typed[key] = value
        else:
            selection[key] = [part.strip() for part in value.strip("[]").split(",")]
    asked = options_of.parse(typed, seed=seed)
    runs = _choose(paths, selection, asked)
    members.check(runs)
    datasets, evaluation, _ = evaluate.composed(overrides, config.composer_of(), program="route")
    named = [task for dataset in datasets for task in dataset.parts or (dataset,)] or members.trained_on(runs)
    scoring.check(runs, named, asked, evaluation)
    return Command(runs, named, evaluation, asked)


def _choose(paths: Sequence[Path], selection: Mapping[str, Sequence[str]], asked: Asked) -> list[Saved]:
    try:
        return members.choose(paths, selection, but=[Path(path) for path in asked.general])
    except SpecError as error:
        if ": no such field" not in str(error):
            raise
        raise SpecError(f"{error} Or what is asked: {', '.join((*options_of.NAMES, *_OVERRIDES))}") from None


def route(options: argparse.Namespace) -> None:
    """Scores, prints and writes what `adapters.py route` was asked for.

    Raises:
        SweeperError: as `read`, or a model or dataset that cannot be used.
    """
    typed = read(options.run, seed=options.seed)
    from sweeper import methods
    from sweeper.adapters.library import saving, scoring
    from sweeper.adapters.library.bench import Bench
    from sweeper.adapters.library.experts import Folded
    from sweeper.device import device_for, precision_for

    runs, asked, console = typed.runs, typed.asked, make_console()
    place = options.out or saving.folder_of(runs)
    for line in rescore.changed(runs, certain=False):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{len(runs)} members: {', '.join(rescore.labels(runs)[run.folder] for run in runs)}", markup=False)
    device = device_for(options.device)
    base = methods.load_base(runs[0].spec, dtype=precision_for(device, runs[0].precision), device=device)
    with Bench(base, runs) as bench:
        for dataset in typed.datasets:
            found: list[Scored] = []
            for one, made in scoring.compare(bench, dataset, asked, generation=typed.evaluation.generate):
                found.append(one)
                if options.save is not None and one.rule == "lorahub" and isinstance(made.router, Folded):
                    saving.save_adapter(options.save / f"lorahub-{one.task}", bench, made.router, one.task, made.facts)
            show(found)
            name = saving.identity(runs, dataset, asked, typed.evaluation)
            written = saving.write(place, name, bench, asked, dataset, found)
            console.print(str(written), markup=False, soft_wrap=True)
    if options.save is not None and "arrow" in asked.rules:
        saving.arrow_readme(options.save / "arrow", runs, scoring.general_runs(asked), asked)
    if options.out is None:
        console.print(
            f"{installation.program('analyse')} {place.parent} has it as table library", markup=False, soft_wrap=True
        )


def show(found: "Sequence[Scored]") -> None:
    """Prints the table of one task."""
    console, names = make_console(), list(dict.fromkeys(name for one in found for name in one.score.metrics))
    cells = [
        [
            one.rule, f"{one.score.nll:.4f}", *(_number(one.score.metrics.get(name)) for name in names),
            "" if one.right is None else f"{one.right:.0%}", f"{one.cost:.2f}", _said(one.facts),
        ]
        for one in found
    ]  # fmt: skip
    console.print(f"{found[0].task}, test: {found[0].score.examples} examples", style="bold", markup=False)
    print_table(["rule", "NLL", *names, "right", "cost", ""], cells, console)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _said(facts: Mapping[str, Any]) -> str:
    if "weights" in facts:
        return " ".join(f"{weight:+.2f}" for weight in facts["weights"])  # in the members' order
    return str(facts.get("member", ""))
