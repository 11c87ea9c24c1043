"""Where a response ends: stop masks, lengths, finish reasons. (B, T: see batch.py.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_stop(tokens: Tensor, stop_ids: Sequence[int] | Tensor) -> Tensor:
    """True where a token is one of `stop_ids`; bool of tokens' shape, no sync.

    Args:
        tokens: int64, any shape.
        stop_ids: ids that end a response; a tensor (on tokens' device) costs no copy.
    """
    if isinstance(stop_ids, Tensor):
        return torch.isin(tokens, stop_ids)
    hit = torch.zeros_like(tokens, dtype=torch.bool)
    for stop in stop_ids:
        hit |= tokens == stop
    return hit


def stop_mask(tokens: Tensor, stop_ids: Sequence[int] | Tensor) -> Tensor:
    """Mask of the real response tokens: all up to and including the first stop token.

    Args:
        tokens: [B, T] int64, whatever stands after the stop token.
        stop_ids: several are allowed; none means that nothing stops.
    Returns:
        [B, T] bool, on tokens' device.
    """
    hits = is_stop(tokens, stop_ids).long()
    return (hits.cumsum(-1) - hits) == 0


def lengths(mask: Tensor) -> Tensor:
    """Real tokens a row: [B, T] bool -> [B] int64."""
    return mask.sum(-1)


def has_stopped(tokens: Tensor, mask: Tensor, stop_ids: Sequence[int] | Tensor) -> Tensor:
    """True for rows whose last real token is a stop token; the others were cut off.

    Args:
        tokens: [B, T] int64; mask: [B, T] bool.
    Returns:
        [B] bool; False for an empty response.
    """
    return (is_stop(tokens, stop_ids) & mask).any(-1)


def last_token(mask: Tensor) -> Tensor:
    """One-hot mask of the last real token: [B, T] bool -> [B, T] bool; all False for an empty row."""
    position = torch.arange(mask.shape[-1], device=mask.device)
    return mask & (position == (lengths(mask) - 1).unsqueeze(-1))


def is_contiguous(mask: Tensor) -> Tensor:
    """True for rows whose mask is a run of True followed by False: [B, T] -> [B] bool.

    A mask with holes has no honest reading; such rows become unscorable.
    """
    return (mask[..., 1:] <= mask[..., :-1]).all(-1)


def is_left_padded(mask: Tensor) -> Tensor:
    """True for prompt masks that are a run of False followed by True: [B, P] -> [B] bool."""
    return (mask[..., 1:] >= mask[..., :-1]).all(-1)
