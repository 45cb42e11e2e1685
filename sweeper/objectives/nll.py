"""The mean negative log-likelihood of the response tokens, as causal language models are fine-tuned by."""

from typing import Any

from torch import Tensor

from sweeper.tasks.example import Tokens


class NLL:
    """Nats a token over all response tokens of a step."""

    linear = True

    def rows(self, example: Any) -> tuple[Tokens]:
        return (example,)

    def losses(self, nll: Tensor, weights: Tensor, rows: Tensor, count: int) -> Tensor:
        return (weights * nll).sum(1)
