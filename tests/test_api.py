"""The Python API: the words, runs and errors of the command line; light to import; its documentation runs."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sweeper
from sweeper import record
from sweeper.errors import DataError, Interrupted, RunsFailed
from sweeper.record import Record
from sweeper.spec import RunSpec
from sweeper.study import launch, scheduler
from tests.conftest import FakeEngine

SMOKE = ("experiment=smoke", "trainer.device=cpu")


def python(root: Path, cwd: Path, code: str) -> str:
    """What code prints in a fresh interpreter, from another folder than the project's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "sweeper/plugins")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(page: Path) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def trains(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """The engine that trains nothing, in place of the real one, in an empty folder."""
    monkeypatch.setattr(scheduler, "_engine", lambda: engine)
    monkeypatch.chdir(tmp_path)
    return engine


def test_the_import_is_light(root: Path, tmp_path: Path) -> None:
    code = (
        "import sweeper, sys; print(sorted({'torch', 'hydra', 'omegaconf', 'pandas', 'dacite'} & sys.modules.keys()))"
    )
    assert python(root, tmp_path, code).strip() == "[]"
    assert "sweep" in python(root, tmp_path, "import sweeper; print(sweeper.sweep.__name__)")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sweeper.nothing


def test_a_study_is_loaded_without_torch_and_hydra(
    root: Path, tmp_path: Path, make_spec: Callable[..., RunSpec], make_record: Callable[..., Record]
) -> None:
    for rank in (4, 8):
        found = make_record(make_spec(rank=rank))
        record.write_record(tmp_path / found.run_id, found)
    code = (
        "import sys\n"
        "for name in ('torch', 'hydra', 'omegaconf', 'transformers', 'peft'): sys.modules[name] = None\n"
        "import sweeper\n"
        "study = sweeper.load_study('.')\n"
        "print(sorted(run.spec.rank for run in study.runs), [run.record.status for run in study.runs])\n"
        "print(sorted(study.table()['rank']), study.failed)"
    )
    assert python(root, tmp_path, code).splitlines() == ["[4, 8] ['completed', 'completed']", "[4.0, 8.0] ()"]


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run in it; give the folder of a study"):
        sweeper.load_study(tmp_path)
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc/record.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(DataError, match="no record of schema 1"):
        sweeper.load_study(tmp_path)


def test_a_sweep_has_the_runs_of_the_command_line(trains: FakeEngine, tmp_path: Path) -> None:
    study = sweeper.sweep(*SMOKE, "placement=attn,ff", rank="4,8", study="mine")
    assert [(run.spec.placement.name, run.spec.rank) for run in study.runs] == [
        ("attn", 4), ("attn", 8), ("ff", 4), ("ff", 8),
    ]  # fmt: skip
    assert study.runs[0].run_id == sweeper.train(*SMOKE, "placement=attn", "rank=4", study="mine").run_id
    assert len(trains.trained) == 4
    assert {run.folder.parent.absolute() for run in study.runs} == {tmp_path / "outputs/mine"}
    assert len(study.table()) == 4
    assert {run.run_id for run in sweeper.load_study("outputs/mine").runs} == {run.run_id for run in study.runs}


def test_run_specs_train_as_they_are_given_seeds_and_all(trains: FakeEngine) -> None:
    planned = sweeper.sweep(*SMOKE, "sweep.dry_run=true").runs[0].spec
    specs = [dataclasses.replace(planned, seed=seed) for seed in range(4)]
    study = sweeper.sweep(*specs, study="mine")
    assert [run.spec.seed for run in study.runs] == [0, 1, 2, 3]
    assert set(trains.trained) == {run.run_id for run in study.runs}
    assert len(trains.trained) == 4
    assert sweeper.train(specs[3], study="mine").run_id == study.runs[3].run_id
    assert len(trains.trained) == 4
    (first, *_) = record.read_commands(study.folder)
    assert first["typed"].startswith("sweeper.sweep(<RunSpec ")
    again = sweeper.sweep(*(run.spec for run in sweeper.load_study(study.folder).runs), study="mine")
    assert {run.run_id for run in again.runs} == set(trains.trained)
    assert len(trains.trained) == 4


def test_beside_run_specs_go_settings_alone(trains: FakeEngine) -> None:
    spec = sweeper.sweep(*SMOKE, "sweep.dry_run=true").runs[0].spec
    with pytest.raises(sweeper.SweeperError, match="rank: a RunSpec has it already"):
        sweeper.sweep(spec, rank=8)
    with pytest.raises(sweeper.SweeperError, match=r"2 RunSpecs: sweeper.sweep\(...\) trains several runs"):
        sweeper.train(spec, dataclasses.replace(spec, seed=1))
    assert not trains.trained


def test_a_tuned_arm_is_its_best_trial(trains: FakeEngine) -> None:
    tuned = (*SMOKE, "rank=4,8", "optim.lr=tag(log,interval(1e-4,1e-2))", "hydra.sweeper.n_trials=2")
    study = sweeper.sweep(*tuned, study="tuned")
    assert [run.spec.rank for run in study.runs] == [4, 8]
    assert (len(trains.trained), len(sweeper.load_study(study.folder).runs), len(study.table())) == (4, 4, 2)


def test_a_dry_run_trains_nothing(trains: FakeEngine, tmp_path: Path) -> None:
    study = sweeper.sweep(*SMOKE, "rank=4,8", **{"sweep.dry_run": True})
    assert [run.status for run in study.runs] == [None, None]
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no record; the run has not ended"):
        _ = study.runs[0].record
    with pytest.raises(DataError, match="no run has ended"):
        study.table()


