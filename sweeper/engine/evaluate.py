"""Scoring the runs of a pack together: NLL and exact match by teacher forcing, choices, and greedy generation."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweeper import sandbox, tasks
from sweeper.device import free_bytes
from sweeper.engine.batches import Tokens, collate, supervised
from sweeper.engine.compilation import eager
from sweeper.engine.pack import Pack
from sweeper.record import Score
from sweeper.spec import DatasetSpec
from sweeper.tasks import general_text, metrics
from sweeper.tasks.example import Encoded

CPU_TOKENS, CUDA_TOKENS = 4096, 65536  # of one forward pass, padding included
CACHE_SHARE = 0.3  # of the free memory of a GPU, for the KV cache
STOP_EVERY = 8  # generated tokens between two looks for stop strings


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
    lanes = pack.lanes_for(len(slots))
    with _Evaluating(pack):
        pack.use_lanes(slots, lanes)
        scored = []
        start = 0
        while start < len(order):
            longest = len(examples[order[start]].input_ids)
            chosen = order[start : start + max(1, budget // (lanes * longest))]
            start += len(chosen)
            batch = collate([[examples[i] for i in chosen]], [0], fixed=False)
            scored.append((chosen, pack.scores(batch.repeated(lanes))))
        for chosen, scores in scored:  # only now, so that the device was not waited for
            _add(found, chosen, [supervised([examples[i]]) for i in chosen], scores.double().cpu().numpy())
    return [sorted(scores, key=lambda s: s.position) for scores in found]


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
    """Greedy continuations of every prompt for each of `slots`, all adapters at once, with a KV cache.

    Args:
        rows: sequences of one adapter in a batch.
        stop_ids: ids that end a text.
        stop_strings: texts that end a text; up to `STOP_EVERY` further tokens may have been written, see `cut`.
    Returns:
        For each slot, the continuations in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[dict[int, Generated]] = [{} for _ in slots]
    with _Evaluating(pack):
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


def _decode(pack: Pack, slots, prompts, max_new_tokens: int, stop_ids, stop_strings=()) -> list[Generated]:
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
    window = STOP_EVERY + max((len(text.encode()) for text in stop_strings), default=0)
    for count in range(1, max_new_tokens + 1):
        pack.bank.lanes.tokens = ids.shape[1]
        where = {"position_ids": positions} if takes_positions else {}
        out = pack.model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where)
        token = pack.head.logits(out.last_hidden_state[:, -1]).argmax(-1)
        written.append(torch.where(done, stops[0], token))
        done |= torch.isin(token, stops)
        if stop_strings and count % STOP_EVERY == 0:
            tails = torch.stack(written[-window:], dim=1).tolist()
            ended = [cut(text, stop_strings)[1] for text in pack.base.tokenizer.batch_decode(tails)]
            done |= torch.tensor(ended, device=pack.device)
        if bool(done.all()):
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    ends = set(stop_ids)
    texts = []
    for row in torch.stack(written, dim=1).tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        texts.append(Generated(tuple(row[:end]), end is None))
    return texts


@torch.no_grad()
def choose(pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], *, budget: int) -> list[list[int]]:
    """For each of `slots`, the index of every example's likeliest choice, its log-likelihood taken per character."""
    rows = [
        Encoded(example.id, (*example.input_ids[: example.prompt_length], *choice.ids), example.prompt_length)
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
        split: one of the dataset's, or `general_text`, which is the same text for every dataset and has NLL alone.
        generation: whether metrics are computed that need choices, or text where the evaluation asks for it.
    """
    spec = run.request.spec
    if split == general_text.SPLIT:
        return evaluate_examples(pack, slots, general_examples(pack), None)
    dataset = spec.dataset if generation else None
    return evaluate_examples(
        pack, slots, run.splits[split].examples, dataset, generation=spec.evaluation.generate,
        exact_match="exact_match" in spec.dataset.metrics,
    )  # fmt: skip


def general_examples(pack: Pack) -> tuple[Encoded, ...]:
    """The general text in the tokens of the pack's model."""
    config = pack.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return general_text.encode(pack.base.tokenizer, longest=longest).examples


def evaluate_examples(
    pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], dataset: DatasetSpec | None, *,
    generation: bool = False, exact_match: bool = False,
) -> list[EvaluatedSplit]:  # fmt: skip
    """Scores examples for several slots at once: NLL, and the metrics of `dataset`.

    Args:
        dataset: None for NLL (and exact match) alone.
        generation: whether metrics that need generated text are computed.
        exact_match: whether exact match by teacher forcing is.
    """
    budget = CUDA_TOKENS if pack.device.type == "cuda" else CPU_TOKENS
    rows = [
        [{"id": e.id, "nll": s.nll, "tokens": s.tokens} | ({"exact_match": float(s.exact_match)} if exact_match else {})
         for e, s in zip(examples, scores, strict=True)]
        for scores in score(pack, slots, examples, budget=budget)
    ]  # fmt: skip
    whole: list[dict[str, float]] = [{} for _ in slots]
    if dataset is not None and examples:
        wanted = set(dataset.metrics)
        if wanted & metrics.CHOICE:
            _add_choices(rows, whole, examples, choose(pack, slots, examples, budget=budget), wanted)
        if generation and wanted & metrics.GENERATED:
            stops = tasks.stop_strings(dataset)
            texts = generate(
                pack, slots, [e.input_ids[: e.prompt_length] for e in examples],
                max_new_tokens=dataset.max_new_tokens, stop_ids=pack.base.stop_ids, stop_strings=stops,
                rows=_rows_together(pack, len(slots), dataset.max_length, budget),
            )  # fmt: skip
            for lane, written in enumerate(texts):
                _add_texts(pack, rows[lane], whole[lane], examples, written, stops, wanted)
    return [_summarise(lane, extra) for lane, extra in zip(rows, whole, strict=True)]


