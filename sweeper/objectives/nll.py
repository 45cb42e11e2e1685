"""The mean negative log-likelihood of the response tokens, as causal language models are fine-tuned by."""

from torch import Tensor

from sweeper.objectives.objective import Objective, Outputs


class NLL(Objective):
    """Nats a token over all response tokens of a step."""

    linear = True

    def losses(self, seen: Outputs) -> Tensor:
        return (seen.weights * seen.nll).sum(1)
