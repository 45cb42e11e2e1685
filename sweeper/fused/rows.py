"""Where the sequences of rows that lie one after another begin and end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences end to end, lane after lane, each lane filled up to the same number of rows.

    Attributes:
        starts, stops: [N] int32, the first row of each row's sequence and the one after its last; a row that fills a
            lane up is a sequence of its own.
    """

    starts: Tensor
    stops: Tensor

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], share: int, lanes: int | None = None) -> "Rows":
        """Rows of sequences of these lengths, by lane, in lanes of `share` rows; of so many `lanes`, the last empty."""
        starts = np.arange((lanes or len(lengths)) * share, dtype=np.int32)
        stops = starts + 1
        for lane, own in enumerate(lengths):
            first = lane * share
            for length in own:
                starts[first : first + length], stops[first : first + length] = first, first + length
                first += length
        return cls(torch.from_numpy(starts), torch.from_numpy(stops))
