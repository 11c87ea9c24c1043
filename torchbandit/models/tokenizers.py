"""Tokenizers: the one beside a model, and whether two are the same."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from torchbandit.models.hub import fetch
from torchbandit.models.spec import ModelLike, ModelSpec, as_spec, first_line


def load_tokenizer(model: str | Path | ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; a missing pad token is stood in for by eos (padding is told by masks).

    Raises:
        ValueError: it has neither pad nor eos, or cannot be opened.
    """
    spec = as_spec(model)
    folder = fetch(spec, "tokenizer of")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer of {spec.path}: cannot be opened ({first_line(error)})") from error
    return with_pad(tokenizer)


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, its pad token set to eos if it has none.

    Raises:
        ValueError: it has neither pad nor eos.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: must have a pad or an eos token, got neither; set tokenizer.eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first id beyond a tokenizer's."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_embeddings(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, what: str) -> None:
    """Refuse a tokenizer with ids that a model has no embedding for (trap 27).

    Raises:
        ValueError: names the first such token, its id and the number of embeddings.
    """
    rows, size = len(cast(nn.Embedding, model.get_input_embeddings()).weight), num_ids(tokenizer)
    if size <= rows:
        return
    token = next(token for token, at in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1]) if at >= rows)
    raise ValueError(
        f"{what}: must have an embedding for every id of the tokenizer, got {rows} embeddings for {size} ids (the "
        f"first beyond: {token!r}); call model.resize_token_embeddings({size}), or use its own tokenizer"
    )


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ModelLike, what: str) -> None:
    """Refuse a model that was trained on other ids (trap 5). Chat templates are not compared.

    Special tokens that the model's tokenizer has beside ours, such as a [PAD] at the end, may be there: no row holds
    them, and no text is split otherwise for them. So may a pad token of ours, since padding is told by masks.

    Args:
        tokenizer: the one whose ids will be scored.
        model: a live model has no tokenizer to compare with, and is not checked; nor is a folder without one.
        what: who it is, for the message: "reward model", "reference".
    Raises:
        ValueError: a token of ours has another id there, or none.
    """
    if isinstance(model, PreTrainedModel):
        return
    spec = as_spec(model)
    if Path(spec.path).is_dir() and not any(Path(spec.path).glob("token*")):
        return
    other = load_tokenizer(spec)
    theirs, ours = other.get_vocab(), tokenizer.get_vocab()
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    special = {str(token) for token in other.added_tokens_decoder.values() if token.special}
    harmless = {token for token in special if token not in ours and theirs[token] not in ours.values()}
    pad = tokenizer.pad_token
    if pad is not None and pad not in theirs and ours.get(pad) not in theirs.values():
        harmless.add(pad)
    if harmless.issuperset(differing):
        return
    example = differing[0]
    raise ValueError(
        f"{what} {spec.path}: must have the policy's tokenizer ({len(ours)} tokens), got another with {len(theirs)}; "
        f"{len(differing)} differ, for one {example!r} ({ours.get(example)} against {theirs.get(example)}). Token ids "
        f"of one mean nothing to the other: use a {what} trained with this tokenizer, or score texts with HostReward"
    )


def stop_ids_of(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's eos and the eos ids of the model's generation config.

    Nothing else of a generation config is ever read (trap 18).
    """
    ids: list[int] = []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is not None:
        ids += [int(i) for i in (eos if isinstance(eos, (list, tuple)) else [eos])]
    return tuple(dict.fromkeys(ids))
