"""Seeds that depend on a text alone: on a run's seed and a module's name, never on who shares the pack."""

import hashlib


def seed_of(text: str) -> int:
    """32 bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def for_rows(seed: int, first: int) -> int:
    """A 32-bit seed for the sequences of a step from the `first` on: they draw what they would in one pass with all.

    The number goes in the upper half: what draws by place (`lowrank.keep_mask`, `noise.uniform`) counts from there.
    """
    return first << 32 | seed
