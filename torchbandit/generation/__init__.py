"""The decode loop: prompts in, sampled responses with their log-probs out, all on the device.

sampling.py   what a user asks for, and how one token is drawn
plain.py      a batched loop over any transformers causal LM
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchbandit.generation.plain import generate_plain
from torchbandit.generation.sampling import Generated, Sampling

__all__ = ["Generated", "Sampling", "generate"]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None,
    group_size: int = 1,
) -> Generated:
    """Sample one response a row.

    Nothing of the model's `generation_config` is read. Rows that have stopped are padded.

    Args:
        model: a causal LM of transformers; it runs in eval mode, whatever mode it is in.
        prompt_ids: [B, P] int64; prompt_mask: [B, P] bool, the only truth about padding; every row has a real token.
        sampling: length, temperature, truncation. Its own `stop_ids`, if any, take the place of `stop_ids`.
        stop_ids: ids that end a response; the stop token belongs to the response. None of them: nothing stops.
        pad_id: fills the tokens after the stop.
        generator: on prompts' device; None takes torch's global one. Not used at temperature 0.
        group_size: siblings are contiguous and have the same prompt; its prefill is computed once.
    Returns:
        Generated, with T = `sampling.max_new_tokens`.
    Raises:
        ValueError: a shape, dtype or device does not fit, or the prompt and response exceed the model's context.
    """
    _check(model, prompt_ids, prompt_mask, sampling, generator, group_size)
    stops = tuple(stop_ids if sampling.stop_ids is None else sampling.stop_ids)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        return generate_plain(model, prompt_ids, prompt_mask, sampling, stops, pad_id, generator, group_size)
    finally:
        if was_training:
            model.train()


def _check(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    group_size: int,
) -> None:
    if prompt_ids.dim() != 2 or prompt_ids.dtype != torch.int64 or 0 in prompt_ids.shape:
        raise ValueError(f"prompt_ids: must be int64 [B, P] and not empty, got {_meta(prompt_ids)}")
    if (prompt_mask.shape, prompt_mask.dtype, prompt_mask.device) != (prompt_ids.shape, torch.bool, prompt_ids.device):
        want = f"bool {list(prompt_ids.shape)} on {prompt_ids.device}"
        raise ValueError(f"prompt_mask: must be {want}, got {_meta(prompt_mask)}")
    if prompt_ids.device != model.device:
        raise ValueError(
            f"prompt_ids: must be on the model's device {model.device}, got {prompt_ids.device}; move them"
        )
    if generator is not None and generator.device.type != prompt_ids.device.type:
        raise ValueError(
            f"generator: must live on {prompt_ids.device.type}, got {generator.device}; "
            f'make it with torch.Generator("{prompt_ids.device.type}")'
        )
    if group_size < 1 or prompt_ids.shape[0] % group_size:
        raise ValueError(f"group_size: must be at least 1 and divide the {prompt_ids.shape[0]} rows, got {group_size}")
    context = getattr(model.config, "max_position_embeddings", None)
    need = prompt_ids.shape[1] + sampling.max_new_tokens - 1  # the last token is never fed back
    if isinstance(context, int) and need > context:
        raise ValueError(
            f"max_new_tokens: prompt width {prompt_ids.shape[1]} plus {sampling.max_new_tokens} new tokens exceed the "
            f"model's context of {context}; shorten the prompts (PromptSet's max_length) or ask for fewer new tokens"
        )


def _meta(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
