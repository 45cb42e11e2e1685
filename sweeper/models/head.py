"""What a model does between its last hidden states and its logits, read off the model itself."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sweeper import lost
from sweeper.models.forward import inner_model
from sweeper.models.verdict import HeadForm

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far logits may be from the stock model's, relative to the largest."""
LARGE = 40.0
"""The largest logit of the states that a head is looked at with."""


class StockHead(nn.Module):
    """The model's own way from hidden states [..., D] to logits [..., V], whatever it is.

    The model is called with its inner model replaced by one that returns these states.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = [model]  # in a list: the model is no part of this module

    def forward(self, hidden: Tensor) -> Tensor:
        model = self._model[0]
        inner, rows = inner_model(model), hidden.reshape(1, -1, hidden.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=hidden.device)
        stock = inner.forward

        def instead(*args: Any, **kwargs: Any) -> Any:
            return _Output(last_hidden_state=rows)

        inner.forward = instead
        try:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        finally:
            if "forward" in vars(inner):
                del inner.forward
            if inner.forward != stock:
                inner.forward = stock
        return logits.view(*hidden.shape[:-1], logits.shape[-1])


class _Output(dict[str, Any]):
    """What an inner model returns, read as an object, a mapping or a tuple; whatever is not there is None."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)


def head_form(model: Any, hidden: Tensor, logits: Tensor) -> HeadForm | None:
    """How the model made `logits` [..., V] of `hidden` [..., D]; None where its own code does not do so either.

    A soft cap and a divisor are taken from the config's numbers and kept only where they give the logits.
    """
    logits = logits.float()
    pairs = [(hidden, logits)]
    stock = StockHead(model)
    try:
        known = _close(stock(hidden), logits, model.dtype)
        # a soft cap shows where logits are large, which those of a fresh model are not
        if known:
            larger = hidden * (LARGE / logits.abs().max().clamp(min=1e-3))
            pairs.append((larger, stock(larger).float()))
    except Exception as error:  # whatever the model's code does with states it was not made for
        if lost.is_of_device(error):
            raise
        known = False
    output = model.get_output_embeddings()
    if isinstance(output, nn.Module):
        for softcap in (None, *_named(model.config, "cap")):
            plain = output(for_head(output, pairs[-1][0])).float()
            for divisor in _divisors(plain, pairs[-1][1], softcap, model.config):
                form = HeadForm(softcap=softcap, divisor=divisor)
                if all(_close(apply(output, form, states), wanted, model.dtype) for states, wanted in pairs):
                    return form
    return HeadForm(stock=True) if known else None


def _close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    tolerance = CLOSE[dtype] * max(1.0, float(wanted.abs().max()))
    return found.shape == wanted.shape and bool(((found.float() - wanted).abs() <= tolerance).all())


def _divisors(plain: Tensor, logits: Tensor, softcap: float | None, config: Any) -> Iterator[float]:
    """1 and the number of the config, or its inverse or root, by which the logits differ from the plain product."""
    yield 1.0
    wanted = logits if softcap is None else softcap * torch.atanh((logits / softcap).clamp(-0.999, 0.999))
    inside = torch.ones_like(logits, dtype=torch.bool) if softcap is None else (logits / softcap).abs() < 0.99
    product = float((plain * wanted)[inside].sum())
    if not math.isfinite(product) or product <= 0:
        return
    ratio = float(plain[inside].square().sum()) / product
    for value in _named(config, ""):
        for candidate in (value, 1 / value, math.sqrt(value), 1 / math.sqrt(value)):
            if math.isclose(candidate, ratio, rel_tol=2e-3 if plain.dtype == torch.float32 else 2e-2):
                yield candidate


def _named(config: Any, part: str) -> Iterator[float]:
    """Positive numbers of a config whose names have a part."""
    text: Any = config.get_text_config()
    for name, value in {**vars(config), **vars(text)}.items():
        if part in name and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield float(value)


def for_head(output: Any, hidden: Tensor) -> Tensor:
    """Hidden states in the precision of the output matrix: some models (Mamba) carry theirs in float32."""
    weight = getattr(output, "weight", None)
    return hidden if weight is None or not weight.is_floating_point() else hidden.to(weight.dtype)


def logits_of(model: Any, form: HeadForm, hidden: Tensor) -> Tensor:
    """Float32 logits [..., V] of hidden states [..., D], as the stock model makes them."""
    output = StockHead(model) if form.stock else model.get_output_embeddings()
    return apply(output, form, hidden)


def apply(output: Any, form: HeadForm, hidden: Tensor) -> Tensor:
    """As `logits_of`, with the output matrix that is given."""
    logits: Tensor = output(for_head(output, hidden)).float() / form.divisor
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)
