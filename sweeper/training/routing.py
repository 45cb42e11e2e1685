"""Which task an example is of, where nobody says: the nearest centroid of what the base model makes of its prompt.

Shapes: N examples, D hidden size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sweeper.tasks.example import Encoded, EncodedSplit
from sweeper.training.batches import collate
from sweeper.training.pack import Pack

ROUTER = "nearest centroid"
MOST = 256  # training examples of a task that its centroid is the mean of


@torch.no_grad()
def features(pack: Pack, examples: Sequence[Encoded], *, budget: int) -> Tensor:
    """The bare base model's last hidden states, each example's mean over its prompt [N, D], float32 on the host.

    Args:
        budget: tokens of one forward pass, padding included.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids), reverse=True)
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    with pack.evaluating():
        pack.use_lanes([-1])
        start = 0
        while start < len(order):
            chosen = order[start : start + max(1, budget // len(examples[order[start]].input_ids))]
            start += len(chosen)
            rows = [examples[i] for i in chosen]
            batch = collate([rows], [[1.0] * len(rows)], fixed=False).to(pack.device)
            hidden = pack.hidden(batch.ids, batch.lengths).float().cpu()
            for place, (i, row) in enumerate(zip(chosen, rows, strict=True)):
                found[i] = hidden[place, : row.prompt_length].mean(0)
    return torch.stack(found)


def centroids(pack: Pack, train: Mapping[str, EncodedSplit], *, budget: int) -> Tensor:
    """The mean features of each task's first training prompts, [tasks, D]."""
    return torch.stack([features(pack, split.examples[:MOST], budget=budget).mean(0) for split in train.values()])


def nearest(pack: Pack, centres: Tensor, examples: Sequence[Encoded], *, budget: int) -> list[int]:
    """The number of the centroid that each example's prompt is nearest to.

    Features are centred on the mean of the centroids and compared by their angle.
    """
    middle = centres.mean(0)
    directions = torch.nn.functional.normalize(centres - middle, dim=1)
    own = torch.nn.functional.normalize(features(pack, examples, budget=budget) - middle, dim=1)
    found: list[int] = (own @ directions.t()).argmax(1).tolist()
    return found


def routes(
    pack: Pack, train: Mapping[str, EncodedSplit], test: Mapping[str, EncodedSplit], *, budget: int
) -> dict[str, list[int]]:
    """The number among `test` of the task that each test example is taken for, by the task it is of.

    Only tasks of `train` are candidates. Of training data only the prompts are looked at.
    """
    centres = centroids(pack, train, budget=budget)
    numbers = [list(test).index(name) for name in train]
    return {
        name: [numbers[place] for place in nearest(pack, centres, split.examples, budget=budget)]
        for name, split in test.items()
    }
