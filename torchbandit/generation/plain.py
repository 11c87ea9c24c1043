"""A batched decode loop over any transformers causal LM: its own forward, its own growing cache.

A model that keeps nothing in the cache it is handed (some recurrent ones have a way of their own) reads the whole row
again for each token: slow, and right.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from torchbandit.generation.sampling import Generated, Sampling, draw, uniforms
from torchbandit.responses import is_stop

LOOK_EVERY = 8
"""Tokens between two looks at whether all rows have stopped; on a CPU a look is free."""


def generate_plain(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    generator: torch.Generator | None,
    group_size: int,
) -> Generated:
    """Sample a response a row; arguments and result as `generate`, checked by it."""
    device, B, T = prompt_ids.device, prompt_ids.shape[0], sampling.max_new_tokens
    ids, mask = left_padded(prompt_ids[::group_size], prompt_mask[::group_size])
    length = mask.sum(-1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    uniform = uniforms(B, sampling, device, generator)
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    logits = out.logits[:, -1]
    kept = any(isinstance(x, Tensor) for layer in cache.layers for x in vars(layer).values())
    if not kept:
        name = type(model).__name__
        warnings.warn(f"{name} leaves the cache that it is given empty: each token reads its whole row", stacklevel=2)
    if group_size > 1:
        if kept:
            cache.batch_repeat_interleave(group_size)
        ids, logits, mask, length = (x.repeat_interleave(group_size, 0) for x in (ids, logits, mask, length))
    P = mask.shape[1]
    seen = torch.cat((mask, mask.new_ones(B, T)), 1).long()  # what a token may attend to, sliced as the cache grows

    tokens = torch.full((B, T), pad_id, dtype=torch.int64, device=device)
    alive = torch.zeros(B, T, dtype=torch.bool, device=device)
    log_probs = torch.zeros(B, T, dtype=torch.float32, device=device)
    running = torch.ones(B, dtype=torch.bool, device=device)
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    for t in range(T):
        token, log_prob = draw(logits, sampling, None if uniform is None else uniform[:, t])
        tokens[:, t] = torch.where(running, token, pad_id)
        log_probs[:, t] = torch.where(running, log_prob, 0.0)
        alive[:, t] = running
        running = running & ~is_stop(token, stop_ids)
        if t == T - 1 or ((t + 1) % look_every == 0 and stop_ids and not running.any()):
            break
        upto = seen[:, : P + t + 1]
        if kept:
            out = model(
                input_ids=token.unsqueeze(1), attention_mask=upto, position_ids=(length + t).unsqueeze(1),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        else:
            ids = torch.cat((ids, token.unsqueeze(1)), 1)
            out = model(
                input_ids=ids, attention_mask=upto, position_ids=(upto.cumsum(-1) - 1).clamp_min(0), use_cache=False,
                logits_to_keep=1,
            )  # fmt: skip
        logits = out.logits[:, -1]
    return Generated(tokens, alive, log_probs, ~running)


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens moved to the right end, in order, wherever the padding stood: [B, P] -> [B, P], no sync."""
    order = mask.byte().argsort(dim=-1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
