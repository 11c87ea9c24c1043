"""Tiny random models and a byte tokenizer, built in code: tests download nothing."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from torchbandit.responses import stop_mask

ARCHS = ("gpt2", "llama", "qwen2", "neox")
"""Learned positions; RoPE with grouped KV heads; the same with biases; parallel residual."""


def byte_tokenizer(pad_is_eos: bool = False, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """256 byte tokens, then <pad>, <bos>, <eos>: vocabulary 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
        padding_side=padding_side,
        model_max_length=512,
    )


def tiny_config(arch: str, vocab_size: int = 259, **overrides: object) -> PreTrainedConfig:
    """Two layers, hidden 32, four heads (two KV heads where the architecture has them)."""
    rope = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    special = dict(pad_token_id=None, bos_token_id=None, eos_token_id=vocab_size - 1)
    if arch == "gpt2":
        gpt2 = dict(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=256)
        return GPT2Config(**(gpt2 | special | overrides))
    if arch == "neox":
        return GPTNeoXConfig(**(rope | special | overrides))
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[arch]
    return kind(**(rope | special | dict(num_key_value_heads=2) | overrides))


def tiny_lm(arch: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random causal LM in fp32 with weights large enough that every token matters."""
    return _build(AutoModelForCausalLM, tiny_config(arch, **overrides), seed)


def tiny_reward_model(arch: str = "llama", seed: int = 1, **overrides: object) -> PreTrainedModel:
    """A random one-label sequence classifier in fp32."""
    return _build(AutoModelForSequenceClassification, tiny_config(arch, **({"num_labels": 1} | overrides)), seed)


def _build(kind: type, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def fake_batch(
    num_prompts: int = 4, group_size: int = 2, prompt_width: int = 9, response_width: int = 7,
    vocab_size: int = 259, seed: int = 0, empty_rows: int = 0, pad_id: int = 0,
) -> TensorDict:  # fmt: skip
    """A batch with ragged prompts (left-padded) and responses (right-padded, some cut, some stopped by the
    last id of the vocabulary); the last `empty_rows` rows have an empty response."""
    gen = torch.Generator().manual_seed(seed)
    B = num_prompts * group_size
    prompt_lengths = torch.randint(1, prompt_width + 1, (num_prompts,), generator=gen)
    prompt_lengths[0] = prompt_width
    prompt = torch.randint(1, vocab_size - 3, (num_prompts, prompt_width), generator=gen)
    prompt_mask = torch.arange(prompt_width) >= (prompt_width - prompt_lengths)[:, None]
    prompt = torch.where(prompt_mask, prompt, pad_id)
    response = torch.randint(1, vocab_size - 3, (B, response_width), generator=gen)
    stop_at = torch.randint(0, response_width + 2, (B,), generator=gen)
    response = torch.where(torch.arange(response_width) == stop_at[:, None], vocab_size - 1, response)
    mask = stop_mask(response, [vocab_size - 1])
    if empty_rows:
        mask[-empty_rows:] = False
    response = torch.where(mask, response, pad_id)

    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(group_size, 0)

    return TensorDict(
        {
            "tokens": {"prompt": repeat(prompt), "response": response},
            "masks": {"prompt": repeat(prompt_mask), "response": mask},
            "prompt_id": repeat(torch.arange(num_prompts)),
            "group_id": repeat(torch.arange(num_prompts)),
        },
        batch_size=[B],
    )
