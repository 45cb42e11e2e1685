"""Base models: where their files come from, how they are loaded and built, what a run on them costs."""

from sweeper.models.base import (
    BaseModel,
    check,
    check_length,
    held_bytes,
    hidden_size,
    is_tied,
    learned_positions,
    load,
    load_tokenizer,
    loading_message,
    skeleton,
    stock_config,
    tokenizer_at_hand,
    tokenizer_of,
    tokens_key,
    total_parameters,
    trained_positions,
)
from sweeper.models.files import content, dates_prompts

__all__ = [
    "BaseModel",
    "check",
    "check_length",
    "content",
    "dates_prompts",
    "held_bytes",
    "hidden_size",
    "is_tied",
    "learned_positions",
    "load",
    "load_tokenizer",
    "loading_message",
    "skeleton",
    "stock_config",
    "tokenizer_at_hand",
    "tokenizer_of",
    "tokens_key",
    "total_parameters",
    "trained_positions",
]
