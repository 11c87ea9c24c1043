"""Texts and chats to token ids, once, when a PromptSet is made."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchbandit.prompts.chat import Chats
from torchbandit.prompts.options import PromptOptions
from torchbandit.prompts.records import Records
from torchbandit.read import check_text
from torchbandit.texts import texts_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 16_384
"""Texts tokenised in one call: enough to keep a fast tokenizer's threads busy, few enough to bound the memory."""


class Tokenised(NamedTuple):
    flat: Tensor  # [sum of lengths] int64 on the CPU, prompt after prompt
    lengths: Tensor  # [n] int64 on the CPU
    texts: list[str]  # what the policy reads: rendered, cut
    kept: list[int]  # which of the records they are
    num_cut: int
    rendered_at: int | None  # the time that the chat template was told, if it asked


def tokenise(
    records: Records, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, options: PromptOptions
) -> Tokenised:
    """Token ids of each prompt, with the special tokens in front that the model was trained with, once.

    A text gets what the tokenizer puts in front of one (usually a BOS), unless it begins with that already; what the
    tokenizer puts behind (an EOS) is left out, for a prompt is to be continued. A chat gets what its template says
    and no more, as in `apply_chat_template(tokenize=True)`.

    Args:
        records: prompts that can be used (see `records.usable`).
        max_length: most tokens of a prompt, or None; what becomes of longer ones says `options.overlong`, and a
            warning says how many.
    Raises:
        ValueError: names the place of the offending prompt.
    """
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length: must be an int of at least 1 (tokens of a prompt), got {max_length!r}")
    chats = Chats(records, tokenizer, options)
    texts = [chats.render(i) if chats.is_chat[i] else str(prompt) for i, prompt in enumerate(records.prompts)]
    for i, text in enumerate(texts):
        if chats.is_chat[i]:
            check_text(text, records.places[i], "prompt")
    prefix = _prefix(tokenizer, texts)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    flat, lengths, kept = array("q"), array("q"), list[int]()  # lists of 20 million ints would cost 0.7 GB
    long: list[int] = []
    longest = 0
    for first in range(0, len(texts), CHUNK):
        for i, ids in enumerate(_bare(tokenizer, texts[first : first + CHUNK]), first):
            if not chats.is_chat[i] and ids[: len(prefix)] != prefix:
                # A text that brings its BOS lacks the rest of the prefix, if there is any.
                ids = prefix + ids[len(bos) if bos and prefix[:1] == bos == ids[:1] else 0 :]
            if not ids:
                raise ValueError(
                    f"{records.places[i]}: must hold at least one token, got {texts[i]!r}; leave this prompt out"
                )
            if max_length is not None and len(ids) > max_length:
                longest = max(longest, len(ids))
                long.append(i)
                what = options.overlong or ("error" if chats.is_chat[i] else "cut")
                if what != "cut":
                    continue
                head = next((h for h in (prefix, bos) if h and ids[: len(h)] == h and len(h) < max_length), [])
                start = len(ids) - (max_length - len(head))
                texts[i] = texts_after(tokenizer, [ids[:start]], [ids[start:]])[0]
                ids = head + ids[start:]
            flat.extend(ids)
            lengths.append(len(ids))
            kept.append(i)
    left_out = len(texts) - len(kept)
    if long:
        _report(records, long, left_out, max_length, longest, options)
    return Tokenised(
        as_tensor(flat), as_tensor(lengths), [texts[i] for i in kept], kept, len(long) - left_out, chats.rendered_at
    )


def _report(
    records: Records, long: list[int], left_out: int, limit: int | None, longest: int, options: PromptOptions
) -> None:
    """Say what became of prompts that are too long.

    Raises:
        ValueError: they are an error, or none is left.
    """
    told = (
        f"max_length: {len(long)} of {len(records.prompts)} prompts are longer than {limit} tokens (the longest has "
        f"{longest})"
    )
    if left_out and (options.overlong != "drop" or left_out == len(records.prompts)):
        raise ValueError(
            f"{told}, the first is {records.places[long[0]]}; raise max_length, leave them out with "
            'overlong="drop", or cut them to their last tokens with overlong="cut", which lets a chat begin in the '
            "middle of a turn"
        )
    what = "left out" if left_out else f"cut to their last {limit}"
    warnings.warn(f"{told} and were {what}; raise max_length to keep them whole", stacklevel=5)


def as_tensor(ints: array[int]) -> Tensor:
    """[n] int64 over the memory of an array of type "q"."""
    return torch.frombuffer(ints, dtype=torch.int64) if ints else torch.empty(0, dtype=torch.int64)


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
