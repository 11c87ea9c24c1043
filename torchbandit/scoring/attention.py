"""The attention that scoring runs transformers' models with, registered in their attention interface.

It is causal, needs no mask, and reads from `segments` (a keyword argument that models pass through) where sequences
begin. Without segments lines are padded on the right, where causality alone keeps padding from real tokens. That no
mask function is registered under its name makes transformers build none, and spares the sync its check would cost.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from torchbandit.scoring.packs import Segments, SharedPrompt, size_carrier
from torchbandit.scoring.varlen import shared_backward, shared_forward, varlen_backward, varlen_forward

NAME = "torchbandit"

# What models pass to attention that changes nothing here. Anything else that is set (a soft cap, attention sinks, a
# position bias) is beyond this attention, and says so instead of being dropped.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
    "is_causal", "past_key_values", "position_embeddings", "layer_idx", "logits_to_keep",
}  # fmt: skip


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
    segments: Segments | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query [lines, heads, W, D], key and value [lines, KV heads, W, D] -> [lines, W, heads, D]."""
    if attention_mask is not None or dropout or extra.get("is_causal") is False or query.shape[2] != key.shape[2]:
        raise UnsupportedAttention("attention other than causal self-attention without dropout")
    for name, setting in extra.items():
        if setting is not None and name not in _HARMLESS:
            raise UnsupportedAttention(f"the attention option {name}")
    if scaling is None:
        scaling = float(query.shape[-1] ** -0.5)
    if segments is None:
        return _right_padded(query, key, value, scaling, sliding_window).transpose(1, 2), None
    flat_query, flat_key, flat_value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # Where rotation left heads outermost (GPT-NeoX), a compiler writes token by token at once, and nothing is copied.
    out: Tensor = _Packed.apply(  # type: ignore[no-untyped-call]
        flat_query.contiguous(),
        flat_key.contiguous(),
        flat_value,
        segments.starts,
        segments.longest,
        segments.shared,
        scaling,
        sliding_window or 0,
    )
    return out.unsqueeze(0), None


def _right_padded(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    W = query.shape[2]
    if window is not None and window < W and query.device.type == "cpu":
        return _windowed(query, key, value, scaling, window)
    mask = None
    if window is not None and window < W:
        at = torch.arange(W, device=query.device)
        mask = (at[:, None] >= at) & (at[:, None] - at < window)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _windowed(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
    """The lines as segments of one length: nothing grows with the square of it, as a mask would."""
    lines, _, W, _ = query.shape
    starts = torch.arange(lines + 1, dtype=torch.int32) * W
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out: Tensor = _Packed.apply(*flat, starts, size_carrier(W), None, scaling, window)  # type: ignore[no-untyped-call]
    by_line: Tensor = out.unflatten(0, (lines, W))
    return by_line.transpose(1, 2)


class _Packed(torch.autograd.Function):
    """Attention over one packed line: query [W, heads, D], key and value [W, KV heads, D] -> [W, heads, D].

    With shared prompts a response token has two parts of keys: its own response (causal, as the prompts' own) and its
    group's prompt.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Tensor,
        shared: SharedPrompt | None, scaling: float, window: int,
    ) -> Tensor:  # fmt: skip
        if shared is None:
            out, lse = varlen_forward(query, key, value, starts, starts, longest, longest, True, scaling, window)
        else:
            out, lse = shared_forward(query, key, value, starts, longest, *shared, scaling)
        ctx.save_for_backward(query, key, value, out, lse, starts, longest, *(shared or ()))
        ctx.scaling, ctx.window = scaling, window
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, starts, longest, *shared = ctx.saved_tensors
        if shared:
            dq, dk, dv = shared_backward(grad, query, key, value, out, lse, starts, longest, *shared, ctx.scaling)
        else:
            dq, dk, dv = varlen_backward(
                grad, query, key, value, out, lse, starts, starts, longest, longest, True, ctx.scaling, ctx.window
            )
        return dq, dk, dv, None, None, None, None, None


@contextlib.contextmanager
def installed(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Run `model` with this attention inside the block, and with its own again after it."""
    before = [(c, c._attn_implementation_internal) for c in _configs(model)]
    for config, _ in before:
        config._attn_implementation_internal = name
    again = checkpointed(model)
    own_function = [m._gradient_checkpointing_func for m in again]
    for module in again:
        # A layer is computed again in backward, long after this block: the attention must come along.
        module._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), installed(model, name))
        )
    try:
        yield
    finally:
        for module, function in zip(again, own_function, strict=True):
            module._gradient_checkpointing_func = function
        for config, own in before:
            config._attn_implementation_internal = own


# Found once: walking a model's modules takes longer than launching one of its layers.
_found_configs: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
_found_blocks: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()


def _configs(model: PreTrainedModel) -> list[Any]:
    """The model's own config first, then those of the models inside it."""
    found = _found_configs.get(model)
    if found is None or found[0] is not model.config:
        inside = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
        found = _found_configs[model] = list(({id(model.config): model.config} | inside).values())
    return found


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, in order."""
    found = _found_blocks.get(model)
    if found is None:
        found = _found_blocks[model] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return found


def checkpointed(model: PreTrainedModel) -> list[Any]:
    """Modules that will drop activations and compute them again: those asked to, in training, with gradient."""
    if not (model.training and torch.is_grad_enabled()):
        return []
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]


AttentionInterface.register(NAME, attention)
