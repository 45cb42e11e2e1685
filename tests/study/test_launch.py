"""A whole command with a stand-in for the engine: train, repeat, fail, stop."""

import csv
import dataclasses
import errno
import json
import os
import pickle
import shlex
import signal
from collections.abc import Callable
from typing import Any

import pytest

from sweeper import config, lost, record
from sweeper.arms import grouped, single
from sweeper.errors import Interrupted, RunsFailed, SpecError
from sweeper.lost import ContextLost
from sweeper.record import Record
from sweeper.spec import RunSpec, Settings
from sweeper.study import launch, scheduler
from sweeper.training.events import RunFinished, Step


@pytest.fixture
def specs(composer: Any) -> tuple[RunSpec, ...]:
    return config.expand(["experiment=smoke", "placement=attn,ff", "rank=4,8"], composer).specs


def test_every_run_is_trained_once_and_then_never_again(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = launch.train(grouped(specs), study, engine=engine)
    assert engine.trained == [spec.run_id for spec in specs]
    assert list(first) == engine.trained
    out = capsys.readouterr().out
    assert "4 runs to train" in out
    table = out[out.index("placement ") :]
    again = launch.train(grouped(specs), study, engine=engine)
    assert len(engine.trained) == 4
    assert again == first
    out = capsys.readouterr().out
    assert out.startswith("4 of 4 runs are done already; nothing to train\n")
    assert table in out


def test_others_can_read_what_a_study_leaves(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    former = os.umask(0o027)
    try:
        launch.train(grouped(specs[:1]), study, engine=engine)
    finally:
        os.umask(former)
    left = [path for path in study.folder.rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"record.json", "summary.csv", "summary.md", "commands.jsonl"}
    assert {path.stat().st_mode & 0o777 for path in left} == {0o640}


def test_a_study_notes_the_commands_that_trained_it(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "-m", "rank=4,8", "study=a b"])
    launch.train(grouped(specs[:2]), study, engine=engine)
    launch.carry_out(grouped(specs[:3]), study, engine=engine, typed="sweeper.sweep('rank=4')")
    launch.train(grouped(specs[:3]), study, engine=engine)  # trains nothing
    found = [one["typed"] for one in record.read_commands(study.folder)]
    assert found == ["python train.py -m rank=4,8 'study=a b'", "sweeper.sweep('rank=4')"]


def test_more_runs_extend_a_study(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.train(grouped(specs[:3]), study, engine=engine)
    launch.train(grouped(specs), study, engine=engine)
    assert engine.trained == [spec.run_id for spec in specs]
    assert "3 of 4 runs are done already; training the other 1" in capsys.readouterr().out


def test_the_saved_table_is_that_of_the_study(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    launch.train(grouped(specs[:3]), study, engine=engine)
    launch.train(grouped(specs[3:]), study, engine=engine)
    with (study.folder / "summary.csv").open() as file:
        ids = {row["run_id"] for row in csv.DictReader(file)} - {""}
    assert ids == {spec.run_id for spec in specs}


def test_a_failed_run_stops_no_other_and_the_command_says_so(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any
) -> None:
    engine.fail = {specs[1].run_id}
    with pytest.raises(RunsFailed, match=r"(?s)1 of 4 runs failed; the same command.*OutOfMemoryError: no room"):
        launch.train(grouped(specs), study, engine=engine)
    assert len(engine.trained) == 4
    engine.fail = set()
    launch.train(grouped(specs), study, engine=engine)
    assert engine.trained[4:] == [specs[1].run_id]


def test_one_run_returns_its_objective(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    assert launch.train_one(specs[0], study, engine=engine) == 0.25
    assert launch.train_one(specs[0], study, engine=engine) == 0.25
    assert engine.trained == [specs[0].run_id]


def test_ctrl_c_once_stops_after_the_step_and_resumes(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    engine.stop_after = 6  # in the second run
    engine.interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped with 1 of 4 runs done; the same command trains the other 3"):
        launch.train(grouped(specs), study, engine=engine)
    assert signal.getsignal(signal.SIGINT) is handler
    assert engine.trained == [specs[0].run_id]
    engine.stop_after = None
    assert len(launch.train(grouped(specs), study, engine=engine)) == 4
    assert engine.trained == [spec.run_id for spec in specs]


def test_a_stop_says_what_to_type_to_go_on_and_an_end_what_comes_next(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["/bin/lora-atlas", "train", "-m", "rank=4,8"])
    engine.stop_after, engine.interrupt = 6, lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        launch.train(grouped(specs), study, engine=engine)
    assert stopped.value.again == "lora-atlas train -m rank=4,8"
    assert str(stopped.value) == f"{stopped.value.message}: {stopped.value.again}"
    assert pickle.loads(pickle.dumps(stopped.value)).again == stopped.value.again
    assert "Next, " not in capsys.readouterr().out
    engine.stop_after = None
    launch.train(grouped(specs), study, engine=engine)
    *_, before, last = capsys.readouterr().out.splitlines()
    assert before == "Next, its tables and figures:"
    assert last == shlex.join(["lora-atlas", "analyse", str(study.folder), "--out", "paper/"])


def test_what_failed_before_a_stop_is_not_done(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    engine.fail, engine.stop_after = {specs[0].run_id}, 6  # in the third run
    engine.interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped with 1 of 4 runs done; the same command trains the other 3"):
        launch.train(grouped(specs), study, engine=engine)


def test_ctrl_c_while_the_last_runs_train_is_no_failure(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any
) -> None:
    engine.stop_after = 1
    engine.interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped with 0 of 1 runs done; the same command trains the other 1"):
        launch.train(grouped(specs[:1]), study, engine=engine)


def test_ctrl_c_twice_stops_at_once(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    engine.stop_after, engine.interrupt = 1, twice
    with pytest.raises(KeyboardInterrupt):
        launch.train(grouped(specs), study, engine=engine)
    assert engine.trained == []


def test_a_dry_run_trains_and_writes_nothing(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.train(grouped(specs), dataclasses.replace(study, dry_run=True), engine=engine)
    out = capsys.readouterr().out
    assert all(spec.run_id in out for spec in specs)
    assert "4 runs, 4 to train; this was a dry run" in out
    assert not engine.trained
    assert not study.folder.exists()


def test_observers_see_every_event_in_order(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    seen: list[Any] = []
    work = scheduler.Scheduler(grouped(specs), [spec.run_id for spec in specs], study, observers=[seen.append])
    outcome = scheduler.run(work, train=engine)
    assert [event.record.run_id for event in seen if isinstance(event, RunFinished)] == list(outcome.records)
    assert sum(isinstance(event, Step) for event in seen) == sum(spec.trainer.max_steps for spec in specs)
    assert not outcome.interrupted


def test_a_run_without_scores_has_no_objective(make_record: Callable[..., Record]) -> None:
    assert launch.objective(make_record(scores={})) is None
    assert launch.objective(None) is None


class JobLauncher:
    """Stands for any Hydra launcher: a run a job."""

    def __init__(self, jobs: Callable[[list[str]], None]) -> None:
        self.jobs = jobs
        self.calls: list[list[str]] = []

    def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> None:
        for overrides in job_overrides:
            self.calls.append(overrides)
            self.jobs(overrides)


def test_another_launcher_gets_a_run_a_job(composer: Any, study: Settings, make_record: Callable[..., Record]) -> None:
    found = config.expand(["experiment=smoke", "placement=attn,ff", "rank=4,8"], composer)
    found = dataclasses.replace(found, settings=study)

    def job(overrides: list[str]) -> None:
        spec, _ = config.from_config(composer.compose(overrides))
        if spec.rank == 4:
            record.write_record(study.folder / spec.run_id, make_record(spec))

    launcher = JobLauncher(job)
    with pytest.raises(RunsFailed, match="2 of 4 runs failed"):
        launch.train(found.arms, found.settings, workers=launch.as_jobs(launcher))
    assert len(launcher.calls) == 4
    with pytest.raises(RunsFailed):
        launch.train(found.arms, found.settings, workers=launch.as_jobs(launcher))
    assert [call[1:] for call in launcher.calls[4:]] == [
        ["placement=attn", "rank=8", "seed=0"],
        ["placement=ff", "rank=8", "seed=0"],
    ]


class Returned:
    """Stands for Hydra's JobReturn, which holds back what a job raised."""

    def __init__(self, value: object) -> None:
        self._return_value = value


class HoldingBack(JobLauncher):
    """As Hydra's own: an error of a job is what it returned."""

    def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> list[Returned]:
        returned = []
        for overrides in job_overrides:
            self.calls.append(overrides)
            try:
                returned.append(Returned(self.jobs(overrides)))
            except Exception as error:
                returned.append(Returned(error))
        return returned


@pytest.fixture
def grid(composer: Any, study: Settings) -> Any:
    found = config.expand(["experiment=smoke", "placement=attn,ff"], composer)
    return dataclasses.replace(found, settings=dataclasses.replace(study, retries=0))


def test_what_a_job_raised_is_its_runs_error(grid: Any, study: Settings) -> None:
    def job(overrides: list[str]) -> None:
        raise ValueError(f"no\nluck with {overrides[1]}")

    with pytest.raises(RunsFailed) as caught:
        launch.train(grid.arms, grid.settings, workers=launch.as_jobs(HoldingBack(job)))
    assert "2 of 2 runs failed" in caught.value.lines[0]
    assert any("ValueError: no luck with placement=attn" in line for line in caught.value.lines)
    kept = [record.read_record(study.folder / spec.run_id).error for spec in grid.specs]
    assert kept[1] == {"class": "ValueError", "message": "no luck with placement=ff"}


def test_a_failed_record_of_before_is_no_record_of_the_job(
    grid: Any, study: Settings, make_record: Callable[..., Record]
) -> None:
    for spec in grid.specs:
        old = make_record(spec, status="failed", scores={}, error={"class": "OldError", "message": "of yesterday"})
        record.write_record(study.folder / spec.run_id, old)

    def job(overrides: list[str]) -> None:
        raise ValueError("of today")

    with pytest.raises(RunsFailed) as caught:
        launch.train(grid.arms, grid.settings, workers=launch.as_jobs(HoldingBack(job)))
    assert "of today" in str(caught.value)
    assert "of yesterday" not in str(caught.value)


def test_a_job_that_ends_badly_after_its_record_is_told(
    grid: Any, study: Settings, composer: Any, make_record: Callable[..., Record], capsys: pytest.CaptureFixture[str]
) -> None:
    def job(overrides: list[str]) -> None:
        spec, _ = config.from_config(composer.compose(overrides))
        record.write_record(study.folder / spec.run_id, make_record(spec))
        raise ConnectionError("the tracker is gone")

    assert len(launch.train(grid.arms, grid.settings, workers=launch.as_jobs(HoldingBack(job)))) == 2
    out = capsys.readouterr().out
    assert "its record is whole, but its job ended with ConnectionError: the tracker is gone" in out


def test_a_run_that_is_tried_again_is_told(grid: Any, study: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    def job(overrides: list[str]) -> None:
        raise RuntimeError("the wind")

    settings = dataclasses.replace(study, retries=1)
    with pytest.raises(RunsFailed):
        launch.train(grid.arms, settings, workers=launch.as_jobs(HoldingBack(job)))
    assert capsys.readouterr().out.count("RuntimeError: the wind; tried again") == 2


def test_a_launcher_that_runs_nothing_is_one_line_and_leaves_nothing(grid: Any, study: Settings) -> None:
    class Broken(JobLauncher):
        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> None:
            raise RuntimeError("no such\ncluster")

    with pytest.raises(SpecError, match=r"^hydra/launcher: Broken ran no job \(RuntimeError: no such cluster\)"):
        launch.train(grid.arms, grid.settings, workers=launch.as_jobs(Broken(lambda overrides: None)))
    assert not list(study.folder.glob("*/record.json"))


def test_a_launcher_that_breaks_halfway_keeps_what_was_done(
    grid: Any, study: Settings, composer: Any, make_record: Callable[..., Record]
) -> None:
    class Halfway(JobLauncher):
        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> None:
            spec, _ = config.from_config(composer.compose(job_overrides[0]))
            record.write_record(study.folder / spec.run_id, make_record(spec))
            raise RuntimeError("a worker died")

    with pytest.raises(RunsFailed, match=r"(?s)1 of 2 runs failed.*RuntimeError: a worker died"):
        launch.train(grid.arms, grid.settings, workers=launch.as_jobs(Halfway(lambda overrides: None)))


def test_a_folder_name_that_is_too_long_says_what_fits(grid: Any) -> None:
    class Long(JobLauncher):
        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> None:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 300)

    with pytest.raises(SpecError, match=r"too long for the file system: 'hydra.sweep.subdir=\$\{hydra.job.num\}'"):
        launch.train(grid.arms, grid.settings, workers=launch.as_jobs(Long(lambda overrides: None)))


def test_a_scheduler_off_the_main_thread_needs_no_signals(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any
) -> None:
    import threading

    work = scheduler.Scheduler(grouped(specs), [spec.run_id for spec in specs], study)
    thread = threading.Thread(target=lambda: scheduler.run(work, train=engine))
    thread.start()
    thread.join()
    assert len(engine.trained) == 4


def test_arms_of_one_run_each_that_differ_in_the_seed_all_train(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any
) -> None:
    several = [dataclasses.replace(spec, seed=seed) for seed in (0, 1, 2) for spec in specs[:2]]
    found = launch.train([single(spec) for spec in several], study, engine=engine)
    assert set(found) == set(engine.trained) == {spec.run_id for spec in several}
    assert len(engine.trained) == 6


def test_a_run_that_is_given_twice_trains_once(specs: tuple[RunSpec, ...], study: Settings, engine: Any) -> None:
    launch.train([single(specs[0]), *grouped([specs[0], specs[0], specs[1]])], study, engine=engine)
    assert engine.trained == [specs[0].run_id, specs[1].run_id]


def test_what_is_shown_may_break_without_ending_what_trains(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def broken(event: Any) -> None:
        raise BrokenPipeError("nobody reads")

    work = scheduler.Scheduler(grouped(specs), [s.run_id for s in specs], study, observers=[broken, seen.append])
    outcome = scheduler.run(work, train=engine)
    assert len(outcome.records) == 4
    assert sum(isinstance(event, RunFinished) for event in seen) == 4
    assert capsys.readouterr().err == "function ends, the sweep goes on: nobody reads\n"


def test_a_failure_names_its_traceback_and_is_counted_once(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, make_record: Callable[..., Record]
) -> None:
    """One that could not be written is told of by the engine alone."""

    def failing(source: Any, settings: Settings, *, should_stop: Any) -> None:
        kinds = [kind.key for kind in source.pending()]
        for place, request in enumerate(source.pull(4, kinds).runs):
            error = {"class": "KeyError", "message": "'x'", "traceback": record.TRACEBACK}
            done = make_record(request.spec, status="failed", scores={}, error=error)
            if place == 0:
                record.write_record(request.folder, done)
                (request.folder / record.TRACEBACK).write_text("Traceback")
            source.report(RunFinished(record=done))

    with pytest.raises(RunsFailed) as caught:
        launch.train(grouped(specs[:2]), study, engine=failing)
    first, *lines = caught.value.lines
    assert first.startswith("2 of 2 runs failed")
    trace = study.folder / specs[0].run_id / "traceback.txt"
    assert sorted(lines) == sorted([f"{specs[0].run_id}: KeyError: 'x' ({trace})", f"{specs[1].run_id}: KeyError: 'x'"])


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "_ended", {})


def test_a_lost_gpu_ends_the_command_only_where_more_is_to_be_trained(
    specs: tuple[RunSpec, ...], study: Settings, engine: Any, make_record: Callable[..., Record], went: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def losing(source: Any, settings: Settings, *, should_stop: Any) -> None:
        (request,) = source.pull(1, [kind.key for kind in source.pending()]).runs
        done = make_record(request.spec, status="failed", scores={}, error={"class": "ContextLost", "message": "m"})
        record.write_record(request.folder, done)
        source.report(RunFinished(record=done))
        raise ContextLost("assert")

    with pytest.raises(ContextLost):
        launch.train(grouped(specs[:2]), study, engine=losing)
    before = json.dumps({"failed": [specs[0].run_id], "in_a_row": 0, "measure": True})
    monkeypatch.setenv(lost.VARIABLE, before)
    with pytest.raises(RunsFailed, match="2 of 2 runs failed"):
        launch.train(grouped(specs[:2]), study, engine=losing)
    monkeypatch.setenv(lost.VARIABLE, before.replace("]", f', "{specs[1].run_id}"]'))
    with pytest.raises(RunsFailed, match="1 of 3 runs failed"):  # what failed before is not tried again
        launch.train(grouped(specs[1:]), study, engine=engine)
    monkeypatch.delenv(lost.VARIABLE)
    launch.train(grouped(specs), study, engine=engine)  # but by the next command
    assert set(engine.trained) == {spec.run_id for spec in specs}
