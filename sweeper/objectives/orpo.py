"""Odds ratio preference optimisation (Hong et al. 2024, 2403.07691, eq. 6 and 7)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sweeper.objectives.objective import Outputs, Row
from sweeper.objectives.pairs import Pairs, check_above, check_share, chosen, chosen_nll, logistic, margins, rejected


class ORPO(Pairs):
    """NLL of the chosen response - beta * log sigmoid of its log odds ratio to the rejected one.

    The likelihood behind the odds is the mean token's, exp of the mean log-probability.

    Args:
        beta: weight of the odds ratio, lambda of the paper.
        prompt_loss: whether the NLL is of the prompt as well, as in the authors' code and TRL.
        label_smoothing: share of labels that are taken to be wrong.
        length_normalised: off, the odds are of the whole responses.
    """

    def __init__(
        self, beta: float = 0.1, prompt_loss: bool = False, label_smoothing: float = 0.0, length_normalised: bool = True
    ) -> None:
        check_above("orpo", beta=beta)
        check_share("orpo", label_smoothing)
        self.beta, self.prompt_loss = beta, prompt_loss
        self.label_smoothing, self.length_normalised = label_smoothing, length_normalised

    def rows(self, example: Any) -> Sequence[Row]:
        better, worse = chosen(example), rejected(example)
        start = 1 if self.prompt_loss else better.prompt_length
        return Row(better.input_ids, start, value=better.prompt_length), worse

    def losses(self, seen: Outputs) -> Tensor:
        return chosen_nll(seen) + super().losses(seen)

    def of_pairs(self, seen: Outputs) -> Tensor:
        begins = seen.values.gather(1, seen.rows)  # where the response of a row that is scored from its start begins
        response = seen.positions >= begins
        sums = -seen.by_row(torch.where(response, seen.nll, 0.0))
        if self.length_normalised:
            sums = sums / seen.by_row(response.float()).clamp(min=1)
        # of a row that fills up a lane the sum is 0, whose odds have no logarithm
        real = torch.where(seen.shares > 0, sums, -1.0)
        return self.beta * logistic(margins(real - _log1mexp(real)), self.label_smoothing)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0 (Mächler 2012); the branch that is not taken is kept finite for its gradient."""
    small = x < -0.6931471805599453
    near, far = torch.where(small, -0.5, x), torch.where(small, x, -1.0)
    return torch.where(small, torch.log1p(-torch.exp(far)), torch.log(-torch.expm1(near)))
