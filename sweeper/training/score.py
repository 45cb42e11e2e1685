"""Scoring examples under every adapter of a pack by teacher forcing: NLL, exact match, the likeliest choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sweeper.lora.transfer import fetch
from sweeper.tasks import metrics
from sweeper.tasks.example import Encoded, Tokens
from sweeper.training.batches import collate, supervised
from sweeper.training.pack import Pack


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example under one adapter. `nll` is the sum over its response tokens, in nats.

    `exact_match`: greedy decoding would write the response to the letter, which is so if and only if every response
    token is the most likely one given those before it.
    """

    position: int
    nll: float
    tokens: int
    exact_match: bool


def score(pack: Pack, slots: Sequence[int], examples: Sequence[Tokens], *, budget: int) -> list[list[ExampleScore]]:
    """Scores of every example for each of `slots`; see `queue_scores`."""
    return queue_scores(pack, slots, examples, budget=budget)()


@torch.no_grad()
def queue_scores(
    pack: Pack, slots: Sequence[int], examples: Sequence[Tokens], *, budget: int, tasks: Sequence[int] | None = None
) -> Callable[[], list[list[ExampleScore]]]:
    """Gives the device the passes that score every example for each of `slots` (-1: the base model).

    Args:
        budget: tokens of one forward pass, padding included.
        tasks: through which task's blocks each example is to go; without it, through those of `Pack.on_task`.

    Returns:
        What waits for them and gives the scores for each slot, in the order of the examples.
    """
    if pack.apart and len(slots) > 1:
        every = [queue_scores(pack, [slot], examples, budget=budget, tasks=tasks) for slot in slots]
        return lambda: [scores for found in every for scores in found()]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids), reverse=True)
    lanes = pack.lanes_to_score(len(slots), examples)
    with pack.evaluating():
        pack.use_lanes(slots, lanes)
        scored = []
        start = 0
        while start < len(order):
            longest = len(examples[order[start]].input_ids)
            chosen = order[start : start + max(1, budget // (lanes * longest))]
            start += len(chosen)
            rows = [examples[i] for i in chosen]
            own = [pack.task] * len(rows) if tasks is None else [tasks[i] for i in chosen]
            batch = collate([rows], [[1.0] * len(rows)], fixed=False, tasks=[own])
            scored.append((chosen, fetch(pack.scores(batch.repeated(lanes)))))

    def found() -> list[list[ExampleScore]]:
        each: list[list[ExampleScore]] = [[] for _ in slots]
        for chosen, scores in scored:
            _add(each, chosen, [supervised([examples[i]]) for i in chosen], scores.wait().double().numpy())
        return [sorted(scores, key=lambda s: s.position) for scores in each]

    return found


def _add(found: list[list[ExampleScore]], positions: Sequence[int], lengths: Sequence[int], scores: np.ndarray) -> None:
    """Adds up what `Pack.scores` says of each token of some examples."""
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    nll, right = np.add.reduceat(scores[0], starts, axis=1), np.minimum.reduceat(scores[1], starts, axis=1)
    for lane, own in enumerate(found):
        own += [
            ExampleScore(position, float(nll[lane, row]), lengths[row], bool(right[lane, row]))
            for row, position in enumerate(positions)
        ]


@torch.no_grad()
def choose(pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], *, budget: int) -> list[list[int]]:
    """For each of `slots`, the index of every example's likeliest choice, its log-likelihood taken per character."""
    rows = [
        Encoded(example.id, (*example.question, *choice.ids), len(example.question))
        for example in examples
        for choice in example.choices
    ]
    found = []
    for scores in score(pack, slots, rows, budget=budget):
        remaining = iter(scores)
        found.append(
            [
                metrics.likeliest([-next(remaining).nll for _ in example.choices], [c.text for c in example.choices])
                for example in examples
            ]
        )
    return found
