"""Fixtures of the whole suite."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random four-layer Llama with its byte-level tokenizer, float32 on the CPU. Do not change its weights."""
    import torch

    from sweeper import models
    from sweeper.spec import ModelSpec

    spec = ModelSpec(
        name="tiny_llama",
        source="random",
        location="llama",
        config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "vocab_size": 512,
            "tie_word_embeddings": True,
        },
    )
    return models.load(spec, dtype=torch.float32, device=torch.device("cpu"))
