"""Prompt learning as a model that is called like any other: virtual tokens go before the text and are taken off again.

PEFT has two kinds (Lester et al. 2021; Li & Liang 2021): vectors before the token embeddings, and keys and values
before those of every layer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.models.forward import inner_model


@dataclass(frozen=True)
class Prompted:
    """The inner model of a PEFT model with virtual tokens; takes ids [rows, T] and gives hidden states [rows, T, D]."""

    peft: Any

    @property
    def virtual(self) -> int:
        """Tokens that go before the text."""
        return int(self.peft.active_peft_config.num_virtual_tokens)

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
        position_ids: Tensor | None = None, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        inner, virtual, rows = inner_model(self.peft.get_base_model()), self.virtual, len(input_ids)
        options: dict[str, Any] = {"use_cache": use_cache, "past_key_values": past_key_values}
        if attention_mask is not None:
            options["attention_mask"] = torch.cat([attention_mask.new_ones(rows, virtual), attention_mask], dim=1)
        if position_ids is not None:
            options["position_ids"] = position_ids + virtual
        if past_key_values is not None and past_key_values.get_seq_length() > 0:  # the virtual tokens are in there
            return inner(input_ids=input_ids, **options)
        self.peft.prompt_encoder.train(inner.training)
        tasks = torch.zeros(rows, dtype=torch.int64, device=input_ids.device)
        prompt = self.peft.get_prompt(batch_size=rows, task_ids=tasks)
        if not isinstance(prompt, Tensor):
            options["past_key_values"] = _filled(past_key_values, prompt)
            return inner(input_ids=input_ids, **options)
        embedded = self.peft.get_base_model().get_input_embeddings()(input_ids)
        if position_ids is not None:
            first = torch.arange(virtual, device=input_ids.device).expand(rows, -1)
            options["position_ids"] = torch.cat([first, position_ids + virtual], dim=1)
        found = inner(inputs_embeds=torch.cat([prompt.to(embedded.dtype), embedded], dim=1), **options)
        found.last_hidden_state = found.last_hidden_state[:, virtual:]
        return found


def _filled(cache: Any, prompt: Any) -> Any:
    """The cache that generation goes on with, holding the prompt's keys and values; without one, the prompt's own."""
    if cache is None:
        return prompt
    for number, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, number)
    return cache
