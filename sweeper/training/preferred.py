"""How runs score preferences against the base: which response they have come to favour, by how much, at which distance.

Whatever a run minimises, its log-likelihoods of a response less the base's are its implicit reward (Rafailov et al.
2023, eq. 5, over beta), so runs of every objective are scored alike.

Shapes: L lanes, the last of them the bare base; K target tokens; V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweeper.lora.transfer import fetch
from sweeper.models.loss import Head
from sweeper.objectives.objective import Row
from sweeper.objectives.pairs import chosen, rejected
from sweeper.tasks.example import Encoded
from sweeper.tasks.metrics import KL, MARGIN, PREFERENCE_ACCURACY
from sweeper.training.batches import collate, supervised
from sweeper.training.pack import Pack

CUDA_LOGITS, CPU_LOGITS = 1 << 28, 1 << 24  # held at once, in values


@dataclass(frozen=True, slots=True)
class Preferred:
    """What is of each example by its id, and what is of a split."""

    rows: dict[str, dict[str, float]]
    whole: dict[str, float]


@torch.no_grad()
def queue(
    pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], *, budget: int
) -> Callable[[], list[Preferred]]:  # fmt: skip
    """Gives the device the passes that score preferences for each of `slots` (-1: the base model).

    Args:
        examples: pairs, or labelled responses. budget: tokens of one forward pass, padding included.

    Returns:
        What waits for them and gives the scores of each slot.
    """
    runs = [slot for slot in slots if slot >= 0]
    paired = any(example.rejected for example in examples)
    rows = [row for one in examples for row in ((chosen(one), rejected(one)) if paired else (chosen(one),))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    begun: list[tuple[list[int], Any]] = []
    with pack.evaluating():
        start = 0
        while runs and start < len(order):
            longest = len(rows[order[start]].input_ids)
            picked = order[start : start + max(1, budget // ((len(runs) + 1) * longest))]
            start += len(picked)
            begun.append((picked, fetch(_scores(pack, [*runs, -1], [rows[i] for i in picked]))))

    def found() -> list[Preferred]:
        ratios, divergences = np.zeros((2, len(runs), len(rows)))
        for picked, waiting in begun:
            nll, kl = waiting.wait().double().numpy()
            sizes = np.array([supervised([rows[i]]) for i in picked])
            starts = np.cumsum(sizes) - sizes
            nll, kl = (np.add.reduceat(part[:, : sizes.sum()], starts, axis=1) for part in (nll, kl))
            ratios[:, picked], divergences[:, picked] = nll[-1] - nll[:-1], kl[:-1]
        summed = iter(zip(ratios, divergences, strict=True))
        nothing = np.zeros(len(rows)), np.zeros(len(rows))
        lanes = [nothing if slot < 0 else next(summed) for slot in slots]
        summarise = _of_pairs if paired else _of_labels
        return [summarise(examples, *lane) for lane in lanes]

    return found


def _scores(pack: Pack, slots: Sequence[int], rows: Sequence[Row]) -> Tensor:
    """NLL of each target, and the divergence of each lane from the last at it, [2, L, K] in nats."""
    one = collate([rows], [[1.0] * len(rows)], fixed=False, tasks=[[pack.task] * len(rows)])
    together = [list(slots)] if pack.store.able.mixes else [[slot] for slot in slots]
    parts: list[tuple[list[int], Head, Tensor]] = []
    for lanes in together:
        pack.use_lanes(lanes)
        parts.append((lanes, pack.head, pack.target_states(one.repeated(len(lanes)).to(pack.device))))
    targets = one.targets[0].to(pack.device)
    vocabulary = pack.model.get_input_embeddings().weight.shape[0]
    size = max(1, (CUDA_LOGITS if pack.device.type == "cuda" else CPU_LOGITS) // (len(slots) * vocabulary))
    found = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = []
        for lanes, head, states in parts:
            pack.use_lanes(lanes)
            logits.append(_logits(pack, head, states[:, part]))
        found.append(_compare(torch.cat(logits), targets[part]))
    return torch.cat(found, 2)


def _logits(pack: Pack, head: Head, states: Tensor) -> Tensor:
    """Float32 logits [L, k, V] of states [L, k, D]."""
    flat = head.target_logits(states.reshape(-1, states.shape[-1]))
    return flat.view(*states.shape[:2], -1)


def _compare(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), -1)
    nll = -log_p.gather(2, targets.expand(len(log_p), -1)[..., None]).squeeze(2)
    # by lane: of all lanes at once it would take the room of all logits once more
    kl = torch.stack([(own.exp() * (own - log_p[-1])).sum(-1) for own in log_p])
    return torch.stack([nll, kl])


def _of_pairs(examples: Sequence[Encoded], ratios: np.ndarray, divergences: np.ndarray) -> Preferred:
    margins = ratios[::2] - ratios[1::2]
    rows = {
        example.id: {PREFERENCE_ACCURACY: 0.5 if margin == 0 else float(margin > 0), MARGIN: float(margin)}
        for example, margin in zip(examples, margins, strict=True)
    }
    tokens = supervised(examples)
    means = {name: float(np.mean([row[name] for row in rows.values()])) for name in (PREFERENCE_ACCURACY, MARGIN)}
    return Preferred(rows, {**means, KL: float(divergences[::2].sum()) / max(tokens, 1)})


def _of_labels(examples: Sequence[Encoded], ratios: np.ndarray, divergences: np.ndarray) -> Preferred:
    """The accuracy is over all pairs of a good and a bad response: the area under the ROC curve of the log-ratio."""
    good = np.array([bool(example.label) for example in examples])
    if good.all() or not good.any():
        return Preferred({}, {})
    gaps = ratios[good][:, None] - ratios[~good][None, :]
    tokens = supervised([example for example in examples if example.label])
    accuracy = float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
    kl = float(divergences[good].sum()) / max(tokens, 1)
    return Preferred({}, {PREFERENCE_ACCURACY: accuracy, MARGIN: float(gaps.mean()), KL: kl})


def asked_of(examples: Sequence[Encoded]) -> bool:
    """Whether examples are preferences."""
    return any(example.rejected or example.label is not None for example in examples)
