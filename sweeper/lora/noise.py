"""NEFTune (Jain et al. 2023): uniform noise on the embedded tokens of a run while it trains.

The noise is within alpha / sqrt(length * width), where the length is the sequence's own. It is counter-based: it
depends on the run's seed and step, the sequence, the position and the feature, and so is the same whoever shares the
pack.
"""

import torch
from torch import Tensor

from sweeper.lora.lowrank import ROW_STRIDE, mix, row_index

SALT = 0x4E4546


def uniform(seeds: Tensor, rows: int, tokens: int, features: int) -> Tensor:
    """Noise [L, rows, features] in [-1, 1) for lanes with these seeds [L]; each lane has `rows` rows of tokens."""
    index = row_index(rows, tokens, seeds.device) + (seeds[:, None] >> 32) * ROW_STRIDE
    row_key = mix((index ^ seeds[:, None]) & 0xFFFFFFFF)
    feature = torch.arange(features, device=seeds.device, dtype=torch.int64) * 0x9E3779B1 & 0xFFFFFFFF
    bits = mix((row_key[:, :, None] ^ feature ^ SALT) & 0xFFFFFFFF)
    return bits.float() * 2.0**-31 - 1


def add(embedded: Tensor, lengths: Tensor, alpha: Tensor, seeds: Tensor, slots: Tensor) -> Tensor:
    """Embedded tokens [rows, T, D] with the noise of every lane's run added.

    Args:
        lengths: [rows] tokens of each sequence. alpha, seeds: [J] of each slot; alpha 0 adds nothing.
        slots: [L] slot of each lane.
    """
    rows, tokens, features = embedded.shape
    chosen = slots.clamp(min=0).long()
    noise = uniform(seeds[chosen], rows // len(slots) * tokens, tokens, features).view(rows, tokens, features)
    size = torch.where(slots >= 0, alpha[chosen], 0.0).repeat_interleave(rows // len(slots))
    size = size / (lengths * features).float().sqrt()
    return embedded + (noise * size[:, None, None]).to(embedded.dtype)
