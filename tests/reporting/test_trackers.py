"""MLflow and trackio on the real packages, offline: what they are given is read back with their own interfaces."""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeper.errors import SpecError
from sweeper.record import ADAPTER, Record, Score
from sweeper.reporting import tracking
from sweeper.reporting.trackers import mlflow_log
from sweeper.reporting.trackers.log import Begun, Onward
from sweeper.run import Run
from sweeper.spec import RunSpec, Settings
from sweeper.training.events import Evaluated, Event, RunFinished, RunQueued, RunStarted, Step

pytestmark = [
    # MLflow's tables use what SQLAlchemy is about to drop, and its models what Pydantic is
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # connections that MLflow and trackio keep open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def specs(make_spec: Callable[..., RunSpec]) -> list[RunSpec]:
    return [make_spec(rank=rank, seed=seed) for rank, seed in ((4, 0), (8, 1))]


def events(
    specs: list[RunSpec], make_record: Callable[..., Record], *, first: int = 1, last: int = 3, end: bool = True
) -> Iterator[Event]:
    """Runs in step, as in a pack, from one step to another; not all of them end."""
    score = Score(nll=0.25, tokens=10, examples=2, metrics={"pass@1": 0.5})
    for spec in specs:
        yield RunQueued(run_id=spec.run_id, spec=spec, arm="")
        yield RunStarted(run_id=spec.run_id, steps=3)
    for step in range(first, last + 1):
        for spec in specs:
            loss = spec.rank / step
            yield Step(
                run_id=spec.run_id, step=step, loss=loss, lr=0.1, grad_norm=1.0, tokens=10, answer_tokens=4, seconds=0.5
            )  # fmt: skip
    for spec in specs if end else []:
        yield Evaluated(run_id=spec.run_id, split="validation", phase="after", score=score)
        yield RunFinished(record=make_record(spec))


def track(settings: Settings, told: Iterator[Event], said: list[str] | None = None) -> None:
    tracking.check(settings)
    tracker = tracking.make(["seed"], settings, [].append if said is None else said.append)
    assert tracker is not None
    for event in told:
        tracker(event)
    tracker.close()


def adapters_of(specs: list[RunSpec], study: Settings) -> dict[str, Path]:
    """Folders as runs leave them."""
    folders = {spec.run_id: Run.of(spec, study.folder).folder / ADAPTER for spec in specs}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return folders


@pytest.fixture(scope="module")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of MLflow's that holds nothing yet: making its tables takes ten seconds."""
    mlflow = pytest.importorskip("mlflow")
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    assert mlflow.MlflowClient(f"sqlite:///{file}").get_experiment_by_name("test") is None
    return file


@pytest.fixture
def mlflow(study: Settings, empty_file: Path) -> Settings:
    folder = Path(study.output_root) / "mlflow"
    folder.mkdir()
    shutil.copy(empty_file, folder)
    return replace(study, tracking="mlflow")


def runs_in_mlflow(settings: Settings) -> dict[str, Any]:
    """Run id -> the run, and its curve as (step, value) under `curve`, read from the file."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{settings.output_root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(settings.study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {
        run.data.tags["run_id"]: (
            run,
            [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")],
        )
        for run in found
    }


def test_mlflow_has_parameters_curves_tags_and_summary(
    mlflow: Settings, specs: list[RunSpec], make_record: Callable[..., Record]
) -> None:
    folders, said = adapters_of(specs, mlflow), []  # type: ignore[var-annotated]
    track(mlflow, events(specs, make_record), said)
    assert said == []
    found = runs_in_mlflow(mlflow)
    assert found.keys() == {spec.run_id for spec in specs}
    for spec in specs:
        run, curve = found[spec.run_id]
        assert curve == [(step, spec.rank / step) for step in (1, 2, 3)]
        assert run.info.run_name == f"attn r{spec.rank} seed={spec.seed}"
        assert run.info.status == "FINISHED"
        tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
        assert tags == {
            "study": "test", "run_id": spec.run_id, "arm": f"attn r{spec.rank}", "adapter": str(folders[spec.run_id]),
        }  # fmt: skip
        assert run.data.params["rank"] == str(spec.rank)
        assert run.data.params["placement"] == "attn"
        assert run.data.params["optim.lr"] == "0.001"
        assert run.data.metrics["test/nll_after"] == 1 / spec.rank
        assert run.data.metrics["validation/pass_1"] == 0.5  # MLflow takes no @


def test_a_resumed_run_goes_on_in_its_mlflow_run_and_repeats_no_step(
    mlflow: Settings, specs: list[RunSpec], make_record: Callable[..., Record]
) -> None:
    track(mlflow, events(specs, make_record, last=2, end=False))
    stopped = runs_in_mlflow(mlflow)
    assert {run.info.status for run, _ in stopped.values()} == {"KILLED"}
    track(mlflow, events(specs, make_record, first=2))
    found = runs_in_mlflow(mlflow)
    assert len(found) == 2
    for spec in specs:
        run, curve = found[spec.run_id]
        assert run.info.run_id == stopped[spec.run_id][0].info.run_id
        assert run.info.status == "FINISHED"
        assert curve == [(step, spec.rank / step) for step in (1, 2, 3)]


def test_mlflow_goes_where_the_uri_says(
    mlflow: Settings, specs: list[RunSpec], make_record: Callable[..., Record], empty_file: Path
) -> None:
    options = {"uri": f"sqlite:///{shutil.copy(empty_file, mlflow.output_root)}", "experiment": "ours"}
    track(replace(mlflow, tracking_options=options), events(specs[:1], make_record))
    from mlflow import MlflowClient

    assert MlflowClient(options["uri"]).get_experiment_by_name("ours") is not None
    assert MlflowClient(f"sqlite:///{mlflow.output_root}/mlflow/mlflow.db").get_experiment_by_name("test") is None


@pytest.mark.parametrize("uri", ["mlruns", "file:./mlruns", "ftp://host", 3])
def test_a_uri_that_mlflow_keeps_no_runs_at_is_refused(uri: Any) -> None:
    with pytest.raises(SpecError, match=r"^tracking\.uri=.*: give sqlite:///FILE\.db, http://HOST:PORT, or null"):
        mlflow_log.KIND.check({"uri": uri})


def test_an_mlflow_server_that_is_not_there_is_met_before_work(
    mlflow: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SpecError) as caught:
        tracking.check(replace(mlflow, tracking_options={"uri": "http://me:secret@127.0.0.1:9"}))
    (line,) = caught.value.lines
    assert line.startswith("tracking.uri=http://me:***@127.0.0.1:9: no MLflow server answers there (")
    assert "\n" not in line


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trackio reads its folder once a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        utils = pytest.importorskip("trackio.utils")
        pytest.importorskip("trackio")
    return Path(utils.TRACKIO_DIR)


def runs_in_trackio(project: str) -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Run id -> the run, and its rows."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    found = list(trackio.Api().runs(project))
    return {run.config["run_id"]: (run, SQLiteStorage.get_logs(project, run.name, run_id=run.id)) for run in found}


def test_trackio_has_configuration_curves_and_summary_of_runs_side_by_side(
    trackio_folder: Path, study: Settings, specs: list[RunSpec], make_record: Callable[..., Record],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings, said = replace(study, study="a/side.by-side", tracking="trackio"), []  # type: ignore[var-annotated]
    track(settings, events(specs, make_record), said)
    assert said == []
    assert capsys.readouterr().out == "", "the live view owns the terminal"
    assert list(trackio_folder.glob("*.db"))
    found = runs_in_trackio("a-side.by-side")
    assert found.keys() == {spec.run_id for spec in specs}
    for spec in specs:
        run, rows = found[spec.run_id]
        curve = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        assert curve == [(step, spec.rank / step) for step in (1, 2, 3)]
        assert run.name == f"attn r{spec.rank} seed={spec.seed} {spec.run_id}"
        assert run.config["study"] == "a/side.by-side"
        assert run.config["arm"] == run.config["_Group"] == f"attn r{spec.rank}"
        assert run.config["adapter"] == str(settings.folder.absolute() / spec.run_id / "adapter")
        assert run.config["rank"] == spec.rank
        assert [row["summary/test/nll_after"] for row in rows if "summary/test/nll_after" in row] == [1 / spec.rank]


def test_a_resumed_run_goes_on_in_its_trackio_run_and_repeats_no_step(
    trackio_folder: Path, study: Settings, specs: list[RunSpec], make_record: Callable[..., Record]
) -> None:
    settings = replace(study, study="resumed", tracking="trackio")
    track(settings, events(specs, make_record, last=2, end=False))
    track(settings, events(specs, make_record, first=2))
    found = runs_in_trackio("resumed")
    assert len(found) == 2
    for spec in specs:
        rows = found[spec.run_id][1]
        assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]


def test_what_trackio_only_warns_of_is_said_once(
    trackio_folder: Path, study: Settings, specs: list[RunSpec], make_record: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from trackio.sqlite_storage import SQLiteStorage

    def full(*_: Any, **__: Any) -> None:
        raise OSError("database or disk is full")

    monkeypatch.setattr(SQLiteStorage, "bulk_log", full)
    said: list[str] = []
    track(replace(study, study="full", tracking="trackio"), events(specs[:1], make_record), said)
    (line,) = said
    assert line.startswith(f"tracking: {specs[0].run_id} is not logged from here on (TrackioFailed: trackio failed to")
    assert "database or disk is full" in line


@pytest.mark.parametrize("tracker", ["mlflow", "trackio"])
def test_one_that_is_not_installed_says_how(tracker: str, study: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    how = {"mlflow": r"\S+ -m pip install", "trackio": "make trackio"}[tracker]
    with pytest.raises(SpecError, match=f"^tracking={tracker} needs the package {tracker}: {how}"):
        tracking.check(replace(study, tracking=tracker))


class Rows:
    """A log in memory."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.steps.append(step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self.closed = True


def test_a_service_that_does_not_answer_holds_nothing_up(
    specs: list[RunSpec], make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on at once, forgets steps rather than run out of memory, and ends with a line."""
    answers, log, said = threading.Event(), Rows(), []  # type: ignore[var-annotated]

    def open_log(run: Begun) -> Rows:
        answers.wait(30)
        return log

    monkeypatch.setattr(tracking, "MOST_WAITING", 5)
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)
    tracker = tracking.Tracker([], open_log, say=said.append)
    for event in events(specs[:1], make_record, last=50):
        tracker(event)
    tracker.close()
    assert log.steps == []
    assert said[0] == "tracking: is slower than training, so some steps are not logged"
    assert said[1].startswith("tracking: no answer in 0.01 s")
    answers.set()
    assert tracker.thread is not None
    tracker.thread.join(30)
    assert log.closed
    assert len(said) == 2
    assert 0 < len(log.steps) < 50


def test_a_tracker_of_nothing_begins_no_thread(study: Settings) -> None:
    tracker = tracking.Tracker([], lambda run: Rows())
    tracker.close()
    assert tracker.thread is None


def test_what_is_logged_already_is_left_out_by_name() -> None:
    new = Onward({"train/loss": 10})
    assert new({"train/loss": 1.0, "validation/nll": 2.0}, 10) == {"validation/nll": 2.0}
    assert new({"train/loss": 1.0}, 11) == {"train/loss": 1.0}