def test_failed_runs_are_in_the_study_and_an_error_of_one_run(trains: FakeEngine) -> None:
    planned = sweeper.sweep(*SMOKE, "rank=4,8", "sweep.dry_run=true", study="mine")
    trains.fail = {planned.runs[1].run_id}
    study = sweeper.sweep(*SMOKE, "rank=4,8", study="mine")
    assert [run.spec.rank for run in study.failed] == [8]
    assert study.failed[0].record.error == {"class": "OutOfMemoryError", "message": "no room"}
    assert list(study.table()["rank"]) == [4]
    with pytest.raises(RunsFailed, match="OutOfMemoryError: no room"):
        sweeper.train(*SMOKE, "rank=8", study="mine")


def test_an_interrupt_is_ctrl_c(trains: FakeEngine) -> None:
    import signal

    trains.stop_after, trains.interrupt = 2, lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped with 0 of 2 runs done; the same command trains the other 2"):
        sweeper.sweep(*SMOKE, "rank=4,8")
    trains.stop_after = None
    assert len(sweeper.sweep(*SMOKE, "rank=4,8").runs) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["placement=atn"], "placement=atn: no such placement. Choose from all, attn, "),
        (["rnk=8"], "rnk: no such field. Choose from"),
        (["rank=0"], "rank must be at least 1, got 0"),
        (["hydra.sweeper.n_trial=3"], "Did you mean n_trials?"),
        (["hydra.sweeper.n_trials=x", "optim.lr=interval(1,2)"], "could not be converted to Integer"),
        (["hydra/launcher=nope"], "hydra/launcher=nope: no such hydra/launcher"),
        (["hydra/sweeper=basic"], "hydra/sweeper: BasicSweeper is for the command line"),
        (["plugins=nowhere"], "plugins=nowhere: cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
    ],
)
def test_mistakes_are_the_lines_of_the_command_line(words: list[str], line: str, trains: FakeEngine) -> None:
    with pytest.raises(sweeper.SweeperError) as caught:
        sweeper.sweep(*words)
    (told,) = caught.value.lines
    assert line in told
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rank=4,8"], "rank=4,8: several values need sweeper.sweep(...)"),
        (["optim.lr=interval(1,2)"], "a range is tuned by a sweep, which needs sweeper.sweep(...)"),
        (["search=lr"], "sweeper.sweep(...) trains several runs"),
    ],
)
def test_one_run_is_not_several(words: list[str], line: str, trains: FakeEngine) -> None:
    with pytest.raises(sweeper.SweeperError) as caught:
        sweeper.train(*words)
    assert line in str(caught.value)


def test_configurations_of_ones_own_come_first(trains: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "own/optim").mkdir(parents=True)
    (tmp_path / "own/optim/fast.yaml").write_text("lr: 0.5\n")
    (run,) = sweeper.sweep(*SMOKE, "optim=fast", "sweep.dry_run=true", config_dir=tmp_path / "own").runs
    assert run.spec.optim.lr == 0.5
    with pytest.raises(sweeper.SweeperError, match="no such folder"):
        sweeper.sweep(*SMOKE, config_dir="nowhere")


def test_a_hydra_in_use_stays_in_use(trains: FakeEngine) -> None:
    from hydra import compose, initialize_config_dir

    from sweeper.config.composer import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweeper.sweep(*SMOKE, "sweep.dry_run=true")
        assert compose("config", ["rank=3"]).rank == 3


def test_command_line_and_api_meet_in_one_function(trains: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []
    carry_out = launch.carry_out
    monkeypatch.setattr(launch, "carry_out", lambda arms, *more, **kw: met.append(arms) or carry_out(arms, *more, **kw))
    from hydra._internal.hydra import Hydra

    from sweeper import cli, config

    sweeper.sweep(*SMOKE, "rank=4,8")
    config.composer_of()
    loader = config.composer_of().loader
    hydra = Hydra(task_name="train", config_loader=loader)
    hydra.multirun("config", cli.train, [*SMOKE, "rank=4,8"], with_log_configuration=False)
    assert [[arm.key for arm in arms] for arms in met] == [[arm.key for arm in met[0]]] * 2


@pytest.mark.slow
def test_the_page_runs(root: Path, tmp_path: Path) -> None:
    code = "\n".join(blocks(root / "docs/api.md"))
    told = python(root, tmp_path, f"{code}\nprint(type(model).__name__, len(study.runs), len(found))")
    assert told.splitlines()[-1] == "PeftModelForCausalLM 4 4"
    assert "placement=atn: no such placement. Choose from all, attn, " in told


def test_a_wheel_has_the_configurations(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    from zipfile import ZipFile

    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = ZipFile(wheel).namelist()
    assert Path(wheel).name.startswith("lora_atlas-")
    wanted = {
        "conf/config.yaml",
        "conf/placement/attn.yaml",
        "analysis/__main__.py",
        "analysis/report.css",
        "fetched.txt",
    }
    assert {f"sweeper/{name}" for name in wanted} | {"hydra_plugins/lora_sweeper/own_conf.py"} <= set(names)
    assert re.fullmatch(r"[0-9a-f]{12}\+?", ZipFile(wheel).read("sweeper/.commit").decode())
    tops = {name.split("/")[0] for name in names}  # nothing of a name that another package may have
    assert {name for name in tops if not name.endswith(".dist-info")} == {"sweeper", "hydra_plugins"}
