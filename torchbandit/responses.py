"""Where a response ends: stop masks, lengths, finish reasons. (B, T: see batch.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stop_ids_told(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a response, where neither `finished` nor an argument says it: those at which the policy stops that
    was built with this tokenizer, or else the tokenizer's eos.

    A tokenizer knows one eos; models with several (of their generation config) end responses with any of them.
    """
    told: tuple[int, ...] | None = getattr(tokenizer, _TOLD, None)
    if told is not None:
        return told
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)


def tell_stop_ids(tokenizer: Any, stop_ids: Sequence[int]) -> None:
    """Let all that reads responses in this tokenizer's ids know where its policy stops."""
    setattr(tokenizer, _TOLD, tuple(stop_ids))


_TOLD = "_torchbandit_stops"


def is_stop(tokens: Tensor, stop_ids: Sequence[int] | Tensor) -> Tensor:
    """True where a token is one of `stop_ids`; bool of tokens' shape, no sync.

    Args:
        tokens: int64, any shape.
        stop_ids: ids that end a response; a tensor (on tokens' device) costs no copy.
    """
    if isinstance(stop_ids, Tensor) and stop_ids.numel() > 8:  # torch.isin would wait for the device
        known = stop_ids.sort().values
        return known[torch.searchsorted(known, tokens).clamp_max_(len(known) - 1)] == tokens
    # Comparing with a few, one by one, is ten times as fast as isin on a CPU.
    stops: Sequence[int | Tensor] = stop_ids.unbind() if isinstance(stop_ids, Tensor) else stop_ids
    hit: Tensor | None = None
    for stop in stops:
        hit = tokens == stop if hit is None else hit | (tokens == stop)
    return torch.zeros_like(tokens, dtype=torch.bool) if hit is None else hit


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
    return mask.sum(-1, dtype=torch.int32).long()  # half the time of a sum in int64, on a CPU


def any_row(x: Tensor) -> Tensor:
    """`x.any(-1)` of a bool tensor, as the largest byte of a row: a quarter of the time on a CPU."""
    return x.view(torch.uint8).amax(-1).view(torch.bool) if x.shape[-1] else x.any(-1)


def has_stopped(tokens: Tensor, mask: Tensor, stop_ids: Sequence[int] | Tensor) -> Tensor:
    """True for rows whose last real token is a stop token; the others were cut off.

    Args:
        tokens: [B, T] int64; mask: [B, T] bool.
    Returns:
        [B] bool; False for an empty response.
    """
    if not mask.shape[-1]:
        return mask.any(-1)
    last = (lengths(mask) - 1).unsqueeze(-1)
    return is_stop(tokens.gather(-1, last.clamp(min=0)), stop_ids).squeeze(-1) & (last >= 0).squeeze(-1)


def last_token(mask: Tensor) -> Tensor:
    """One-hot mask of the last real token: [B, T] bool -> [B, T] bool; all False for an empty row."""
    position = torch.arange(mask.shape[-1], device=mask.device)
    return mask & (position == (lengths(mask) - 1).unsqueeze(-1))


def is_contiguous(mask: Tensor) -> Tensor:
    """True for rows whose mask is a run of True followed by False: [B, T] -> [B] bool.

    A mask with holes has no honest reading; such rows become unscorable.
    """
    return ~any_row(mask[..., 1:] > mask[..., :-1])


def is_left_padded(mask: Tensor) -> Tensor:
    """True for prompt masks that are a run of False followed by True: [B, P] -> [B] bool."""
    return ~any_row(mask[..., 1:] < mask[..., :-1])
