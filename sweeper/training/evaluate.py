"""The scores of a split for several runs of a pack: NLL, and the metrics that its dataset asks for."""

import functools
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sweeper import tasks
from sweeper.record import Score
from sweeper.spec import DatasetSpec
from sweeper.tasks import general_text, metrics
from sweeper.tasks.example import Encoded
from sweeper.tasks.mixture import unseen
from sweeper.training import preferred
from sweeper.training.generate import Generated, cut, generate, rows_together
from sweeper.training.pack import Pack
from sweeper.training.routing import routes
from sweeper.training.run_state import EvaluatedSplit, RunState
from sweeper.training.score import ExampleScore, choose, queue_scores
from sweeper.untrusted import sandbox

Rows = list[dict[str, Any]]  # of a split, one an example
Scoring = Callable[[], list[EvaluatedSplit]]
CPU_TOKENS, CUDA_TOKENS = 4096, 65536  # of one forward pass, padding included


def evaluate(pack: Pack, slots: Sequence[int], state: RunState, split: str) -> list[EvaluatedSplit]:
    """Scores a split of one dataset for several slots at once (-1: the base model); see `queue_evaluation`."""
    return queue_evaluation(pack, slots, state, split)()


def queue_evaluation(
    pack: Pack, slots: Sequence[int], state: RunState, split: str, *, generation: bool = True
) -> Scoring:
    """Begins to score a split of one dataset for several slots at once (-1: the base model).

    Args:
        state: a run of that dataset; the slots must share its dataset and evaluation.
        split: one of the dataset's, or `general_text`, which is the same text for every dataset and has NLL alone.
        generation: whether metrics are computed that need choices, or text where the evaluation asks for it.

    Returns:
        What gives the scores. By then the slots may have trained on where `generation` is false: likelihoods are of
        now.
    """
    spec = state.spec
    if split == general_text.SPLIT:
        return _queue_general(pack, slots, state)

    def queue(dataset: DatasetSpec, examples: Sequence[Encoded]) -> Scoring:
        return queue_examples(
            pack, slots, examples, dataset if generation else None, generation=spec.evaluation.generate,
            exact_match="exact_match" in dataset.metrics,
        )  # fmt: skip

    if not spec.dataset.parts:
        return queue(spec.dataset, state.splits[split].examples)
    parts = [(part, state.splits[split].parts[part.name].examples) for part in spec.dataset.parts]
    queues = [functools.partial(queue, part, examples) for part, examples in parts]
    return _queue_tasks(pack, [part.name for part, _ in parts], queues, unseen(spec.dataset))


def _queue_general(pack: Pack, slots: Sequence[int], state: RunState) -> Scoring:
    """The general text; of runs of several tasks by task, each through the blocks that act on it."""
    queue = functools.partial(queue_examples, pack, slots, general_examples(pack), None)
    names = [part.name for part in state.spec.dataset.parts]
    if not names:
        return queue()
    if pack.store.lanes.gated:
        return _queue_tasks(pack, names, [queue] * len(names))
    once = queue()  # the same for all; what a record has does not depend on who else is in the pack
    return _queue_tasks(pack, names, [lambda: once] * len(names))


def _queue_tasks(
    pack: Pack, names: Sequence[str], queues: Sequence[Callable[[], Scoring]], apart: Collection[str] = ()
) -> Scoring:
    """Begins to score one task after another, each through its own blocks; `apart` ones have no part in the mean."""
    begun = []
    for task, queue in enumerate(queues):
        with pack.on_task(task):
            begun.append(queue())

    def found() -> list[EvaluatedSplit]:
        each = []
        for task, scores in enumerate(begun):
            with pack.on_task(task):  # text is generated only now
                each.append(scores())
        return [over_tasks(dict(zip(names, lane, strict=True)), apart) for lane in zip(*each, strict=True)]

    return found


def queue_through(pack: Pack, group: Sequence[tuple[int, RunState]]) -> Scoring:
    """Begins to score the test examples of every task through the blocks of each other one: NLL alone.

    Args:
        group: slots and runs that share a dataset of several tasks.

    Returns:
        What gives, for each run, by task and by whose blocks.
    """
    slots, state = [slot for slot, _ in group], group[0][1]
    parts = state.splits["test"].parts
    begun: dict[tuple[str, str], Scoring] = {}
    for path, name in enumerate(parts):
        with pack.on_task(path):
            begun |= {
                (task, name): queue_examples(pack, slots, part.examples, None)
                for task, part in parts.items()
                if task != name
            }

    def found() -> list[EvaluatedSplit]:
        scored = {key: scores() for key, scores in begun.items()}
        return [
            over_tasks(
                {
                    task: over_tasks({path: own[lane] for (one, path), own in scored.items() if one == task})
                    for task in parts
                }
            )
            for lane in range(len(slots))
        ]

    return found


