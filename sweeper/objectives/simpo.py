"""Simple preference optimisation with a reference-free reward (Meng et al. 2024, 2405.14734, eq. 6)."""

from torch import Tensor

from sweeper.errors import SpecError
from sweeper.objectives.objective import Outputs
from sweeper.objectives.pairs import Pairs, check_above, check_share, chosen_nll, logistic, margins


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
        for name, value in (("gamma", gamma), ("nll_weight", nll_weight)):
            if value < 0:
                raise SpecError(field=f"objective.options.{name}", wanted="at least 0", got=value)
        self.beta, self.gamma, self.nll_weight = beta, gamma, nll_weight
        self.label_smoothing, self.length_normalised = label_smoothing, length_normalised

    def losses(self, seen: Outputs) -> Tensor:
        found = super().losses(seen)
        return found + self.nll_weight * chosen_nll(seen) if self.nll_weight else found

    def of_pairs(self, seen: Outputs) -> Tensor:
        values = seen.log_likelihoods / seen.counts if self.length_normalised else seen.log_likelihoods
        return logistic(self.beta * margins(values) - self.gamma, self.label_smoothing)
