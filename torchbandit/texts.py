"""What a model wrote, as text: the one place where the ids of a response become a string. (B, P, T: see batch.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase

from torchbandit.batch import FINISHED, PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK
from torchbandit.responses import stop_ids_told

REACH = 16
"""Tokens at the end of a prompt among which one is sought that has a text of its own."""


def response_texts(
    td: TensorDictBase, tokenizer: Any, rows: Sequence[int] | None = None, *, skip_special_tokens: bool = False
) -> list[str]:
    """The responses of a batch as the model wrote them. Leaves the device.

    A special token at the end that stopped the response (eos) says that it ends, and is no part of its text.

    Args:
        td: reads ("tokens","prompt") [B, P] and ("tokens","response") [B, T] int64, their masks, bool, and `finished`
            [B] bool (absent: a row is finished where one of the tokenizer's stop ids stands last).
        rows: which of the batch; None takes all.
        skip_special_tokens: leave all special tokens out, those within the response too.
    """
    chosen = list(range(len(td))) if rows is None else list(rows)
    tail, tail_mask = td[PROMPT][:, -REACH:].cpu(), td[PROMPT_MASK][:, -REACH:].cpu()
    tokens, mask = td[RESPONSE].cpu(), td[RESPONSE_MASK].cpu()
    finished = td.get(FINISHED, None)
    special, stops = _special(tokenizer), stop_ids_told(tokenizer)
    ids = [tokens[row][mask[row]].tolist() for row in chosen]
    if finished is None:
        ended = [bool(part) and part[-1] in stops for part in ids]
    else:
        ended = finished.cpu()[chosen].tolist()
    ids = [part[:-1] if done and part and part[-1] in special else part
           for done, part in zip(ended, ids, strict=True)]  # fmt: skip
    before = [tail[row][tail_mask[row]].tolist() for row in chosen]
    return texts_after(tokenizer, before, ids, skip_special_tokens=skip_special_tokens)


def texts_after(
    tokenizer: Any, before: Sequence[Sequence[int]], ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
) -> list[str]:
    """The text of token ids that follow others. Decoded alone, a continuation loses its first space with tokenizers
    of SentencePiece's kind; so it is decoded behind a token of what stands before it, whose text is then cut off.

    Args:
        before: for each, the ids in front of it; their end will do.
        ids: for each, the ids to decode.
        skip_special_tokens: leave special tokens out.
    """
    special = _special(tokenizer)
    anchors: dict[int, str] = {}

    def text(parts: Sequence[Sequence[int]]) -> list[str]:
        options = dict(skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return list(tokenizer.batch_decode([list(part) for part in parts], **options)) if parts else []

    def own_text(token: int) -> str:
        if token not in anchors:
            alone = "" if token in special else text([[token]])[0]
            anchors[token] = "" if "\ufffd" in alone else alone  # part of a character
        return anchors[token]

    def anchor(ids: Sequence[int]) -> int | None:
        return next((token for token in reversed(ids[-REACH:]) if own_text(token)), None)

    spare: list[int] = []
    if not all(anchor(row) is not None for row in before):
        spare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    found = [anchor(row) for row in before]
    found = [anchor(spare) if token is None else token for token in found]
    joined = text([[*([] if a is None else [a]), *row] for a, row in zip(found, ids, strict=True)])
    heads = ["" if a is None else own_text(a) for a in found]
    lost = [i for i, (whole, head) in enumerate(zip(joined, heads, strict=True)) if not whole.startswith(head)]
    alone = dict(zip(lost, text([ids[i] for i in lost]), strict=True))
    return [alone.get(i, whole[len(head) :]) for i, (whole, head) in enumerate(zip(joined, heads, strict=True))]


def _special(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
