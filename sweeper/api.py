"""The Python API: sweep, train, evaluate and load, in the words of the command line.

It composes with the project's `conf/` and hands arms and settings to `sweeper.study.launch.carry_out`, as the command
line does. Errors are the command line's: one line each, as `SweeperError`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import installation, record, run
from sweeper.errors import DataError, Problems, SpecError, SweeperError
from sweeper.spec import RunSpec, bare

if TYPE_CHECKING:
    import pandas as pd

    from sweeper.arms import Arm
    from sweeper.config import Composer
    from sweeper.rescoring.rescore import HarnessResult, Rescored


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(run.Run):
    """A run and what it left: `spec`, `folder`, `status`, `record` and the model."""

    def model(self, *, device: str = "auto") -> Any:
        """The trained model: a `PeftModel`, or the base model itself where the run trained its weights.

        Where tasks have blocks of their own it has an adapter for each, by the task's name (`model.set_adapter`).

        Raises:
            SweeperError: the run did not complete, or its adapter or base model cannot be loaded as it was.
        """
        from sweeper.adapters import peft_models
        from sweeper.rescoring import rescore

        every = rescore.find([self.folder])
        saved = every[0]
        rescore.check_models(every)
        if note := self.record.saved.get("peft"):
            merge = f"{installation.program('adapters')} merge"
            raise DataError(f"{self.folder}: PEFT does not give this run's logits ({note}); {merge} writes them")
        base = peft_models.load_base(saved.spec, device, saved.precision)
        tuned = peft_models.own_weights(self.folder)
        if tuned is not None:
            return peft_models.with_weights(base, tuned)
        peft_models.untie(base, set(saved.ranks))
        if len(every) == 1:
            return peft_models.adapted(base, {"default": saved.adapter})
        return peft_models.adapted(base, {one.folder.name: one.adapter for one in every})


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A folder of runs: those of a sweep that stand for its arms and those that failed, or all that are recorded."""

    folder: Path
    runs: tuple[Run, ...]

    @property
    def failed(self) -> tuple[Run, ...]:
        """The runs whose record says that they failed, and why (`run.record.error`)."""
        return tuple(one for one in self.runs if one.status == "failed")

    def table(self) -> "pd.DataFrame":
        """A row an arm: what tells it apart, costs, and every score with its interval; see docs/analysis.md.

        Raises:
            SweeperError: pandas is not installed, or no run has a score.
        """
        try:
            parts = [installation.analysis(name) for name in ("analyse", "arms", "load", "stats")]
        except ImportError as error:
            raise SpecError(f"study.table() needs {error.name}: {installation.install('analysis')}") from None
        ids = [one.run_id for one in self.runs if one.status is not None]
        if not ids:
            raise DataError(f"{self.folder}: no run has ended, so there is no table")
        analyse, arms, load, stats = parts
        found = load.load(*(self.folder / run_id for run_id in ids))
        table: pd.DataFrame = analyse.summarise(arms.arrange(found), draws=stats.Draws(2000, 0))
        return table.query("arm != 'base model'").reset_index(drop=True)


def sweep(*overrides: str | RunSpec, config_dir: str | Path | None = None, **fields: Any) -> Study:
    """Trains every combination of a grid, or what is missing of it, and prints its table: `train.py -m`.

    Args:
        overrides: as on the command line, `"placement=attn,ff"`. fields: the same as keywords, `study="mine"`. Or the
            runs themselves, as `RunSpec`s, and beside them only what changes no result: `study`, `sweep.dry_run`.
        config_dir: a folder of configurations of your own, before the project's, as --config-dir.

    Raises:
        SweeperError: a line for each thing that cannot be used, before anything is trained; or stopped by Ctrl-C
            (`Interrupted`). Runs that failed are in `failed`.
    """
    from sweeper.study import launch

    words, specs = _words(overrides, fields), _specs(overrides)
    with _composing(words, config_dir) as composer:
        arms, settings, search, workers = _command(composer, words)
        typed = _call("sweep", words, specs)
        found = launch.carry_out(_arms(specs, words) or arms, settings, search, workers=workers, typed=typed)
    return Study(folder=found.study, runs=tuple(map(_own, found.runs)))


def train(*overrides: str | RunSpec, config_dir: str | Path | None = None, **fields: Any) -> Run:
    """Trains one run, or finds it done: `train.py`. Arguments as of `sweep`.

    Raises:
        SweeperError: as `sweep`; also where the words are several runs, or the run failed (`RunsFailed`).
    """
    from sweeper import cli, config
    from sweeper.study import launch

    words, specs = _words(overrides, fields), _specs(overrides)
    with _composing(words, config_dir) as composer:
        several = cli.grid_without_multirun(words, composer, "sweeper.sweep(...)")
        if not several and cli.is_multirun(composer, words):
            several = ["hydra.mode=MULTIRUN: sweeper.sweep(...) trains several runs"]
        found = config.expand(words, composer)
        if len({spec.run_id for spec in specs}) > 1:
            several.append(f"{len(specs)} RunSpecs: sweeper.sweep(...) trains several runs")
        if several:
            raise Problems(several)
        arms = _arms(specs, words) or found.arms
        done = launch.carry_out(arms, found.settings, typed=_call("train", words, specs))
    if done.failures is not None:
        raise done.failures
    return _own(done.runs[0])


