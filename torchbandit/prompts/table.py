"""Ragged token ids as a table on the device. (N, P: see batch.py.)"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """N rows of token ids; `gather` left-pads those it is asked for.

    Ids are kept as int32: half the memory of what `gather` returns, and no vocabulary needs more.

    Args:
        ids: [N, P] int32, left-padded (dense), or [sum of lengths] int32, row after row (flat).
        lengths: [N] int64.
        ends: [N] int64, where each row ends in flat `ids`; None for a dense table.
        position: [P] int64, 0 .. P-1: kept, so that a gather makes no tensor on the host.
        pad_id: stands in front of short prompts.
    """

    ids: Tensor
    lengths: Tensor
    ends: Tensor | None
    position: Tensor
    pad_id: int

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n] int64 -> ids [n, P] int64 and mask [n, P] bool, without a sync."""
        width = self.position.shape[0]
        mask = self.position >= (width - self.lengths[rows]).unsqueeze(-1)
        if self.ends is None:
            return self.ids[rows].long(), mask
        at = self.ends[rows].unsqueeze(-1) - width + self.position
        # A short row at the very start of the table would look in front of it; those places are padding anyway.
        return torch.where(mask, self.ids[at.clamp(min=0)].long(), self.pad_id), mask

    def to(self, device: torch.device) -> Table:
        ends = None if self.ends is None else self.ends.to(device)
        return replace(
            self,
            ids=self.ids.to(device),
            lengths=self.lengths.to(device),
            ends=ends,
            position=self.position.to(device),
        )


def make_table(flat: Tensor, lengths: Tensor, pad_id: int) -> Table:
    """A dense table, or a flat one where padding would waste more than half of it.

    Args:
        flat: [sum of lengths] int64 on the CPU, row after row.
        lengths: [N] int64 on the CPU, all at least 1.
    """
    width = int(lengths.max())
    position = torch.arange(width)
    flat, ends = flat.int(), lengths.cumsum(0)
    if 2 * flat.numel() < width * lengths.numel():
        return Table(flat, lengths, ends, position, pad_id)
    dense = torch.full((lengths.numel(), width), pad_id, dtype=torch.int32)
    dense[position >= (width - lengths).unsqueeze(-1)] = flat
    return Table(dense, lengths, None, position, pad_id)