def _rows_together(pack: Pack, lanes: int, length: int, budget: int) -> int:
    """Sequences of one adapter that are generated at once. On a GPU a new token costs its launches, however many rows
    it is for, so there are as many as memory has room for.
    """
    if pack.device.type == "cuda":
        config = pack.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * width * pack.dtype.itemsize
        budget = max(budget, int(CACHE_SHARE * free_bytes(pack.device)) // per_token)
    return max(1, budget // (lanes * length))


def _add_choices(rows, whole, examples, chosen: list[list[int]], wanted: set[str]) -> None:
    for lane, picks in enumerate(chosen):
        right = [example.choices[pick].text for example, pick in zip(examples, picks, strict=True)]
        labels = [label(example) for example in examples]
        for row, text, wished in zip(rows[lane], right, labels, strict=True):
            row |= {"choice": text, "choice_accuracy": float(text == wished)}
        if "macro_f1" in wanted:
            whole[lane]["macro_f1"] = metrics.macro_f1(right, labels)


def label(example: Encoded) -> str:
    """The text of the choice whose tokens the response has."""
    response = example.input_ids[example.prompt_length : -1]
    return next(choice.text for choice in example.choices if choice.ids == response)


def _add_texts(pack: Pack, rows, whole, examples, written: list[Generated], stops, wanted: set[str]) -> None:
    decode: Any = pack.base.tokenizer.decode
    responses = [decode(e.input_ids[e.prompt_length :], skip_special_tokens=True) for e in examples]
    texts = []
    for row, one in zip(rows, written, strict=True):
        text, stopped = cut(decode(list(one.ids), skip_special_tokens=True), stops)
        row |= {"text": text, "capped": one.capped and not stopped}
        texts.append(text)
    each = {name for name in wanted if name in metrics.TEXT} | {
        metrics.CORPUS[n][1] for n in wanted & set(metrics.CORPUS)
    }
    for row, text, response in zip(rows, texts, responses, strict=True):
        row |= {name: metrics.TEXT[name](text, response) for name in sorted(each)}
    for name in sorted(wanted & set(metrics.CORPUS)):
        whole[name] = metrics.CORPUS[name][0](texts, responses)
    if "pass_at_1" in wanted:
        programs = [(metrics.program(text), example.check) for text, example in zip(texts, examples, strict=True)]
        for row, outcome in zip(rows, sandbox.run_all(programs), strict=True):
            row |= {"pass_at_1": float(outcome.passed), "outcome": outcome.reason}


def _summarise(rows: list[dict[str, Any]], whole: dict[str, float]) -> EvaluatedSplit:
    """Means over the examples of whatever they have a number for, and what is no mean."""
    tokens = sum(row["tokens"] for row in rows)
    known = ("exact_match", "choice_accuracy", *metrics.TEXT, "pass_at_1", "capped")
    means = {name: sum(row[name] for row in rows) / len(rows) for name in known if rows and name in rows[0]}
    nll = sum(row["nll"] for row in rows) / max(tokens, 1)
    return EvaluatedSplit(Score(nll=nll, tokens=tokens, examples=len(rows), metrics=means | whole), rows)


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