def queue_routed(pack: Pack, routes: Mapping[str, Sequence[int]], group: Sequence[tuple[int, RunState]]) -> Scoring:
    """Begins to score test examples whose task is not named, each through the blocks of the task it is taken for.

    Args:
        routes: task -> the number of the task that each of its test examples is taken for (`routing.routes`).
        group: slots and runs that share a dataset of several tasks.
    """
    slots, state = [slot for slot, _ in group], group[0][1]
    budget = CUDA_TOKENS if pack.device.type == "cuda" else CPU_TOKENS
    parts = state.splits["test"].parts
    begun = {
        name: queue_scores(pack, slots, part.examples, budget=budget, tasks=routes[name])
        for name, part in parts.items()
    }

    def found() -> list[EvaluatedSplit]:
        each = {
            name: [_summarise(_rows(parts[name].examples, lane, exact_match=True), {}) for lane in scores()]
            for name, scores in begun.items()
        }
        return [over_tasks({name: lanes[lane] for name, lanes in each.items()}) for lane in range(len(slots))]

    return found


def find_routes(pack: Pack, state: RunState) -> dict[str, list[int]]:
    """The tasks that the test examples of a run of several are taken for; the same for all runs on its dataset."""
    budget = CUDA_TOKENS if pack.device.type == "cuda" else CPU_TOKENS
    never = unseen(state.spec.dataset)
    train = {name: split for name, split in state.splits["train"].parts.items() if name not in never}
    return routes(pack, train, state.splits["test"].parts, budget=budget)


def over_tasks(parts: Mapping[str, EvaluatedSplit], apart: Collection[str] = ()) -> EvaluatedSplit:
    """Scores over several tasks: each counts alike, whatever its size, but for those `apart`, which do not count.

    `nll` is the mean of the tasks' NLLs, `worst_nll` the highest; metrics that all of them have are means.
    """
    scores = [part.score for name, part in parts.items() if name not in apart]
    shared = [name for name in scores[0].metrics if all(name in score.metrics for score in scores)]
    metrics = {name: statistics.fmean(score.metrics[name] for score in scores) for name in shared}
    whole = Score(
        nll=statistics.fmean(score.nll for score in scores), tokens=sum(score.tokens for score in scores),
        examples=sum(score.examples for score in scores),
        metrics={**metrics, "worst_nll": max(score.nll for score in scores)},
    )  # fmt: skip
    return EvaluatedSplit(whole, [], parts)


def general_examples(pack: Pack) -> tuple[Encoded, ...]:
    """The general text in the tokens of the pack's model."""
    config = pack.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return general_text.encode(pack.base.tokenizer, longest=longest).examples


def evaluate_examples(
    pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], dataset: DatasetSpec | None, *,
    generation: bool = False, exact_match: bool = False,
) -> list[EvaluatedSplit]:  # fmt: skip
    """Scores examples for several slots at once; see `queue_examples`."""
    return queue_examples(pack, slots, examples, dataset, generation=generation, exact_match=exact_match)()


def queue_examples(
    pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], dataset: DatasetSpec | None, *,
    generation: bool = False, exact_match: bool = False,
) -> Callable[[], list[EvaluatedSplit]]:  # fmt: skip
    """Begins to score examples for several slots at once: NLL, and the metrics of `dataset`.

    Args:
        dataset: None for NLL (and exact match) alone.
        generation: whether metrics that need generated text are computed.
        exact_match: whether exact match by teacher forcing is.
    """
    if len(slots) > 1 and not pack.store.able.mixes:
        begun = [
            queue_examples(pack, [slot], examples, dataset, generation=generation, exact_match=exact_match)
            for slot in slots
        ]
        return lambda: [found for each in begun for found in each()]
    budget = CUDA_TOKENS if pack.device.type == "cuda" else CPU_TOKENS
    if preferred.asked_of(examples):
        wanted = preferred.queue(pack, slots, examples, budget=budget)
        examples = [example for example in examples if example.label is not False]  # no likelihood of bad responses
    else:
        wanted = None
    scores = queue_scores(pack, slots, examples, budget=budget)

    def found() -> list[EvaluatedSplit]:
        rows = [_rows(examples, lane, exact_match=exact_match) for lane in scores()]
        whole: list[dict[str, float]] = [{} for _ in slots]
        if dataset is not None and examples:
            _add_metrics(pack, slots, examples, dataset, rows, whole, generation=generation, budget=budget)
        for lane, own in enumerate([] if wanted is None else wanted()):
            rows[lane] = [row | own.rows.get(row["id"], {}) for row in rows[lane]]
            whole[lane] |= own.whole
        return [_summarise(lane, extra) for lane, extra in zip(rows, whole, strict=True)]

    return found


