"""The decode loop: prompts in, sampled responses with their log-probs out, all on the device.

    sampling.py    what a user asks for, and how one token is drawn
    engine.py      who runs where and when: rows take turns in places, the batch shrinks as they stop
    step.py        one token for every lane: compiled, recorded and replayed on CUDA
    body.py        the model's layers compiled once for all of them, several at a time
    lanes.py       the running batch as tensors that move on by themselves
    attention.py   one new token over the cache, no key repeated, no mask paid for; kernels.py: its Triton kernel,
                   and that of the draw
    fuse.py        q, k and v, and gate and up, as one product each; gated_kernel.py: gate, up and their activation
    residual.py    residual sums as part of the products before them
    cache.py       keys and values by place
    plain.py       a loop over any transformers causal LM, for what the above cannot take
"""  # fmt: skip

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.generation.cache import LayerShape, Unfit, bytes_per_place, layer_shapes
from torchbandit.generation.engine import Engine
from torchbandit.generation.plain import generate_plain
from torchbandit.generation.sampling import Generated, Sampling
from torchbandit.models import evaluating

__all__ = ["Generated", "Sampling", "generate", "record_s", "release"]

_engines: WeakKeyDictionary[PreTrainedModel, Engine] = WeakKeyDictionary()
_unfit: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


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

    Nothing of the model's `generation_config` is read. Rows that have stopped are padded, and make room: for waiting
    rows, or for a smaller batch. What a row says depends on the generator and its index, not on who runs beside it.
    The cache, and on CUDA the recorded steps, are kept for the next call until `release`.

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
    with evaluating(model):
        if model not in _unfit:
            try:
                engine = _engine(model, prompt_ids.shape[0], prompt_ids.shape[1], sampling)
                return engine.run(model, prompt_ids, prompt_mask, sampling, stops, pad_id, generator, group_size)
            except Unfit as reason:
                _unfit[model] = str(reason)
                release(model)
                warnings.warn(f"generation takes the plain loop: {reason}", stacklevel=3)
        return generate_plain(model, prompt_ids, prompt_mask, sampling, stops, pad_id, generator, group_size)


def release(model: PreTrainedModel) -> None:
    """Free the cache, and the recorded steps, that `generate` keeps for `model`; it makes them anew when called."""
    _engines.pop(model, None)


def record_s(model: PreTrainedModel) -> float:
    """Seconds that compiling and recording steps for `model` have taken since its engine was made; 0.0 off CUDA."""
    engine = _engines.get(model)
    return 0.0 if engine is None else engine.stepper.record_s


def _engine(model: PreTrainedModel, num_rows: int, prompt_width: int, sampling: Sampling) -> Engine:
    width = sampling.max_new_tokens
    need = -(-(prompt_width + width) // 64) * 64
    engine = _engines.get(model)
    places = min(num_rows, sampling.places or num_rows)
    if engine is not None and engine.device == model.device and engine.dtype == model.dtype:
        places_do = engine.places >= places or (sampling.places is None and engine.all_that_is_free)
        if places_do and engine.capacity >= need and engine.width >= width:
            return engine
    release(model)
    del engine  # its memory counts as free below
    shapes = layer_shapes(model, need)
    all_that_is_free = False
    if sampling.places is None and model.device.type == "cuda":
        places, all_that_is_free = _affordable(shapes, need, places, model.device)
    engine = Engine(shapes, places, need, width, model.device, dtype=model.dtype)
    engine.all_that_is_free = all_that_is_free
    engine.stepper.probe(model)
    _engines[model] = engine
    return engine


def _affordable(shapes: list[LayerShape], capacity: int, wanted: int, device: torch.device) -> tuple[int, bool]:
    """How many of the wanted places fit into most of what is free, and whether that is fewer than wanted."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = 0.8 * (torch.cuda.mem_get_info(device)[0] + reusable)
    places = min(wanted, int(free // bytes_per_place(shapes, capacity)) - 1)
    if places < 1:
        raise ValueError(
            f"places: not one response of {capacity} tokens fits into the {free / 2**30:.2f} GiB that are free; "
            "ask for fewer new tokens, or free memory"
        )
    if places < wanted:
        warnings.warn(
            f"generation: {wanted} rows of {capacity} tokens exceed the {free / 2**30:.2f} GiB that it may take; "
            f"{places} run at a time, the others wait",
            stacklevel=4,
        )
    return places, places < wanted


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
    size = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    if (
        prompt_ids.device.type == "cpu" and not 0 <= int(prompt_ids.min()) <= int(prompt_ids.max()) < size
    ):  # a free look
        worst = next(i for i in prompt_ids.flatten().tolist() if not 0 <= i < size)
        raise ValueError(f"prompt_ids: must be in 0..{size - 1}, the model's embeddings, got {worst}; tokenise the "
                         "prompts with the model's own tokenizer")  # fmt: skip
    if generator is not None and generator.device.type != prompt_ids.device.type:
        raise ValueError(
            f"generator: must live on {prompt_ids.device.type}, got {generator.device}; "
            f'make it with torch.Generator("{prompt_ids.device.type}")'
        )
    if group_size < 1 or prompt_ids.shape[0] % group_size:
        raise ValueError(f"group_size: must be at least 1 and divide the {prompt_ids.shape[0]} rows, got {group_size}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    need = prompt_ids.shape[1] + sampling.max_new_tokens - 1  # the last token is never fed back
    if isinstance(context, int) and need > context:
        raise ValueError(
            f"max_new_tokens: prompt width {prompt_ids.shape[1]} plus {sampling.max_new_tokens} new tokens exceed the "
            f"model's context of {context}; shorten the prompts (PromptSet's max_length) or ask for fewer new tokens"
        )


def _meta(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
