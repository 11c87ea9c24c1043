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
    evaluating,
    keep_steady,
    load_causal_lm,
    load_reward_model,
    load_value_head,
    quiet_bars,
    save_model,
    save_value_head,
    wants_compile,
)
from torchbandit.models.sharing import check_apart
from torchbandit.models.spec import ModelLike, ModelSpec, Quantization
from torchbandit.models.tokenizers import (
    check_embeddings,
    check_same_tokenizer,
    load_tokenizer,
    num_ids,
    stop_ids_of,
    with_pad,
)

__all__ = [
    "ModelLike",
    "ModelSpec",
    "Quantization",
    "causal_lm_on",
    "check_apart",
    "check_embeddings",
    "check_same_tokenizer",
    "context_length",
    "disable_dropout",
    "dropout_in",
    "empty_causal_lm",
    "empty_reward_model",
    "evaluating",
    "keep_steady",
    "load_causal_lm",
    "load_reward_model",
    "load_tokenizer",
    "load_value_head",
    "num_ids",
    "quiet_bars",
    "reward_model_on",
    "save_model",
    "save_value_head",
    "stop_ids_of",
    "wants_compile",
    "with_pad",
    "without_adapter",
]