def _rows(examples: Sequence[Encoded], scores: Sequence[ExampleScore], *, exact_match: bool) -> list[dict[str, Any]]:
    grouped = any(e.unit != e.id for e in examples)
    rows: Rows = []
    for e, s in zip(examples, scores, strict=True):
        group = {"group": e.unit} if grouped else {}
        match = {"exact_match": float(s.exact_match)} if exact_match else {}
        rows.append({"id": e.id} | group | {"nll": s.nll, "tokens": s.tokens} | match)
    return rows


def _add_metrics(
    pack: Pack, slots: Sequence[int], examples: Sequence[Encoded], dataset: DatasetSpec, rows: list[Rows],
    whole: list[dict[str, float]], *, generation: bool, budget: int,
) -> None:  # fmt: skip
    """Adds to the rows, and to what is of the whole split, the metrics that need choices or generated text."""
    wanted = set(dataset.metrics)
    if wanted & metrics.CHOICE:
        _add_choices(rows, whole, examples, choose(pack, slots, examples, budget=budget), wanted)
    if generation and wanted & metrics.GENERATED:
        stops = tasks.stop_strings(dataset)
        texts = generate(
            pack, slots, [e.question for e in examples],
            max_new_tokens=dataset.max_new_tokens, stop_ids=pack.base.stop_ids, stop_strings=stops,
            rows=rows_together(pack, len(slots), dataset.max_length, budget),
        )  # fmt: skip
        for lane, written in enumerate(texts):
            _add_texts(pack, rows[lane], whole[lane], examples, written, stops, wanted)


def _add_choices(
    rows: list[Rows], whole: list[dict[str, float]], examples: Sequence[Encoded], chosen: list[list[int]],
    wanted: set[str],
) -> None:  # fmt: skip
    for lane, picks in enumerate(chosen):
        right = [example.choices[pick].text for example, pick in zip(examples, picks, strict=True)]
        labels = [label(example) for example in examples]
        for row, text, wished in zip(rows[lane], right, labels, strict=True):
            row |= {"choice": text, "choice_accuracy": float(text == wished)}
        if "macro_f1" in wanted:
            whole[lane]["macro_f1"] = metrics.macro_f1(right, labels)


def label(example: Encoded) -> str:
    """The text of the choice whose tokens the response has."""
    response = example.answer[:-1]
    return next(choice.text for choice in example.choices if choice.ids == response)


def _add_texts(
    pack: Pack, rows: Rows, whole: dict[str, float], examples: Sequence[Encoded], written: list[Generated],
    stops: Sequence[str], wanted: set[str],
) -> None:  # fmt: skip
    decode: Any = pack.base.tokenizer.decode
    responses = [decode(e.answer, skip_special_tokens=True) for e in examples]
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


def joined(
    examples: Sequence[Encoded], parts: Sequence[EvaluatedSplit], responses: Sequence[str]
) -> EvaluatedSplit:  # fmt: skip
    """The scores of examples that were evaluated in several parts, in their own order.

    Args:
        responses: the text of each example's response, for metrics of a whole split.
    """
    known = {row["id"]: row for part in parts for row in part.rows}
    rows = [known[example.id] for example in examples if example.id in known]
    asked = {name for part in parts for name in part.score.metrics}
    whole = {}
    if "macro_f1" in asked:
        whole["macro_f1"] = metrics.macro_f1([row["choice"] for row in rows], [label(e) for e in examples])
    for name in sorted(asked & set(metrics.CORPUS)):
        whole[name] = metrics.CORPUS[name][0]([row["text"] for row in rows], responses)
    return _summarise(rows, whole)


def _summarise(rows: list[dict[str, Any]], whole: dict[str, float]) -> EvaluatedSplit:
    """Means over the examples of whatever they have a number for, and what is no mean."""
    tokens = sum(row["tokens"] for row in rows)
    known = ("exact_match", "choice_accuracy", *metrics.TEXT, "pass_at_1", "capped")
    means = {name: sum(row[name] for row in rows) / len(rows) for name in known if rows and name in rows[0]}
    nll = sum(row["nll"] for row in rows) / max(tokens, 1)
    return EvaluatedSplit(Score(nll=nll, tokens=tokens, examples=len(rows), metrics=means | whole), rows)
