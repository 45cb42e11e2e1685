"""Scoring the runs of a pack together: NLL and exact match by teacher forcing, and greedy generation."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.engine.batches import Tokens, collate, supervised
from sweeper.engine.pack import Pack, eager
from sweeper.record import Score
from sweeper.tasks.metrics import METRICS, TEACHER_FORCED

CPU_TOKENS, CUDA_TOKENS = 4096, 65536  # of one forward pass, padding included


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


@torch.no_grad()
def score(pack: Pack, slots: Sequence[int], examples: Sequence[Tokens], *, budget: int) -> list[list[ExampleScore]]:
    """Scores of every example for each of `slots` (-1: the base model), in the order of the examples.

    Args:
        budget: tokens of one forward pass, padding included.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids), reverse=True)
    found: list[list[ExampleScore]] = [[] for _ in slots]
    with _Evaluating(pack):
        start = 0
        while start < len(order):
            longest = len(examples[order[start]].input_ids)
            count = max(1, budget // (len(slots) * longest))
            chosen = order[start : start + count]
            start += count
            _score_batch(pack, slots, [(i, examples[i]) for i in chosen], found)
    return [sorted(scores, key=lambda s: s.position) for scores in found]


def _score_batch(pack: Pack, slots: Sequence[int], chosen, found: list[list[ExampleScore]]) -> None:
    rows = [example for _, example in chosen]
    batch = collate([rows] * len(slots), [0] * len(slots), fixed=False).to(pack.device)
    pack.use_lanes(slots)
    hidden = pack.hidden(batch.ids)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.index.flatten())
    _, scores = pack.head.scores(picked, batch.targets, batch.weights)
    nll, correct = scores.nll.double().cpu(), scores.correct.bool().cpu()
    for lane in range(len(slots)):
        first = 0
        for position, example in chosen:
            last = first + supervised([example])
            part = slice(first, last)
            found[lane].append(
                ExampleScore(position, float(nll[lane, part].sum()), last - first, bool(correct[lane, part].all()))
            )
            first = last


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
) -> list[list[Generated]]:
    """Greedy continuations of every prompt for each of `slots`, all adapters at once, with a KV cache.

    Args:
        rows: sequences of one adapter in a batch. stop_ids: ids that end a text.
    Returns:
        For each slot, the continuations in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[dict[int, Generated]] = [{} for _ in slots]
    with _Evaluating(pack):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            written = _decode(pack, slots, [prompts[i] for i in chosen], max_new_tokens, stop_ids)
            for lane in range(len(slots)):
                for place, position in enumerate(chosen):
                    found[lane][position] = written[lane * len(chosen) + place]
    return [[texts[i] for i in range(len(prompts))] for texts in found]


def _decode(pack: Pack, slots, prompts, max_new_tokens: int, stop_ids) -> list[Generated]:
    from transformers import DynamicCache

    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    ids, mask = (t.repeat(len(slots), 1).to(pack.device) for t in (ids, mask))
    stops = torch.tensor(list(stop_ids), device=pack.device)
    pack.use_lanes(slots)
    cache = DynamicCache(config=pack.model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(ids), dtype=torch.bool, device=pack.device)
    written: list[Tensor] = []
    takes_positions = "position_ids" in inspect.signature(pack.model.base_model.forward).parameters
    for _ in range(max_new_tokens):
        pack.bank.lanes.tokens = ids.shape[1]
        where = {"position_ids": positions} if takes_positions else {}
        out = pack.model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where)
        token = pack.head.logits(out.last_hidden_state[:, -1]).argmax(-1)
        written.append(torch.where(done, stops[0], token))
        done |= torch.isin(token, stops)
        if bool(done.all()):
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    ends = set(stop_ids)
    texts = []
    for row in torch.stack(written, dim=1).tolist():
        cut = next((i for i, token in enumerate(row) if token in ends), None)
        texts.append(Generated(tuple(row[:cut]), cut is None))
    return texts


@dataclass(frozen=True, slots=True)
class EvaluatedSplit:
    """Score of one split and its rows for `predictions.jsonl`."""

    score: Score
    rows: list[dict[str, Any]]


def evaluate(
    pack: Pack, slots: Sequence[int], run: Any, split: str, *, generation: bool = True
) -> list[EvaluatedSplit]:
    """Scores a split of one dataset for several slots at once (-1: the base model).

    Args:
        run: a `Prepared` run of that dataset; the slots must share its dataset and evaluation.
        generation: whether metrics that need generated text are computed, where the evaluation asks for them.
    """
    examples, spec = run.splits[split].examples, run.request.spec
    budget = CUDA_TOKENS if pack.device.type == "cuda" else CPU_TOKENS
    scored = score(pack, slots, examples, budget=budget)
    wanted = [name for name in spec.dataset.metrics if name not in TEACHER_FORCED]
    texts: list[list[Generated]] | None = None
    if wanted and generation and spec.evaluation.generate:
        texts = generate(
            pack, slots, [e.input_ids[: e.prompt_length] for e in examples],
            max_new_tokens=spec.dataset.max_new_tokens, stop_ids=pack.base.stop_ids,
            rows=max(1, budget // (len(slots) * spec.dataset.max_length)),
        )  # fmt: skip
    return [
        _assemble(pack, examples, scores, spec.dataset.metrics, texts[lane] if texts else None)
        for lane, scores in enumerate(scored)
    ]


def _assemble(pack: Pack, examples, scores, metrics, texts: list[Generated] | None) -> EvaluatedSplit:
    rows: list[dict[str, Any]] = []
    for place, (example, found) in enumerate(zip(examples, scores, strict=True)):
        row: dict[str, Any] = {"id": example.id, "nll": found.nll, "tokens": found.tokens}
        if "exact_match" in metrics:
            row["exact_match"] = float(found.exact_match)
        if texts is not None:
            decode: Any = pack.base.tokenizer.decode
            text = decode(list(texts[place].ids), skip_special_tokens=True)
            response = decode(example.input_ids[example.prompt_length :], skip_special_tokens=True)
            row |= {"text": text, "capped": texts[place].capped}
            row |= {name: METRICS[name](text, response) for name in metrics if name not in TEACHER_FORCED}
        rows.append(row)
    tokens = sum(row["tokens"] for row in rows)
    means = {
        name: sum(row[name] for row in rows) / len(rows) for name in (*metrics, "capped") if rows and name in rows[0]
    }
    nll = sum(row["nll"] for row in rows) / max(tokens, 1)
    return EvaluatedSplit(Score(nll=nll, tokens=tokens, examples=len(rows), metrics=means), rows)


class _Evaluating:
    """Evaluation mode, layers uncompiled; training mode again afterwards."""

    def __init__(self, pack: Pack) -> None:
        self.pack, self.stance = pack, eager()

    def __enter__(self) -> None:
        self.pack.model.eval()
        self.stance.__enter__()

    def __exit__(self, *raised: object) -> None:
        self.stance.__exit__(*raised)
        self.pack.model.train()
