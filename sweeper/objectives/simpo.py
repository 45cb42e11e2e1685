"""Simple preference optimisation with a reference-free reward (Meng et al. 2024, 2405.14734, eq. 6)."""

from torch import Tensor

from sweeper.objectives.objective import Outputs
from sweeper.objectives.pairs import Pairs, check_above, check_not_below, check_share, logistic


class SimPO(Pairs):
    """-log sigmoid(beta * d - gamma), d the difference of the mean log-probabilities of a token.

    Args:
        beta: steepness. gamma: margin that is asked for.
        nll_weight: of the NLL, a mean over the tokens of the chosen responses (CPO-SimPO).
        label_smoothing: share of labels that are taken to be wrong.
        length_normalised: off, d is of the whole responses' log-likelihoods.
    """

    def __init__(
        self, beta: float = 2.0, gamma: float = 1.0, nll_weight: float = 0.0, label_smoothing: float = 0.0,
        length_normalised: bool = True,
    ) -> None:  # fmt: skip
        check_above("simpo", beta=beta)
        check_share("simpo", label_smoothing)
        check_not_below(gamma=gamma, nll_weight=nll_weight)
        self.beta, self.gamma, self.nll_weight = beta, gamma, nll_weight
        self.label_smoothing, self.length_normalised = label_smoothing, length_normalised

    def of_pairs(self, seen: Outputs) -> Tensor:
        return logistic(self.beta * self.margins(seen) - self.gamma, self.label_smoothing)
