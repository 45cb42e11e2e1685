"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306, eq. 7 and 8)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sweeper.objectives.objective import Objective, Outputs, Row
from sweeper.objectives.pairs import check_above, chosen, rejected
from sweeper.tasks import preference

GOOD, BAD, MISMATCHED = 1.0, -1.0, 0.0  # `Row.value`


class KTO(Objective):
    """w (1 - sigmoid(beta (r - z))) of a desirable response, w (1 - sigmoid(beta (z - r))) of an undesirable one.

    r is the response's log-ratio to the base. z is an estimate of the KL divergence to the base, over responses to
    other prompts: the mean of their log-ratios in a forward pass of the run, at least 0, without a gradient. A pair
    counts as one response of either kind.

    Args:
        beta: how strongly the run is held to the base.
        desirable_weight, undesirable_weight: w. Where kinds are of unequal number, the authors want the sums of their
            weights to be within 1 to 4/3 of one another.
    """

    reference = True
    kinds = (preference.PAIRS, preference.LABELS)
    score = "preference_accuracy"

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        check_above("kto", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        self.beta, self.weights = beta, (desirable_weight, undesirable_weight)

    def rows(self, example: Any) -> Sequence[Row]:
        """Those of an example that is alone: its mismatched response is its own."""
        return self.rows_of([example])[0]

    def rows_of(self, examples: Sequence[Any]) -> list[Sequence[Row]]:
        """Each response, and the prompt with a response to the prompt of the example before."""
        return [
            (*_labelled(example), _mismatched(example, examples[number - 1], number))
            for number, example in enumerate(examples)
        ]

    def losses(self, seen: Outputs) -> Tensor:
        ratios = seen.log_likelihoods - seen.references
        real = seen.shares > 0
        mismatched = real & (seen.values == MISMATCHED)
        shift = (ratios.detach() * mismatched).sum(1) / mismatched.sum(1).clamp(min=1)
        away = seen.values * (ratios - shift.clamp(min=0)[:, None])
        good, bad = ((seen.values == value) & real for value in (GOOD, BAD))
        heavy = self.weights[0] * good + self.weights[1] * bad
        each = (good | bad).sum(1) / mismatched.sum(1).clamp(min=1)  # responses of an example: of a pair two
        return (heavy * seen.shares / each.clamp(min=1)[:, None] * torch.sigmoid(-self.beta * away)).sum(1)


def _labelled(example: Any) -> tuple[Row, ...]:
    if example.rejected:
        rows = ((chosen(example), GOOD), (rejected(example), BAD))
    else:
        rows = ((chosen(example), GOOD if example.label else BAD),)  # type: ignore[assignment]
    return tuple(Row(row.input_ids, row.prompt_length, value=value) for row, value in rows)


def _mismatched(example: Any, other: Any, number: int) -> Row:
    """A prompt with the response of another example; of pairs the chosen and the rejected one in turn."""
    prompt = example.input_ids[: example.prompt_length]
    takes = other.rejected if other.rejected and number % 2 else other.input_ids[other.prompt_length :]
    return Row((*prompt, *takes), example.prompt_length, value=MISMATCHED)
