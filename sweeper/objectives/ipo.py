"""Identity preference optimisation (Azar et al. 2023, 2310.12036, eq. 17)."""

from torch import Tensor

from sweeper.objectives.objective import Outputs
from sweeper.objectives.pairs import Pairs, check_above, check_share


class IPO(Pairs):
    """(d - 1 / (2 beta))^2, d the difference of the log-ratios to the base of chosen and rejected.

    Args:
        beta: tau of the paper: how strongly the run is held to the base.
        label_smoothing: share of labels that are taken to be wrong.
        length_normalised: log-ratios are means over a response's tokens, as in the paper's own experiments.
    """

    reference = True

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, length_normalised: bool = True) -> None:
        check_above("ipo", beta=beta)
        check_share("ipo", label_smoothing)
        self.beta, self.label_smoothing, self.length_normalised = beta, label_smoothing, length_normalised

    def of_pairs(self, seen: Outputs) -> Tensor:
        gap, wanted = self.margins(seen), 1 / (2 * self.beta)
        right, wrong = (gap - wanted).square(), (gap + wanted).square()
        return (1 - self.label_smoothing) * right + self.label_smoothing * wrong
