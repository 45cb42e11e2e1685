"""The majority baseline: always the commonest training response, whatever is asked."""

from collections import Counter
from collections.abc import Mapping, Sequence

from sweeper.tasks import metrics
from sweeper.tasks.example import Example


def majority(splits: Mapping[str, Sequence[Example]], split: str, wanted: Sequence[str]) -> dict[str, float]:
    """Scores of the commonest response of train on a split, by metric; empty where there is no training split.

    A question whose choices do not have that response counts as a blind choice among them. Programs are not run:
    `pass_at_1` has no majority baseline. Conversations have none at all, for runs are scored on several answers of one.
    """
    train, examples = splits["train"], splits[split]
    if not train or not examples or any(example.turns for example in examples):
        return {}
    # of equally common ones the first in order of the alphabet, so that the order of the split does not matter
    answer = min(Counter(e.response for e in train).items(), key=lambda item: (-item[1], item[0]))[0]
    responses = [e.response for e in examples]
    found: dict[str, float] = {}
    for name in wanted:
        if name == "exact_match":
            found[name] = _mean([metrics.exact_match(answer, response) for response in responses])
        elif name == "choice_accuracy":
            found[name] = _mean([_choice(answer, e) for e in examples])
        elif name == "macro_f1":
            found[name] = metrics.macro_f1([answer] * len(responses), responses)
        elif name in metrics.TEXT:
            found[name] = _mean([metrics.TEXT[name](answer, response) for response in responses])
        elif name in metrics.CORPUS:
            found[name] = metrics.CORPUS[name][0]([answer] * len(responses), responses)
    return found


def _choice(answer: str, example: Example) -> float:
    return float(answer == example.response) if answer in example.choices else 1 / max(len(example.choices), 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
