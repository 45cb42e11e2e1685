"""Training: runs in, events out, run folders on disk. Importing it is cheap; torch is loaded when training starts."""

from collections.abc import Callable

from sweeper.spec import Settings
from sweeper.training.source import Source


def train_runs(source: Source, settings: Settings, *, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Trains the runs of a source, together where they can share a base model; writes a folder for each as it ends.

    A run that fails is recorded and reported like any other; the rest go on. When `should_stop` turns true, what is
    training is checkpointed after the current step and the call returns.
    """
    from sweeper.training.trainer import Trainer

    Trainer(source, settings, should_stop).train()
