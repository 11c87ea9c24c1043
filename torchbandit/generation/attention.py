"""Attention of one new token a lane over the cache, registered in transformers' attention interface.

The heads that share a key are viewed as that key's queries, [n, K, heads/K, D], so no key is ever repeated. On CUDA
a kernel reads each lane's own stretch of the cache and pays for no mask; elsewhere it is SDPA over the part in use.
(Axis letters: see cache.py.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from torchbandit.generation.cache import Unfit, keys_and_values

NAME = "torchbandit_decode"

# Options that some models hand to their attention and that change its result; this attention knows none of them.
_CHANGES_RESULT = ("softcap", "s_aux", "position_bias")  # a sliding window: see cache.layer_shapes


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | tuple[Tensor, Tensor],
    value: Tensor | tuple[Tensor, Tensor],
    attention_mask: Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [n, heads, 1, D] over key and value [n, K, L, D] -> [n, 1, heads, D], under an additive mask [n, 1, 1, L].

    Where `attention_mask` is int32, [n, 1, 1, 2], it holds each lane's place and length, and key and value are pairs:
    the new token's [n, K, 1, D], and the cache that it is yet to be written to.
    """
    for name in _CHANGES_RESULT:
        if options.get(name) is not None:
            raise Unfit(f"{type(module).__name__} uses {name}")
    n, heads, _, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    if isinstance(key, tuple):
        (new_key, cache), (new_value, _) = key, value
        K = new_key.shape[1]  # the cache's is a symbol to the compiler
        grouped = query.reshape(n, K, heads // K, size)
        out = torch.ops.torchbandit.append_attention(grouped, new_key, new_value, cache, attention_mask, scale)
    else:
        assert isinstance(value, Tensor)
        grouped = query.reshape(n, key.shape[1], heads // key.shape[1], size)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
    return out.reshape(n, 1, heads, size), None


AttentionInterface.register(NAME, attend)


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, scale: float) -> Tensor:
    """query [n, K, heads/K, D]; keys, values [S+1, K, L, D]; lanes [n, 1, 1, 2] int32: place, and length less one.

    This is the reference, and what runs off CUDA.
    """
    place, last = lanes[:, 0, 0, 0].long(), lanes[:, 0, 0, 1]
    seen = torch.arange(keys.shape[2], device=keys.device) <= last[:, None]
    return F.scaled_dot_product_attention(
        query, keys[place], values[place], attn_mask=seen[:, None, None, :], scale=scale
    ).contiguous()


@torch.library.custom_op("torchbandit::append_attention", mutates_args=("cache",))
def append_attention(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, lanes: Tensor, scale: float) -> Tensor:
    """`decode_attention` over a layer's cache [S+1, L, K, 2, D], the new key and value [n, K, 1, D] written to their
    lanes' places first."""
    place, last = lanes[:, 0, 0, 0].long(), lanes[:, 0, 0, 1].long()
    cache[place, last] = torch.stack((key[:, :, 0], value[:, :, 0]), 2)
    return decode_attention(query, *keys_and_values(cache), lanes, scale)


@append_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, lanes: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@append_attention.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, cache: Tensor, lanes: Tensor, scale: float) -> Tensor:
    from torchbandit.generation import kernels  # Triton exists with CUDA alone

    return kernels.decode_attention(query, *keys_and_values(cache), lanes, scale, (key, value))


@contextlib.contextmanager
def decode_mode(model: PreTrainedModel) -> Iterator[None]:
    """`model` attends through `attend` inside the block, and as before after it."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
