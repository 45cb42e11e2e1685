"""Greedy text from every adapter of a pack at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sweeper.device import free_bytes
from sweeper.models import BaseModel, hidden_size, learned_positions
from sweeper.models.architecture import number_of_layers
from sweeper.models.forward import CachedDecoding, WholeDecoding
from sweeper.spec import DatasetSpec, EvaluationSpec
from sweeper.tasks.metrics import GENERATED
from sweeper.training.pack import Pack

CACHE_SHARE = 0.3  # of the free memory of a GPU, for the KV cache
STOP_EVERY = 8  # generated tokens between two looks for stop strings


@dataclass(frozen=True, slots=True)
class Generated:
    """Token ids written after a prompt, without the end-of-text id; `capped` where the length limit cut it short."""

    ids: tuple[int, ...]
    capped: bool


@torch.no_grad()
def generate(
    pack: Pack,
    slots: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    rows: int,
    stop_strings: Sequence[str] = (),
) -> list[list[Generated]]:
    """Greedy continuations of every prompt for each of `slots`, all adapters at once.

    Through a key-value cache where the model's verdict says that it gives the numbers of whole rows; else every token
    is computed again at each step.

    Args:
        rows: sequences of one adapter in a batch.
        stop_ids: ids that end a text.
        stop_strings: texts that end a text; up to `STOP_EVERY` further tokens may have been written, see `cut`.
    Returns:
        For each slot, the continuations in the order of the prompts. A model with learned positions writes up to the
        last of them.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[dict[int, Generated]] = [{} for _ in slots]
    with pack.evaluating():
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            written = _decode(pack, slots, [prompts[i] for i in chosen], max_new_tokens, stop_ids, stop_strings)
            for lane in range(len(slots)):
                for place, position in enumerate(chosen):
                    found[lane][position] = written[lane * len(chosen) + place]
    return [[texts[i] for i in range(len(prompts))] for texts in found]


def cut(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The text before its first stop string, and whether there was one.

    >>> cut("x = 1\\ndef f", ["\\ndef", "="])
    ('x ', True)
    """
    first = min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=None)
    return (text, False) if first is None else (text[:first], True)


def _decode(
    pack: Pack, slots: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
) -> list[Generated]:  # fmt: skip
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    ids, mask = (t.repeat(len(slots), 1).to(pack.device) for t in (ids, mask))
    stops = torch.tensor(list(stop_ids), device=pack.device)
    pack.use_lanes(slots)
    lengths = mask.sum(1)
    lanes = pack.store.lanes
    lanes.lengths = None
    if lanes.prompted:
        places = torch.arange(length, device=pack.device) + (length - lengths)[:, None]
        lanes.features = pack.read_prompts(ids.gather(1, places.clamp(max=length - 1)), lengths, lengths)
    decoding: CachedDecoding | WholeDecoding
    if pack.base.verdict.cached:
        decoding = CachedDecoding(pack.store.serving.decoder, pack.model, ids, mask)
    else:
        decoding = WholeDecoding(pack.hidden, ids, mask)
    done = torch.zeros(len(ids), dtype=torch.bool, device=pack.device)
    written: list[Tensor] = []
    most = learned_positions(pack.base.model)
    room = math.inf if most is None else most - getattr(pack.store.serving.decoder, "virtual", 0)
    window = STOP_EVERY + max((len(text.encode()) for text in stop_strings), default=0)
    for count in range(1, max_new_tokens + 1):
        pack.store.lanes.tokens = decoding.tokens
        token = pack.head.logits(decoding.hidden()).argmax(-1)
        written.append(torch.where(done, stops[0], token))
        done |= torch.isin(token, stops)
        if stop_strings and count % STOP_EVERY == 0:
            tails = torch.stack(written[-window:], dim=1).tolist()
            ended = [cut(text, stop_strings)[1] for text in pack.base.tokenizer.batch_decode(tails)]
            done |= torch.tensor(ended, device=pack.device)
        if math.isfinite(room):
            done |= lengths + count > room
        if bool(done.all()):
            break
        decoding.append(token, None if most is None else int(room))
    ends = set(stop_ids)
    texts = []
    for number, row in enumerate(torch.stack(written, dim=1).tolist()):
        end = next((i for i, token in enumerate(row) if token in ends), None)
        left = room - len(prompts[number % len(prompts)])  # tokens that may follow a prompt, of which it sees all
        texts.append(Generated(tuple(row[:end]), end is None or end > left))
    return texts


def remark(base: BaseModel, dataset: DatasetSpec, evaluation: EvaluationSpec) -> str | None:
    """What must be said of the way in which text will be generated; None where it is the usual one, or none."""
    if base.verdict.cached or not (evaluation.generate and set(dataset.metrics) & GENERATED):
        return None
    return "text is generated from whole rows, which is slower: through its cache the model would give other tokens"


def rows_together(pack: Pack, lanes: int, length: int, budget: int) -> int:
    """Sequences of one adapter that are generated at once. On a GPU a new token costs its launches, however many rows
    it is for, so there are as many as memory has room for.
    """
    if pack.device.type == "cuda" and pack.base.verdict.cached:
        width = max(_key_widths(pack), default=hidden_size(pack.model))
        per_token = 2 * number_of_layers(pack.base.targets) * width * pack.dtype.itemsize
        budget = max(budget, int(CACHE_SHARE * free_bytes(pack.device)) // max(per_token, 1))
    return max(1, budget // (lanes * length))


def _key_widths(pack: Pack) -> Iterator[int]:
    """Values that each layer's cache holds of a token's keys, where the model's projections tell."""
    for target in pack.base.targets:
        if target.role == "attn_k":
            yield target.out_features
