"""Contrastive preference optimisation (Xu et al. 2024, 2401.08417, eq. 3 and 5)."""

from torch import Tensor

from sweeper.errors import SpecError
from sweeper.objectives.objective import Outputs
from sweeper.objectives.pairs import Pairs, check_above, check_share, chosen_nll, logistic, margins


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
        if nll_weight < 0:
            raise SpecError(field="objective.options.nll_weight", wanted="at least 0", got=nll_weight)
        self.beta, self.nll_weight = beta, nll_weight
        self.label_smoothing, self.length_normalised = label_smoothing, length_normalised

    def losses(self, seen: Outputs) -> Tensor:
        found = super().losses(seen)
        return found + self.nll_weight * chosen_nll(seen) if self.nll_weight else found

    def of_pairs(self, seen: Outputs) -> Tensor:
        values = seen.log_likelihoods / seen.counts if self.length_normalised else seen.log_likelihoods
        return logistic(self.beta * margins(values), self.label_smoothing)
