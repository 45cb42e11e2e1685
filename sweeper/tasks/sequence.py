"""Several tasks one after another, as equal parts of a run's steps: continual learning (docs/tasks_together.md).

`dataset.options.replay` is the share of a step's examples that comes from the tasks before, alike. With
`dataset.options.order=seed` the run's seed draws the order of the tasks.
"""

from sweeper.tasks import mixture

OPTIONS = {
    "order": "given, or seed: the run's seed draws the order of the tasks",
    "replay": "share of each step's examples that are of the tasks before (0)",
    "weights": mixture.OPTIONS["weights"],
    "surgery": mixture.OPTIONS["surgery"],
}
UNIT = mixture.UNIT

check = mixture.check
version = mixture.version
