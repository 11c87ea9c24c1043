"""The attention that scoring runs transformers' models with, registered in their attention interface.

It is causal, needs no mask, and reads from `segments` (a keyword argument that models pass through) where sequences
begin. Without segments lines are padded on the right, where causality alone keeps padding from real tokens. That no
mask function is registered under its name makes transformers build none, and spares the sync its check would cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "torchbandit"

# What models pass to attention that changes nothing here. Anything else that is set (a soft cap, attention sinks, a
# position bias) is beyond this attention, and says so instead of being dropped.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "is_causal", "past_key_values", "position_embeddings", "layer_idx", "logits_to_keep",
}  # fmt: skip

calls = 0
"""How often attention ran; the probe reads it."""


class UnsupportedAttention(Exception):
    """A model asks of attention what this one cannot do; it is scored padded, with its own."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Any = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query [lines, heads, W, D], key and value [lines, KV heads, W, D] -> [lines, W, heads, D]."""
    if attention_mask is not None or dropout or extra.get("is_causal") is False or query.shape[2] != key.shape[2]:
        raise UnsupportedAttention("attention other than causal self-attention")
    for name, setting in extra.items():
        if setting is not None and name not in _HARMLESS:
            raise UnsupportedAttention(f"an attention option, {name}")
    return _right_padded(query, key, value, scaling, sliding_window).transpose(1, 2), None


def _right_padded(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    W = query.shape[2]
    mask = None
    if window is not None and window < W:
        at = torch.arange(W, device=query.device)
        mask = (at[:, None] >= at) & (at[:, None] - at < window)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


@contextlib.contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` with this attention inside the block, and with its own again after it."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(c, c._attn_implementation_internal) for c in configs.values()]
    for config, _ in before:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


AttentionInterface.register(NAME, attention)
