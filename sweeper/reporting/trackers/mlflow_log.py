"""MLflow: an SQLite file in `outputs/mlflow`, or the server or database at `tracking.uri`.

A study is an experiment. A run is found again by its tag `run_id`, so that it goes on where it is shown already.
"""

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sweeper import naming
from sweeper.errors import SpecError, gist
from sweeper.record import ADAPTER, MLFLOW
from sweeper.redaction import without_credentials
from sweeper.reporting.trackers.log import Begun, Kind, Onward, OpenLog, RunLog
from sweeper.spec import Settings

EVERY_SECONDS = 2.0
MOST_VALUES, MOST_PARAMS = 1000, 100  # that MLflow takes at once
LONGEST = 6000  # characters of a parameter
# a server that is gone is given up after seconds, not after MLflow's quarter of an hour
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# MLflow tells its makers about the use of it unless asked not to, and prints addresses over the live view
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_KNOWN = re.compile(r"(https?|databricks|(sqlite|postgresql|mysql|mssql)(\+\w+)?)://|databricks$")


class _Log:
    """Gathers values and sends them every `EVERY_SECONDS`: a transaction takes MLflow as long as many steps take us."""

    def __init__(self, client: Any, run_id: str, adapter: Path, new: Onward) -> None:
        self.client, self.run_id, self.adapter, self.new = client, run_id, adapter, new
        self.waiting: list[Any] = []
        self.sent, self.step = time.monotonic(), 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.step = max(self.step, step)
        self._add(self.new(_named(values), step), step)
        if len(self.waiting) >= MOST_VALUES or time.monotonic() - self.sent >= EVERY_SECONDS:
            self._send()

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._add(_named(summary), self.step)
        self._send()
        if self.adapter.is_dir():
            self.client.set_tag(self.run_id, ADAPTER, str(self.adapter))
        self.client.set_terminated(self.run_id, "KILLED" if not summary else "FAILED" if failed else "FINISHED")

    def _add(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(name, value, now, step) for name, value in values.items()]

    def _send(self) -> None:
        waiting, self.waiting, self.sent = self.waiting, [], time.monotonic()
        for start in range(0, len(waiting), MOST_VALUES):
            self.client.log_batch(self.run_id, metrics=waiting[start : start + MOST_VALUES])


def _open(settings: Settings, options: Mapping[str, Any]) -> OpenLog:
    _prepare()
    import mlflow
    from filelock import FileLock

    study, folder = settings.folder.absolute(), Path(settings.output_root).absolute() / MLFLOW
    uri, name = options.get("uri"), options.get("experiment") or settings.study

    if uri:
        client = mlflow.MlflowClient(uri)
        experiment = _experiment(client, name, None)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # a new file's tables take seconds; better now than while a run is timed
            client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
            experiment = _experiment(client, name, (folder / "artifacts").as_uri())

    def open_log(run: Begun) -> RunLog:
        adapter = study / run.run_id / ADAPTER
        tags = {"study": settings.study, "run_id": run.run_id, "arm": run.arm}
        known = client.search_runs([experiment], f"tags.run_id = '{run.run_id}' and tags.study = '{settings.study}'")
        if known:
            opened = known[0].info.run_id
            client.update_run(opened, status="RUNNING", name=run.label)
            return _Log(client, opened, adapter, Onward(_last_steps(client, known[0])))
        opened = client.create_run(experiment, run_name=run.label, tags=tags).info.run_id
        _log_params(client, opened, naming.flat(run.config))
        return _Log(client, opened, adapter, Onward({}))

    return open_log


def _experiment(client: Any, name: str, files: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=files))
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another command may have been first
        if found is None:
            raise
        return str(found.experiment_id)


def _last_steps(client: Any, run: Any) -> dict[str, int]:
    """Name -> the last step at which a run has a value."""
    return {
        name: max(one.step for one in client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics
    }


def _log_params(client: Any, run_id: str, flat: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(name, str(value)[:LONGEST]) for name, value in _named(flat).items()]
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(run_id, params=params[start : start + MOST_PARAMS])


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same under names that MLflow takes."""
    return {re.sub(r"[^\w\-./: ]", "_", name): value for name, value in values.items()}


def _prepare() -> None:
    for name, value in (QUIET | PATIENCE).items():
        os.environ.setdefault(name, value)


def _check(options: Mapping[str, Any]) -> None:
    uri = options.get("uri")
    if uri is None:
        return
    if not isinstance(uri, str) or not _KNOWN.match(uri):
        raise SpecError(
            f"tracking.uri={uri}: MLflow keeps runs in a database or on a server: give sqlite:///FILE.db, "
            "http://HOST:PORT, or null for outputs/mlflow"
        )
    if uri.startswith("http"):
        _reach(uri)


@functools.cache
def _reach(uri: str) -> None:
    """Raises SpecError where no server answers; one that has answered is not asked again."""
    _prepare()
    import mlflow

    ask: Callable[..., object] = mlflow.MlflowClient(uri).search_experiments
    try:
        ask(max_results=1)
    except Exception as error:  # MLflow's own, and those of what it asks with
        shown = without_credentials(uri)
        raise SpecError(f"tracking.uri={shown}: no MLflow server answers there ({gist(error)})") from error


KIND = Kind(package="mlflow", fields=("uri", "experiment"), open=_open, check=_check)
