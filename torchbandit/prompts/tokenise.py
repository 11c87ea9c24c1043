"""Texts and chats to token ids, once, when a PromptSet is made."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Where = Callable[[int], str]
"""Index of a prompt -> the place a user knows it by: `prompts.jsonl:7` or `texts[6]`."""

CHUNK = 16_384
"""Texts tokenised in one call: enough to keep a fast tokenizer's threads busy, few enough to bound the memory."""


class Tokenised(NamedTuple):
    flat: Tensor  # [sum of lengths] int64 on the CPU, prompt after prompt
    lengths: Tensor  # [N] int64 on the CPU
    texts: list[str]  # what the policy reads: rendered, cut
    num_cut: int


def tokenise(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, max_length: int, chat: bool, where: Where
) -> Tokenised:
    """Token ids of each prompt, with the special tokens in front that the model was trained with, once.

    A text gets what the tokenizer puts in front of one (usually a BOS), unless it begins with that already; what the
    tokenizer puts behind (an EOS) is left out, for a prompt is to be continued. A chat gets what its template says
    and no more, as in `apply_chat_template(tokenize=True)`.

    Args:
        prompts: strings, or lists of messages `{"role": ..., "content": ...}`, which always go through the template.
        max_length: longer prompts keep their end, and their BOS; a warning says how many.
        chat: strings go through the template too, each as one user message.
    Raises:
        ValueError: names the place of the offending prompt.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length: must be an int of at least 1 (tokens of a prompt), got {max_length!r}")
    is_chat = [_is_chat(prompt, chat, where, i) for i, prompt in enumerate(prompts)]
    if any(is_chat) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where(is_chat.index(True))}: is to be rendered by the tokenizer's chat template, and the tokenizer has "
            "none; set tokenizer.chat_template, or give plain texts with chat=False"
        )
    texts = [_render(p, tokenizer, where, i) if is_chat[i] else str(p) for i, p in enumerate(prompts)]
    prefix = _prefix(tokenizer, texts)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    flat, lengths = array("q"), array("q")  # lists of 20 million ints would cost 0.7 GB
    longest = num_cut = 0
    for first in range(0, len(texts), CHUNK):
        for ids in _bare(tokenizer, texts[first : first + CHUNK]):
            i = len(lengths)
            if not is_chat[i] and ids[: len(prefix)] != prefix:
                ids = prefix + ids
            if not ids:
                raise ValueError(f"{where(i)}: must hold at least one token, got {texts[i]!r}; leave this prompt out")
            if len(ids) > max_length:
                longest, num_cut = max(longest, len(ids)), num_cut + 1
                head = next((h for h in (prefix, bos) if h and ids[: len(h)] == h and len(h) < max_length), [])
                tail = ids[len(ids) - (max_length - len(head)) :]
                ids, texts[i] = head + tail, str(tokenizer.decode(tail))
            flat.extend(ids)
            lengths.append(len(ids))
    if num_cut:
        warnings.warn(
            f"max_length: {num_cut} of {len(lengths)} prompts are longer than {max_length} tokens (the longest has "
            f"{longest}) and were cut to their last {max_length}; raise max_length to keep them whole",
            stacklevel=4,
        )
    return Tokenised(as_tensor(flat), as_tensor(lengths), texts, num_cut)


def as_tensor(ints: array[int]) -> Tensor:
    """[n] int64 over the memory of an array of type "q"."""
    return torch.frombuffer(ints, dtype=torch.int64) if ints else torch.empty(0, dtype=torch.int64)


def _is_chat(prompt: Any, chat: bool, where: Where, i: int) -> bool:
    if isinstance(prompt, str):
        return chat
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        return True
    got = repr(prompt)
    raise ValueError(
        f'{where(i)}: the prompt must be a string, or a list of messages {{"role": ..., "content": ...}}, '
        f"got {type(prompt).__name__} {got if len(got) < 80 else got[:77] + '...'}"
    )


def _render(prompt: Any, tokenizer: PreTrainedTokenizerBase, where: Where, i: int) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what it likes: of jinja2, TypeError, KeyError
        raise ValueError(f"{where(i)}: the tokenizer's chat template cannot render this prompt: {error}") from error


def _bare(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The special ids that the tokenizer puts in front of a text."""
    for probe in ("a", *texts):  # a tiny vocabulary may not know "a"
        bare = _bare(tokenizer, [probe])[0]
        if bare and bare[0] != tokenizer.bos_token_id:
            break
    else:
        return []
    full = list(tokenizer(probe, verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise ValueError(
        f"tokenizer: adding special tokens changes the other tokens of {probe!r} ({bare} becomes {full}), so no BOS "
        "can be told; tokenise yourself and use PromptSet.from_tokens"
    )
