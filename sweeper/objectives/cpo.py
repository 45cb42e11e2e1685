"""Contrastive preference optimisation (Xu et al. 2024, 2401.08417, eq. 3 and 5)."""

from torch import Tensor

from sweeper.objectives.objective import Outputs
from sweeper.objectives.pairs import Pairs, check_above, check_not_below, check_share, logistic


class CPO(Pairs):
    """-log sigmoid(beta * d) + nll_weight * NLL of the chosen response, d the difference of the log-likelihoods.

    Args:
        beta: steepness. nll_weight: of the NLL, a mean over the tokens of the chosen responses.
        label_smoothing: share of labels that are taken to be wrong.
        length_normalised: log-likelihoods are means over a response's tokens.
    """

    def __init__(
        self, beta: float = 0.1, nll_weight: float = 1.0, label_smoothing: float = 0.0, length_normalised: bool = False
    ) -> None:
        check_above("cpo", beta=beta)
        check_share("cpo", label_smoothing)
        check_not_below(nll_weight=nll_weight)
        self.beta, self.nll_weight = beta, nll_weight
        self.label_smoothing, self.length_normalised = label_smoothing, length_normalised

    def of_pairs(self, seen: Outputs) -> Tensor:
        return logistic(self.beta * self.margins(seen), self.label_smoothing)
