"""Seeds that depend on a text alone: on a run's seed and a module's name, never on who shares the pack."""

import hashlib


def seed_of(text: str) -> int:
    """32 bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
