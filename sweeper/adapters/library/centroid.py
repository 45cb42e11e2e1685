"""Each prompt through the member whose training prompts are nearest: `sweeper.training.routing`, over members."""

from sweeper.adapters.library import members
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, ByExample, Task
from sweeper.adapters.library.made import Made
from sweeper.training.routing import ROUTER, centroids, nearest


def centroid(bench: Bench, asked: Asked, task: Task) -> Made:
    """Of members that were trained on the same data, the first stands for all."""
    first: dict[str, int] = {}
    for place, run in enumerate(bench.members):
        if members.tasks_of(run):
            first.setdefault(repr(run.spec.dataset), place)
    bench.installed.use(None)
    if bench.centres is None:
        train = {str(k): bench.task(bench.members[k].spec.dataset).splits["train"] for k in first.values()}
        bench.centres = centroids(bench.pack, train, budget=bench.budget)
    found = nearest(bench.pack, bench.centres, task.splits["test"].examples, budget=bench.budget)
    places = list(first.values())
    chosen = {example.id: places[i] for example, i in zip(task.splits["test"].examples, found, strict=True)}
    counts = [sum(one == k for one in chosen.values()) for k in range(len(bench.members))]
    adapters = [bench.alone(k) for k in range(len(bench.members))]
    return Made(ByExample(chosen, adapters), {"router": ROUTER, "to": counts})
