"""Calls the inner model of a base: rows padded on the right for training, on the left for generation."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sweeper.models.verdict import Padding


def inner_model(model: Any) -> Any:
    """The part of a causal language model that ends in hidden states; None where it has no such part."""
    found = (model.base_model, getattr(model, "model", None))
    return next((inner for inner in found if inner is not None and inner is not model), None)


def hidden_states(decoder: Callable[..., Any], ids: Tensor, lengths: Tensor, padding: Padding) -> Tensor:
    """Last hidden states [rows, T, D] of token ids [rows, T], padded on the right to T from `lengths` [rows]."""
    if padding == "causal":
        with _causal_kernel():
            return last_hidden(decoder(input_ids=ids, use_cache=False))
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    with _masks_built():
        return last_hidden(decoder(input_ids=ids, attention_mask=mask, use_cache=False))


def last_hidden(output: Any) -> Tensor:
    """Hidden states [rows, T, D] of what an inner model returned, an output object or a tuple."""
    states = getattr(output, "last_hidden_state", None)
    found: Tensor = output[0] if states is None else states
    return found


class CachedDecoding:
    """Decodes a token at a time, rows padded on the left, with the model's key-value cache.

    Args:
        decoder: called as the model's inner model is. model: whose config and signature decide.
        ids, mask: prompts [rows, T] and 1 where they are text.
    """

    def __init__(self, decoder: Callable[..., Any], model: Any, ids: Tensor, mask: Tensor) -> None:
        from transformers import DynamicCache

        self.decoder, self.ids, self.mask = decoder, ids, mask
        self.cache = DynamicCache(config=model.config)
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.takes_positions = "position_ids" in inspect.signature(inner_model(model).forward).parameters

    @property
    def tokens(self) -> int:
        """Tokens per row in the next model call."""
        return self.ids.shape[1]

    def hidden(self) -> Tensor:
        """Hidden state [rows, D] of the last token of each row."""
        where = {"position_ids": self.positions} if self.takes_positions else {}
        out = self.decoder(
            input_ids=self.ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **where
        )
        return last_hidden(out)[:, -1]

    def append(self, token: Tensor, most: int | None = None) -> None:
        """Adds a token [rows] to each row. `most`: positions that the model has; a row beyond stays at the last."""
        self.ids, self.positions = token[:, None], self.positions[:, -1:] + 1
        if most is not None:
            self.positions = self.positions.clamp(max=most - 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)


class WholeDecoding:
    """Like `CachedDecoding`, for models whose state is not a key-value cache: each step runs the whole row.

    Args:
        forward: hidden states [rows, T, D] of ids [rows, T] padded on the right and lengths [rows].
    """

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> None:
        self.forward = forward
        self.lengths = mask.sum(1)
        # from padding on the left to padding on the right
        places = torch.arange(ids.shape[1], device=ids.device) + (ids.shape[1] - self.lengths)[:, None]
        self.ids = ids.gather(1, places.clamp(max=ids.shape[1] - 1)) * (places < ids.shape[1])

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def hidden(self) -> Tensor:
        """Hidden state [rows, D] of the last token of each row."""
        states = self.forward(self.ids, self.lengths)
        return states[torch.arange(len(states), device=states.device), self.lengths - 1]

    def append(self, token: Tensor, most: int | None = None) -> None:
        """Adds a token [rows] to each row; one that has `most` already loses its last one for it."""
        if most is None or self.ids.shape[1] < most:
            self.ids = torch.cat([self.ids, self.ids.new_zeros(len(self.ids), 1)], dim=1)
        self.lengths = (self.lengths + 1).clamp(max=self.ids.shape[1])
        self.ids[torch.arange(len(self.ids), device=self.ids.device), self.lengths - 1] = token


@contextlib.contextmanager
def _causal_kernel() -> Iterator[None]:
    """Context in which `sdpa` models use their causal kernel and build no mask, not even during graph capture.

    Right where a mask would be causal and nothing else, which is what `allow_is_causal_skip` says. Local attention
    shorter than the row still gets its mask.
    """

    def build(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        local, length = kwargs.get("local_size"), kwargs.get("kv_length")
        behind = length is not None and kwargs.get("q_length", length) != length  # tokens that came before these
        near = local is None or (length is not None and length < local)
        plain = kwargs.get("allow_is_causal_skip", False) and kwargs.get("attention_mask") is None
        return None if plain and near and not behind else stock(*args, **kwargs)

    with _sdpa_masks(build), _one_text_a_row():
        yield


@contextlib.contextmanager
def _masks_built() -> Iterator[None]:
    """Context in which `sdpa` masks are always built: checking whether one is needed would wait for the device."""
    with _sdpa_masks(lambda stock, *args, **kwargs: stock(*args, **(kwargs | {"allow_is_causal_skip": False}))):
        yield


@contextlib.contextmanager
def _one_text_a_row() -> Iterator[None]:
    """Context in which transformers does not search the positions for packed sequences, of which there are none.

    During graph capture it cannot search, and would treat every row as packed.
    """
    from transformers import masking_utils

    stock = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = stock


@contextlib.contextmanager
def _sdpa_masks(build: Callable[..., Any]) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    stock = masks["sdpa"]
    masks["sdpa"] = lambda *args, **kwargs: build(stock, *args, **kwargs)
    try:
        yield
    finally:
        masks["sdpa"] = stock