def evaluate(
    runs: Study | Run | str | Path, *overrides: str, config_dir: str | Path | None = None, **fields: Any
) -> "list[Rescored | HarnessResult]":
    """Scores saved runs on other tasks without training, as evaluate.py, and prints the tables.

    Args:
        runs: a study, a run, or the folder of either. overrides: `"dataset=human_eval,chain_sum"`, `evaluation.*`.

    Raises:
        SweeperError: as `sweep`.
    """
    from sweeper.rescoring import command

    words = _words(overrides, fields)
    several = runs.runs if isinstance(runs, Study) else (runs,)
    completed = [one for one in several if not isinstance(one, Run) or one.status == "completed"]
    folders = [one.folder if isinstance(one, Run) else Path(one) for one in completed]
    with _composing(words, config_dir) as composer:
        return command.score(folders, words, composer)


def load_study(folder: str | Path) -> Study:
    """The runs recorded in the folder of a study. Needs neither torch nor Hydra.

    Raises:
        SweeperError: there is none, or a record cannot be read.
    """
    path = Path(folder)
    found = [one.parent for one in sorted(path.glob(f"*/{record.RECORD}"))]
    if not found:
        raise DataError(f"{path}: no run in it; give the folder of a study, such as outputs/default")
    return Study(folder=path, runs=tuple(_own(_read(one)) for one in found))


def _read(folder: Path) -> run.Run:
    try:
        return run.Run.recorded(record.read_record(folder), folder.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / record.RECORD}: cannot be read ({error})") from None


def _own(one: run.Run) -> Run:
    return Run(run_id=one.run_id, spec=one.spec, folder=one.folder, arm=one.arm, search=one.search)


def _call(name: str, words: Sequence[str], specs: Sequence[RunSpec] = ()) -> str:
    return f"sweeper.{name}({', '.join([*(f'<RunSpec {spec.run_id}>' for spec in specs), *map(repr, words)])})"


def _specs(overrides: Sequence[str | RunSpec]) -> list[RunSpec]:
    return [bare(one) for one in overrides if isinstance(one, RunSpec)]


def _arms(specs: Sequence[RunSpec], words: Sequence[str]) -> "Sequence[Arm]":
    """The arms of runs that are given whole; none where none are.

    Raises:
        Problems: words beside them that would be part of a run.
    """
    from sweeper.arms import grouped
    from sweeper.config.grid import is_setting

    keys = [word.partition("=")[0].lstrip("+~") for word in words]
    strange = [
        f"{key}: a RunSpec has it already (dataclasses.replace gives another); beside RunSpecs go study, output_root, "
        "plugins, trainer.device, tracking and sweep.*"
        for key in keys
        if specs and not is_setting(key) and not key.startswith(("hydra.", "hydra/"))
    ]
    if strange:
        raise Problems(strange)
    return grouped(specs)


def _words(overrides: Sequence[str | RunSpec], fields: dict[str, Any]) -> list[str]:
    from sweeper import config

    given = {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}
    words = [one for one in overrides if isinstance(one, str)]
    return config.unquoted([*words, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items())])


@contextmanager
def _composing(words: Sequence[str], config_dir: str | Path | None) -> "Iterator[Composer]":
    """The configuration loader; errors of Hydra are ours, and a Hydra that was in use before is again after."""
    from hydra.core.global_hydra import GlobalHydra

    from sweeper import cli, config

    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as `sweeper.cli.run`
    former = GlobalHydra.instance().hydra
    folder = None if config_dir is None else str(config_dir)
    try:
        if folder is not None and not Path(folder).is_dir():
            raise SpecError(f"config_dir={folder}: no such folder")
        config.load_plugins(words)
        yield config.composer_of(folder)
    except SweeperError:
        raise
    except Exception as error:
        if (full := cli.no_room(error)) is not None:
            raise full from error
        if not cli.from_hydra(error):
            raise
        raise cli.explain(error, words, folder, multirun=True) from error
    finally:
        GlobalHydra.instance().hydra = former


def _command(composer: "Composer", words: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Arms, settings, search and workers of a sweep, read by the sweeper that Hydra would call."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    from sweeper import cli, config

    cfg = composer.loader.load_configuration(composer.config_name, list(words), RunMode.MULTIRUN)
    context = HydraContext(config_loader=composer.loader, callbacks=Callbacks(cfg))
    ours = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=context, task_function=cli.train)
    command: Any = getattr(ours, "command", None)
    if command is None:
        raise SpecError(f"hydra/sweeper: {type(ours).__name__} is for the command line; sweeper.sweep has its own")
    found: tuple[Any, Any, Any, Any] = command(list(config.as_typed(cfg.hydra.overrides.task)))
    return found
