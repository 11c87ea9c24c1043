"""The processes that learn together, as functions that sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchbandit.batch import Reduce


class Ranks(NamedTuple):
    """The processes that compute one update together."""

    rank: int = 0
    world_size: int = 1
    sum: Reduce | None = None

    def added(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return x if self.sum is None else self.sum(x)

    def greatest(self, x: Tensor) -> Tensor:
        """The element-wise maximum over ranks of [n], by a sum: each rank fills a row of its own."""
        if self.sum is None:
            return x
        rows = torch.zeros(self.world_size, *x.shape, dtype=x.dtype, device=x.device)
        rows[self.rank] = x
        return self.sum(rows).amax(0)
