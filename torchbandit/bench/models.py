"""The shapes that are measured, with random weights, and a tokenizer of plain words."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256},
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
             "intermediate_size": 4096, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512},
}  # fmt: skip


def llama(shape: str, **more: Any) -> LlamaConfig:
    """The configuration of one of SHAPES; untied, with room for 8192 tokens."""
    settings: dict[str, Any] = dict(SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    return LlamaConfig(**(settings | more))


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words "t0" to "t<size - 1>"; "t0" pads and "t2" ends."""
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t2", pad_token="t0", padding_side="left")
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made
