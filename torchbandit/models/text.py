"""The text side of a model of text and images (or sound): a causal language model of its own.

It is trained, scored and saved like any other, as a folder that holds text alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from torchbandit.models.spec import first_line

SAME_ON_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text sides without a causal class, and the architecture that they are on text: its rotary embedding turns by one
position, theirs by three that are the same on text."""


def whole_class(config: Any) -> Any:
    """The auto class that opens a model of more than text; None of a model of text."""
    inner = config.get_text_config(decoder=True)
    if inner is config or inner.model_type == config.model_type or getattr(config, "is_encoder_decoder", False):
        return None
    found = (
        auto for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM) if type(config) in auto._model_mapping
    )
    return next(found, None)


def text_config(config: Any, name: str) -> Any:
    """The config of the text side as a causal language model.

    Raises:
        ValueError: transformers has no such language model.
    """
    inner = copy.deepcopy(config.get_text_config(decoder=True))
    if inner.model_type in SAME_ON_TEXT:
        given = {key: value for key, value in inner.to_dict().items() if key != "model_type"}
        rope = {k: v for k, v in (given.get("rope_parameters") or {}).items() if not k.startswith("mrope")}
        rope = {k: "default" if v == "mrope" else v for k, v in rope.items()}
        given["norm_topk_prob"] = True  # of experts, if any: theirs always are, Qwen3-MoE's as the config says
        inner = CONFIG_MAPPING[SAME_ON_TEXT[inner.model_type]](**(given | {"rope_parameters": rope}))
    if type(inner) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"model {name}: its text side ({inner.model_type}) must be a causal language model that "
                         f"transformers has alone, got none for {config.model_type}; use a text model")  # fmt: skip
    inner.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", inner.tie_word_embeddings))
    return inner


def name_base(model: PreTrainedModel) -> None:
    """Let `base_model` find the decoder of a model whose class gives another name than its attribute's (Llama-4)."""
    if not hasattr(model, model.base_model_prefix):
        inside = [name for name, module in model.named_children() if isinstance(module, PreTrainedModel)]
        model.base_model_prefix = inside[0] if len(inside) == 1 else model.base_model_prefix


def text_side(whole: PreTrainedModel, name: str) -> PreTrainedModel:
    """A causal language model over the tensors of `whole`'s text side.

    Raises:
        ValueError: it holds other weights, or says something else of a text than `whole`.
    """
    config = text_config(whole.config, name)
    decoder = whole.get_decoder()
    head = whole.get_output_embeddings() or decoder.get_output_embeddings()
    if decoder.get_output_embeddings() is not None:  # a language model of its own inside `whole`
        name_base(decoder)
        decoder = decoder.base_model
    config.tie_word_embeddings = head is not None and head.weight is decoder.get_input_embeddings().weight
    with no_init_weights(), init_empty_weights(include_buffers=False):
        text: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    weights: dict[str, Any] = {}
    name_base(text)
    for part, own in ((decoder, text.base_model), (head, text.get_output_embeddings())):
        at = next(k for k, module in text.named_modules() if module is own)
        weights |= {f"{at}.{k}": w for k, w in (part.state_dict(keep_vars=True) if part is not None else {}).items()}
    kind = f"model {name}: its text side cannot be taken out of {type(whole).__name__}"
    try:
        text.load_state_dict(weights, assign=True)
        text.tie_weights()
        nn.Module.to(text, whole.device).eval()  # the buffers; the weights are there
        text.generation_config = whole.generation_config
        ids = torch.arange(3, 12, device=whole.device)[None] % int(config.vocab_size)
        with torch.no_grad():
            ours = text(input_ids=ids).logits.float()
            theirs = whole.eval()(input_ids=ids).logits.float()
    except Exception as error:
        raise ValueError(f"{kind} ({first_line(error)}); use a text model") from error
    bound = 1e-3 if whole.dtype == torch.float32 and not ours.is_cuda else 0.1
    if ours.shape != theirs.shape or not float((ours - theirs).norm() / theirs.norm()) < bound:
        raise ValueError(f"{kind}: as a {type(text).__name__} it gives other logits; use a text model")
    return text
