"""Where curves and summaries can go: a file a service. Each imports its package when a sweep begins, not before."""

from collections.abc import Mapping

from sweeper.reporting.trackers import mlflow_log, tensorboard_log, trackio_log, wandb_log
from sweeper.reporting.trackers.log import Kind

TRACKERS: Mapping[str, Kind] = {
    "mlflow": mlflow_log.KIND,
    "tensorboard": tensorboard_log.KIND,
    "trackio": trackio_log.KIND,
    "wandb": wandb_log.KIND,
}
"""By the name that `tracking=` takes."""
