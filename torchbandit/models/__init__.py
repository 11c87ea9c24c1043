"""Where weights come from and in what precision: causal LMs, reward models, tokenizers.

Safetensors only, no remote code, dropout off, no gradient unless asked for.
"""

from torchbandit.models.adapters import causal_lm_on, reward_model_on, without_adapter
from torchbandit.models.load import (
    context_length,
    disable_dropout,
    dropout_in,
    empty_causal_lm,
    empty_reward_model,
    load_causal_lm,
    load_reward_model,
    quiet_bars,
    wants_compile,
)
from torchbandit.models.spec import ModelLike, ModelSpec, Quantization
from torchbandit.models.tokenizers import check_same_tokenizer, load_tokenizer, stop_ids_of, with_pad

__all__ = [
    "ModelLike",
    "ModelSpec",
    "Quantization",
    "causal_lm_on",
    "check_same_tokenizer",
    "context_length",
    "disable_dropout",
    "dropout_in",
    "empty_causal_lm",
    "empty_reward_model",
    "load_causal_lm",
    "load_reward_model",
    "load_tokenizer",
    "quiet_bars",
    "reward_model_on",
    "stop_ids_of",
    "wants_compile",
    "with_pad",
    "without_adapter",
]
