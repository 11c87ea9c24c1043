"""How a learner's batch is cut: in which order its rows go into minibatches, and a minibatch into microbatches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def draw_order(
    num_rows: int, epochs: int, size: int, siblings: int, generator: torch.Generator, shuffle: bool
) -> Tensor:
    """Row numbers of every minibatch: [epochs * num_rows / size, size] int64, on the generator's device.

    Args:
        size: rows of a minibatch.
        siblings: contiguous rows that stay together.
        shuffle: False keeps the batch's own order.
    Raises:
        ValueError: size does not divide the rows.
    """
    if num_rows % size:
        raise ValueError(f"minibatch_size: must divide the {num_rows} rows of a learner, got {size}")
    groups, device = num_rows // siblings, generator.device
    orders = [
        torch.randperm(groups, generator=generator, device=device) if shuffle else torch.arange(groups, device=device)
        for _ in range(epochs)
    ]
    rows = torch.cat(orders).unsqueeze(-1) * siblings + torch.arange(siblings, device=device)
    return rows.view(-1, size)


def microbatches(minibatch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
    """`size` rows at a time, or all of them; the ptx rows are shared out evenly, and numbers go to each."""
    num_rows = len(minibatch["learn_mask"])
    size = min(size or num_rows, num_rows)
    starts = range(0, num_rows, size)
    shares = {
        key: value.tensor_split(len(starts)) for key, value in minibatch.items() if key in ("ptx_ids", "ptx_mask")
    }
    pieces = []
    for i, start in enumerate(starts):
        piece = {
            key: value[start : start + size] if isinstance(value, Tensor) and value.dim() else value
            for key, value in minibatch.items() if key not in shares
        }  # fmt: skip
        piece |= {key: share[i] for key, share in shares.items() if len(share[i])}
        if size % piece["group_size"]:
            piece["group_size"] = 1
        pieces.append(piece)
    return pieces
