"""Base models: where their files come from, how they are loaded and built, what a run on them costs."""

from sweeper.models.base import (
    BaseModel,
    check,
    check_length,
    held_bytes,
    is_tied,
    learned_positions,
    load,
    load_tokenizer,
    loading_message,
    skeleton,
    stock_config,
    total_parameters,
    trained_positions,
)

__all__ = [
    "BaseModel",
    "check",
    "check_length",
    "held_bytes",
    "is_tied",
    "learned_positions",
    "load",
    "load_tokenizer",
    "loading_message",
    "skeleton",
    "stock_config",
    "total_parameters",
    "trained_positions",
]
