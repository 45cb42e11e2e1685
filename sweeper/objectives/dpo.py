"""Direct preference optimisation (Rafailov et al. 2023, 2305.18290, eq. 7)."""

from torch import Tensor

from sweeper.objectives.objective import Outputs
from sweeper.objectives.pairs import Pairs, check_above, check_share, logistic


class DPO(Pairs):
    """-log sigmoid(beta * d), d the difference of the log-ratios to the base of chosen and rejected.

    Args:
        beta: how strongly the run is held to the base.
        label_smoothing: share of labels that are taken to be wrong (conservative DPO, Mitchell 2023).
        length_normalised: log-ratios are means over a response's tokens.
    """

    reference = True

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, length_normalised: bool = False) -> None:
        check_above("dpo", beta=beta)
        check_share("dpo", label_smoothing)
        self.beta, self.label_smoothing, self.length_normalised = beta, label_smoothing, length_normalised

    def of_pairs(self, seen: Outputs) -> Tensor:
        return logistic(self.beta * self.margins(seen), self.label_smoothing)
