"""What objectives of preference pairs have in common: each example is a chosen and a rejected row."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from sweeper.errors import SpecError
from sweeper.objectives.objective import Objective, Outputs, Row
from sweeper.tasks import preference


def chosen(example: Any) -> Row:
    """The prompt and the preferred response."""
    return Row(example.input_ids, example.prompt_length)


def rejected(example: Any) -> Row:
    """The prompt and the other response."""
    prompt = example.input_ids[: example.prompt_length]
    return Row((*prompt, *example.rejected), example.prompt_length)


class Pairs(Objective):
    """Compares the chosen with the rejected response to a prompt.

    Attributes:
        length_normalised: whether responses are compared by the mean over their tokens.
        nll_weight: of the NLL of the chosen responses, a mean over their tokens, beside the comparison.
    """

    kinds = (preference.PAIRS,)
    score = "preference_accuracy"
    length_normalised: bool = False
    nll_weight: float = 0.0

    def rows(self, example: Any) -> Sequence[Row]:
        return chosen(example), rejected(example)

    def losses(self, seen: Outputs) -> Tensor:
        found = (seen.shares[:, ::2] * self.of_pairs(seen)).sum(1)
        return found + self.nll_weight * chosen_nll(seen) if self.nll_weight else found

    def margins(self, seen: Outputs) -> Tensor:
        """By how much the log-likelihood of the chosen response is higher, [L, R/2]: where the objective asks for the
        base's own, the log-ratio to it."""
        each = seen.log_likelihoods - seen.references if self.reference else seen.log_likelihoods
        return margins(each / seen.counts if self.length_normalised else each)

    def of_pairs(self, seen: Outputs) -> Tensor:
        """Loss of each pair [L, R/2]; pairs that fill up a lane may have any finite one."""
        raise NotImplementedError


def margins(each: Tensor) -> Tensor:
    """By how much a number of each row [L, R] is higher for the chosen response, [L, R/2]."""
    return each[:, ::2] - each[:, 1::2]


def logistic(margin: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of a margin, of labels that are wrong with the probability `smoothing`."""
    right, wrong = functional.softplus(-margin), functional.softplus(margin)
    return (1 - smoothing) * right + smoothing * wrong


def chosen_nll(seen: Outputs, within: Tensor | None = None) -> Tensor:
    """Mean NLL [L] of the target tokens of the chosen rows; of those `within` [L, K] alone."""
    weights = seen.weights * (seen.rows % 2 == 0)
    return (weights if within is None else weights * within).mul(seen.nll).sum(1)


def check_above(name: str, **values: float) -> None:
    """Raises SpecError for an option that must be above 0 and is not."""
    for option, value in values.items():
        if not 0 < value < float("inf"):
            raise SpecError(field=f"objective.options.{option}", wanted=f"above 0 for {name}", got=value)


def check_not_below(**values: float) -> None:
    """Raises SpecError for an option that is below 0."""
    for option, value in values.items():
        if not 0 <= value < float("inf"):
            raise SpecError(field=f"objective.options.{option}", wanted="at least 0", got=value)


def check_share(name: str, value: float) -> None:
    """Raises SpecError for a `label_smoothing` that is no share below one half."""
    if not 0 <= value < 0.5:
        wanted = f"in [0, 0.5) for {name}: the share of labels that are wrong"
        raise SpecError(field="objective.options.label_smoothing", wanted=wanted, got=value)
