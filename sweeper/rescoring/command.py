"""The command line of `evaluate.py`: run folders, and Hydra overrides of dataset and evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from sweeper import config, identity, installation
from sweeper.errors import SpecError
from sweeper.reporting.console import make_console
from sweeper.reporting.table import print_table
from sweeper.rescoring import lm_harness, rescore
from sweeper.rescoring.rescore import HarnessResult, Rescored
from sweeper.spec import DatasetSpec, EvaluationSpec, Settings, unique
from sweeper.tasks.metrics import suite_score

USAGE = """\
{program} FOLDER... [dataset=NAME,...] [dataset.FIELD=...] [evaluation.FIELD=...] [trainer.device=...]

  FOLDER   outputs/STUDY for all its runs, outputs/STUDY/RUN_ID, or a folder that combine wrote
  dataset  tasks to score on (default: each run's training dataset)
  plugins  files and modules with the code of runs' own methods and tasks (docs/extending.md)
  sweep.keep_texts=false leaves generated text out; runs that were trained so stay so
  evaluation.splits=[test] and evaluation.generate=true are defaults; evaluation=lm_eval scores with lm-eval

Results go to FOLDER/RUN_ID/evaluations/ and are printed as a table; records and adapters are not changed."""
DEFAULTS = {"evaluation.splits": "[test]", "evaluation.generate": "true"}
OVERRIDES = ("dataset", "evaluation", "trainer.device", "sweep.keep_texts")


def usage() -> str:
    return USAGE.format(program=installation.program("evaluate"))


def main(arguments: Sequence[str]) -> None:
    """Scores and prints.

    Raises:
        SweeperError: a folder has no runs or an override is invalid; nothing has been scored.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return
    folders = [Path(argument) for argument in arguments if "=" not in argument]
    score(folders, [argument for argument in arguments if "=" in argument], config.composer_of())


def score(
    folders: Sequence[Path], overrides: Sequence[str], composer: config.Composer
) -> list[Rescored | HarnessResult]:
    """Scores the saved runs in some folders, prints their tables and returns what is in them.

    Raises:
        SweeperError: as `main`.
    """
    datasets, evaluation, settings = composed(overrides, composer)
    if not folders:
        raise SpecError(f"no folder of runs given. Usage: {usage().splitlines()[0]}")
    runs = rescore.find(folders, gates=True)
    rescore.check(runs, datasets, evaluation)
    console = make_console()
    for line in rescore.changed(runs, ["model", *(["dataset"] if not datasets else [])], certain=False):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{len(runs)} saved run{'s' if len(runs) > 1 else ''} to score", markup=False)
    if evaluation.name == lm_harness.NAME:
        harnessed = list(rescore.harness(runs, datasets, evaluation, settings))
        show_harness(harnessed, console)
        return [*harnessed]
    rescored = list(rescore.rescore(runs, datasets, evaluation, settings))
    show(rescored, console)
    return [*rescored]


def composed(
    overrides: Sequence[str], composer: config.Composer, *, program: str = "evaluate"
) -> tuple[list[DatasetSpec], EvaluationSpec, Settings]:
    """The datasets, if any are named, and the evaluation that overrides ask of a `program`.

    Raises:
        SpecError: an override of anything else, or one that cannot be used.
    """
    keys = [override.split("=")[0].lstrip("+~") for override in overrides]
    for key in keys:
        if key != "plugins" and not any(key == name or key.startswith(f"{name}.") for name in OVERRIDES):
            raise SpecError(f"{key}: {program} takes overrides of {', '.join(OVERRIDES)} only; a run keeps the rest")
    if "dataset" not in keys and any(key.startswith("dataset.") for key in keys):
        raise SpecError(
            "dataset.FIELD=... needs dataset=NAME: without it each run is scored on its own dataset as it was"
        )
    lines = [*(f"{key}={value}" for key, value in DEFAULTS.items() if key not in keys), *overrides]
    composition = config.expand(lines, composer)
    specs = composition.specs
    datasets = [identity.known(one) for one in unique(s.dataset for s in specs)] if "dataset" in keys else []
    return datasets, specs[0].evaluation, composition.settings


def show(found: Sequence[Rescored], console: Console) -> None:
    """Prints a table per dataset and split, including the majority baseline and the base model, and the suite score."""
    labels = rescore.labels([one.run for one in found])
    for dataset, split in dict.fromkeys((one.dataset.name, one.split) for one in found):
        part = [one for one in found if (one.dataset.name, one.split) == (dataset, split)]
        names = list(dict.fromkeys(name for one in part for name in one.score.metrics))
        cells = [["majority", "", *(_number(part[0].majority.get(name)) for name in names)]] if part[0].majority else []
        bases = {one.run.spec.model.name: one.base for one in part}
        for model, base in bases.items():
            cells.append([f"base {model}", f"{base.nll:.4f}", *(_number(base.metrics.get(name)) for name in names)])
        for one in part:
            metrics = (_number(one.score.metrics.get(name)) for name in names)
            cells.append([labels[one.run.folder], f"{one.score.nll:.4f}", *metrics])
        console.print(f"{dataset}, {split}: {part[0].score.examples} examples", style="bold", markup=False)
        print_table(["run", "NLL", *names], cells, console)
    about = {
        f"dataset={one.dataset.name} on model={one.run.spec.model.name}: {line}": None
        for one in found
        for line in one.remarks
    }
    for line in [*about, *_suite(found, labels)]:
        console.print(line, markup=False, soft_wrap=True)


def show_harness(found: Sequence[HarnessResult], console: Console) -> None:
    """Prints a table per lm-eval task, including the base model."""
    labels = rescore.labels([one.run for one in found])
    for task in dict.fromkeys(name for one in found for name in one.scores):
        names = list(dict.fromkeys(name for one in found for name in one.scores[task]))
        bases = {one.run.spec.model.name: one.base[task] for one in found}
        cells = [[f"base {model}", *(_number(base.get(name)) for name in names)] for model, base in bases.items()]
        cells += [[labels[one.run.folder], *(_number(one.scores[task].get(name)) for name in names)] for one in found]
        console.print(f"{task}, by lm-eval", style="bold", markup=False)
        print_table(["run", *names], cells, console)


def _suite(found: Sequence[Rescored], labels: Mapping[Path, str]) -> list[str]:
    """One line per run scored on at least two datasets: `suite_score` over each dataset's first metric."""
    lines = []
    for folder in dict.fromkeys(one.run.folder for one in found):
        after: dict[str, float] = {}
        before: dict[str, float] = {}
        own = [one for one in found if one.run.folder == folder and one.split == "test"]
        for one in own:
            name = next((name for name in one.dataset.metrics if name in one.score.metrics), None)
            if name is not None:
                after[one.dataset.name], before[one.dataset.name] = one.score.metrics[name], one.base.metrics[name]
        if len(after) > 1:
            score = suite_score(after, before)
            lines.append(f"suite of {', '.join(after)}: {labels[folder]} {score:+.3f} (0: base model, 1: perfect)")
    return lines


def _number(value: float | Mapping[str, float] | None) -> str:
    return "" if not isinstance(value, float | int) else f"{value:.3f}"
