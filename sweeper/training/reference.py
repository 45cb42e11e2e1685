"""The base model's own log-likelihood of token rows, which preference objectives measure a run against.

It depends on the base and the tokens alone, so it is worked out once for each row, kept in the cache folder, and shared
by every run on that base whatever it trains.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sweeper.models import BaseModel
from sweeper.models.forward import hidden_states, inner_model
from sweeper.models.loss import Head
from sweeper.record import read_sealed, write_sealed
from sweeper.tasks.example import Tokens
from sweeper.training.batches import collate, supervised

CPU_TOKENS, CUDA_TOKENS = 4096, 65536  # of one forward pass, padding included


def key_of(row: Tokens) -> bytes:
    """What tells a row from others: its tokens, and on which of them the loss falls."""
    ids = np.array(row.input_ids, dtype=np.int64).tobytes()
    return hashlib.blake2b(ids, digest_size=16, salt=row.prompt_length.to_bytes(8, "little")).digest()


def find(base: BaseModel, identity: str, rows: Sequence[Tokens], cache: Path) -> list[float]:
    """Log-likelihood of the targets of each row in nats, from the cache folder or by `measure`.

    `identity` is what tells the base's weights and their precision from others.
    """
    path = cache / f"{_key(base, identity, rows)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = read_sealed(path)["log_likelihoods"]
        if len(kept) == len(rows):
            return [float(value) for value in kept]
    found = measure(base, rows)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
        write_sealed(path, {"log_likelihoods": found})
    return found


@torch.no_grad()
def measure(base: BaseModel, rows: Sequence[Tokens]) -> list[float]:
    """As `find`, by a base model that no pack is installed on."""
    device = base.model.device
    budget = CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS
    head = Head.of(base.model, base.verdict.head)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    found = np.zeros(len(rows))
    start = 0
    while start < len(order):
        chosen = order[start : start + max(1, budget // len(rows[order[start]].input_ids))]
        start += len(chosen)
        batch = collate([[rows[i] for i in chosen]], [[1.0] * len(chosen)], fixed=False).to(device)
        hidden = hidden_states(inner_model(base.model), batch.ids, batch.lengths, base.verdict.padding)
        states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.index.flatten())
        nll = head.scores(states, batch.targets, batch.weights)[1].nll[0].double().cpu().numpy()
        ends = np.cumsum([supervised([rows[i]]) for i in chosen])
        found[chosen] = [-part.sum() for part in np.split(nll[: ends[-1]], ends[:-1])]
    return [float(value) for value in found]


def _key(base: BaseModel, identity: str, rows: Sequence[Tokens]) -> str:
    described = [identity, str(base.model.dtype), base.model.device.type]
    seen = hashlib.sha256(json.dumps(described).encode())
    for row in rows:
        seen.update(key_of(row))
    return seen.hexdigest()[:20]
