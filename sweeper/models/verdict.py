"""How a base model has to be called so that its numbers are the stock model's; plain data, without torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Padding = Literal["causal", "masked"]
"""How rows of unequal length share a batch. `causal`: without a mask, for a token never sees what follows it, so
padding on the right changes nothing. `masked`: with the model's own masks, for models that read them otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadForm:
    """Logits as `softcap * tanh(y / softcap)` of y = (output matrix · hidden) / divisor.

    `stock` where they are something else: then the model's own code makes them (`StockHead`).
    """

    softcap: float | None = None
    divisor: float = 1.0
    stock: bool = False


PLAIN = HeadForm()
"""The output matrix and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How a model is called so that its numbers are the stock model's.

    Attributes:
        padding: how rows of unequal length share a batch (`sweeper.models.forward.Padding`).
        cached: whether text is generated through the key-value cache; else every token is computed again at each step.
        head: how logits follow from hidden states.
        differences: what was measured, in nats: the largest differences of a log-probability. `rounding` is the stock
            model against itself, `causal` and `masked` rows padded each way, `cached` rows grown through the cache.
    """

    padding: Padding = "causal"
    cached: bool = True
    head: HeadForm = PLAIN
    differences: Mapping[str, float] = dataclasses.field(default_factory=dict)
